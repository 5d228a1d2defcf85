"""What the commands return: a vision transformer with local paths, and a trained iFormer; and how both are read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lamella.errors import CheckpointError, reason_of
from lamella.methods.iformer.geometry import Geometry
from lamella.methods.iformer.modules import Layer, LocalAttention
from lamella.methods.iformer.network import Shape
from lamella.methods.iformer.vision import LARGEST, WEIGHTS, Vision
from lamella.plan.filling import fill
from lamella.reading import parse_json, read_text
from lamella.results import Result
from lamella.train import TrainingLog

SCHEMA = "lamella.iformer/1"
NETWORK, LOG, PLAN = "network.json", "log.json", "plan.json"


@dataclass(frozen=True)
class Looks:
    """How a network wants its pictures; see :class:`~lamella.methods.iformer.vision.Vision`."""

    name: str
    size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: float

    @classmethod
    def of(cls, vision: Vision) -> Looks:
        return cls(*(getattr(vision, each.name) for each in fields(cls)))

    def around(self, model: Any) -> Vision:
        """A network that wants them so.

        Raises:
            ValueError: for numbers that cannot be.
        """
        plain = (*self.mean, *self.std, self.crop)
        if (
            len(self.mean) != self.channels
            or len(self.std) != self.channels
            or not all(0 <= each <= 1 for each in plain)
        ):
            raise ValueError("it does not say how pictures are scaled")
        if self.crop < 0.1 or not min(self.std) > 0 or not all(1 <= side <= LARGEST for side in self.size):
            raise ValueError("its numbers for pictures are out of range")
        return Vision(model.eval(), **{each.name: getattr(self, each.name) for each in fields(self)})


def with_paths(geometry: Geometry, layers: Sequence[Layer], kernel: int) -> Any:
    """A vision transformer with local paths, with fresh weights."""
    model = geometry.build()
    for layer, block in zip(layers, model.blocks, strict=True):
        if layer.conv:
            block.attn = local(block.attn, geometry, layer, kernel)
    return model


def local(attn: Any, geometry: Geometry, layer: Layer, kernel: int) -> LocalAttention:
    """What takes the place of an attention, with fresh weights, and with its norms of Q and K."""
    norms = (attn.q_norm, attn.k_norm)
    return LocalAttention(
        geometry.width, attn.head_dim, layer, geometry.grid, prefix=geometry.prefix, kernel=kernel,
        qkv_bias=geometry.qkv_bias, norms=norms,
    )  # fmt: skip


@dataclass(kw_only=True)
class Ramped(Result):
    """A vision transformer whose early heads are local paths.

    Attributes:
        vision: the network.
        geometry: of what it was.
        layers: the plan.
        kernel: of the convolutions, on a side.
        origin: the fingerprint of what it was.
        log: of its healing, where it was healed.
    """

    vision: Vision
    geometry: Geometry
    layers: tuple[Layer, ...]
    kernel: int
    origin: str
    log: TrainingLog | None = None

    kind: ClassVar[str] = "ramped"
    needs_folder: ClassVar[bool] = True

    def describe(self) -> dict[str, Any]:
        """What provenance says of it."""
        return {"kept": [len(each.kept) for each in self.layers], **self.vision.describe()}

    def write(self, folder: Path) -> None:
        """Weights, what is needed to read them, and the plan for readers."""
        said = {"geometry": asdict(self.geometry), "layers": [asdict(each) for each in self.layers],
                "kernel": self.kernel, "origin": self.origin}  # fmt: skip
        _write(folder, self.kind, self.vision, said, self.log)
        plan = {f"blocks.{number}.attn": asdict(each) for number, each in enumerate(self.layers)}
        (folder / PLAN).write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """The network in a folder.

        Raises:
            CheckpointError: when there is none, or it is damaged.
        """
        return _read(Path(path), cls.kind, cls._of)

    @classmethod
    def _of(cls, said: Mapping[str, Any], weights: dict[str, Tensor], looks: Looks, log: TrainingLog | None) -> Self:
        geometry = _strict(Geometry, said["geometry"])
        layers = _strict(tuple[Layer, ...], said["layers"])
        kernel, origin = _strict(int, said["kernel"]), _strict(str, said["origin"])
        geometry.check("it")
        if (geometry.size, geometry.channels) != (looks.size, looks.channels):
            raise ValueError("it is for pictures of another size than those that it wants")
        if geometry.depth != len(layers) or geometry.depth > len(weights):
            raise ValueError("it has another number of layers")
        whole = geometry.width // geometry.heads
        for each in layers:
            kept = sorted(set(each.kept))
            if list(each.kept) != kept or any(not 0 <= head < geometry.heads for head in kept):
                raise ValueError("it keeps heads that there are not")
            if each.conv != (geometry.heads - len(kept)) * whole:
                raise ValueError("its heads and channels do not add up")
        with torch.device("meta"):
            model = with_paths(geometry, layers, kernel)
        fill(model, weights, WEIGHTS)
        return cls(vision=looks.around(model), geometry=geometry, layers=layers, kernel=kernel, origin=origin, log=log)


@dataclass(kw_only=True)
class Classifier(Result):
    """A trained iFormer.

    Attributes:
        vision: the network.
        shape: its layers.
        classes: that it names.
        log: of its training.
    """

    vision: Vision
    shape: Shape
    classes: int
    log: TrainingLog

    kind: ClassVar[str] = "classifier"
    needs_folder: ClassVar[bool] = True

    def describe(self) -> dict[str, Any]:
        """What provenance says of it."""
        return {"shape": asdict(self.shape), "classes": self.classes, **self.vision.describe()}

    def write(self, folder: Path) -> None:
        """Weights, shape and log."""
        _write(folder, self.kind, self.vision, {"shape": asdict(self.shape), "classes": self.classes}, self.log)

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """The network in a folder.

        Raises:
            CheckpointError: when there is none, or it is damaged.
        """
        return _read(Path(path), cls.kind, cls._of)

    @classmethod
    def _of(cls, said: Mapping[str, Any], weights: dict[str, Tensor], looks: Looks, log: TrainingLog | None) -> Self:
        shape, classes = _strict(Shape, said["shape"]), _strict(int, said["classes"])
        if sum(shape.depths) > len(weights) or classes < 1 or log is None:
            raise ValueError("its numbers do not fit its weights")
        with torch.device("meta"):
            model = network(shape, looks.size, looks.channels, classes)
        fill(model, weights, WEIGHTS)
        return cls(vision=looks.around(model), shape=shape, classes=classes, log=log)


def network(shape: Shape, size: tuple[int, int], channels: int, classes: int, drop_path: float = 0.0) -> nn.Module:
    """An iFormer with fresh weights, which timm's tools take too."""
    from lamella.methods.iformer.backbone import Backbone  # timm takes a second

    return Backbone(shape, img_size=size, in_chans=channels, num_classes=classes, drop_path_rate=drop_path)


