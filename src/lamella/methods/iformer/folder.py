"""The folders that the commands write: a network, what is needed to build it again, and how it wants its pictures."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lamella.errors import CheckpointError, reason_of
from lamella.methods.iformer.geometry import Geometry
from lamella.methods.iformer.modules import Layer, LocalAttention
from lamella.methods.iformer.network import Shape
from lamella.plan.filling import fill
from lamella.reading import parse_json, read_text
from lamella.train import TrainingLog

SCHEMA = "lamella.iformer/1"
NETWORK, LOG, WEIGHTS = "network.json", "log.json", "model.safetensors"
LARGEST = 1 << 14  # pixels on a side


@dataclass(frozen=True)
class Looks:
    """How a network wants its pictures; see :class:`~lamella.methods.iformer.vision.Vision`."""

    name: str
    size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: float

    def check(self) -> None:
        """Check that pictures can be prepared so.

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


def network(shape: Shape, size: tuple[int, int], channels: int, classes: int, drop_path: float = 0.0) -> nn.Module:
    """An iFormer with fresh weights, which timm's tools take too."""
    from lamella.methods.iformer.backbone import Backbone  # timm takes a second

    return Backbone(shape, img_size=size, in_chans=channels, num_classes=classes, drop_path_rate=drop_path)


def ramped(
    said: Mapping[str, Any], weights: dict[str, Tensor], looks: Looks, log: TrainingLog | None
) -> dict[str, Any]:
    """The parts of a vision transformer with local paths, out of its document and its weights.

    Raises:
        ValueError: for a document that cannot be.
    """
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
    return {"model": model, "geometry": geometry, "layers": layers, "kernel": kernel, "origin": origin, "log": log}


def classifier(
    said: Mapping[str, Any], weights: dict[str, Tensor], looks: Looks, log: TrainingLog | None
) -> dict[str, Any]:
    """The parts of a trained iFormer, likewise."""
    shape, classes = _strict(Shape, said["shape"]), _strict(int, said["classes"])
    if sum(shape.depths) > len(weights) or classes < 1 or log is None:
        raise ValueError("its numbers do not fit its weights")
    with torch.device("meta"):
        model = network(shape, looks.size, looks.channels, classes)
    fill(model, weights, WEIGHTS)
    return {"model": model, "shape": shape, "classes": classes, "log": log}


KINDS: dict[str, Callable[..., dict[str, Any]]] = {"ramped": ramped, "classifier": classifier}


def kind_of(folder: Path) -> str:
    """Which kind of network a folder holds.

    Raises:
        CheckpointError: when it holds none.
    """
    try:
        kind = str(parse_json(read_text(folder / NETWORK))["kind"])
        KINDS[kind]
    except Exception:  # a file that says anything
        raise CheckpointError(f"{folder}: {NETWORK} names no network: give a folder that iformer wrote") from None
    return kind


def read_folder(folder: Path, kind: str) -> tuple[dict[str, Any], Looks]:
    """The parts of the network in a folder, its ``model`` among them, and how it wants its pictures.

    Raises:
        CheckpointError: when there is none, or it is damaged.
    """
    try:
        said = parse_json(read_text(folder / NETWORK, "give a folder that iformer has written"))
        if not isinstance(said, dict) or (said.get("schema"), said.get("kind")) != (SCHEMA, kind):
            raise ValueError(f"{NETWORK} is no document of the schema {SCHEMA} and the kind {kind}")
        log = TrainingLog.read(folder / LOG) if (folder / LOG).is_file() else None
        looks = _strict(Looks, said["looks"])
        parts = KINDS[kind](said, load_file(folder / WEIGHTS), looks, log)
        looks.check()
        return parts, looks
    except Exception as error:  # each part has its own for a damaged file
        reason = reason_of(error)
        raise CheckpointError(f"{folder}: no network of iformer ({reason}): give one that it wrote") from None


def write_folder(
    folder: Path, kind: str, model: nn.Module, looks: Looks, said: Mapping[str, Any], log: TrainingLog | None
) -> None:
    """Write a network with what is needed to read it."""
    save_file({name: each.detach().cpu().contiguous() for name, each in model.state_dict().items()},
              folder / WEIGHTS)  # fmt: skip
    document = {"schema": SCHEMA, "kind": kind, "looks": asdict(looks), **said}
    (folder / NETWORK).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if log is not None:
        log.write(folder / LOG)


def _strict(kind: Any, value: Any) -> Any:
    """A value of a document as what it must be, without anything that would have to be converted."""
    return TypeAdapter(kind).validate_json(json.dumps(value), strict=True)