def read_network(folder: Path) -> Vision:
    """The network in a folder that one of the commands wrote.

    Raises:
        CheckpointError: when there is none, or it is damaged.
    """
    try:
        said = parse_json(read_text(folder / NETWORK))
        reader = {each.kind: each for each in (Ramped, Classifier)}[said["kind"]]
    except Exception:  # a file that says anything
        raise CheckpointError(f"{folder}: {NETWORK} names no network: give a folder that iformer wrote") from None
    return reader.read(folder).vision


def _write(folder: Path, kind: str, vision: Vision, said: Mapping[str, Any], log: TrainingLog | None) -> None:
    save_file({name: each.detach().cpu().contiguous() for name, each in vision.model.state_dict().items()},
              folder / WEIGHTS)  # fmt: skip
    document = {"schema": SCHEMA, "kind": kind, "looks": asdict(Looks.of(vision)), **said}
    (folder / NETWORK).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if log is not None:
        log.write(folder / LOG)


def _read(folder: Path, kind: str, make: Any) -> Any:
    try:
        said = parse_json(read_text(folder / NETWORK, "give a folder that iformer has written"))
        if not isinstance(said, dict) or (said.get("schema"), said.get("kind")) != (SCHEMA, kind):
            raise ValueError(f"{NETWORK} is no document of the schema {SCHEMA} and the kind {kind}")
        log = TrainingLog.read(folder / LOG) if (folder / LOG).is_file() else None
        return make(said, load_file(folder / WEIGHTS), _strict(Looks, said["looks"]), log)
    except Exception as error:  # each part has its own for a damaged file
        reason = reason_of(error)
        raise CheckpointError(f"{folder}: no network of iformer ({reason}): give one that it wrote") from None


def _strict(kind: Any, value: Any) -> Any:
    """A value of a document as what it must be, without anything that would have to be converted."""
    return TypeAdapter(kind).validate_json(json.dumps(value), strict=True)
