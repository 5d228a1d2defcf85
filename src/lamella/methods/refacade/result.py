"""The results: a remover, a control branch as an adapter file, and retextured images.

An adapter is one safetensors file: the branch's weights, with the layers and the digest of its base in the metadata. It
cannot be merged, since it is a separate stream; without it the base is unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lamella.errors import CheckpointError, LamellaError, MethodError, reason_of
from lamella.extras import require
from lamella.methods.refacade.base import Base
from lamella.methods.refacade.frames import read_frames
from lamella.methods.refacade.modules import ControlBranch
from lamella.methods.refacade.nano import TRAINED, UNTRAINED
from lamella.methods.refacade.remover import TextureRemover
from lamella.plan import fingerprint
from lamella.plan.filling import fill
from lamella.results import Evidence, Result
from lamella.signature import Fixture
from lamella.train import TrainingLog

SCHEMA = "lamella.refacade/1"
ADAPTER, LOG, REMOVER = "control.safetensors", "log.json", "remover"
BUILT_IN = (TRAINED, UNTRAINED)


class AdapterMetadata(BaseModel):
    """Metadata of an adapter file.

    Attributes:
        schema_: version of the file format.
        base: digest of the base's weights.
        name: name of the base.
        layers: indices of the layers at which hints are added.
        channels: channels of c and of c_r.
        hidden: intermediate size of the feed-forward layers, if it is not the base's.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    schema_: str = Field(SCHEMA, alias="schema", pattern=f"^{SCHEMA}$")
    base: str
    name: str
    layers: tuple[int, ...] = Field(min_length=1, max_length=1024)
    channels: tuple[int, int]
    hidden: int | None = Field(None, ge=1, le=2**17)


@dataclass(kw_only=True)
class Remover(Result):
    """A trained texture remover.

    Attributes:
        network: in evaluation mode.
        log: log of its training.
    """

    network: TextureRemover
    log: TrainingLog | None = None

    kind: ClassVar[str] = "remover"
    needs_folder: ClassVar[bool] = True
    metavar: ClassVar[str] = "REMOVER"
    source_help: ClassVar[str] = "a folder of `remover` or `distil`, or nano, which is built in"
    default: ClassVar[str] = TRAINED
    example: ClassVar[Fixture] = Fixture(UNTRAINED)

    def describe(self) -> dict[str, Any]:
        """Return its metadata for the provenance."""
        steps = self.network.steps
        return {"kind": self.network.kind, "steps": steps, "sha256": fingerprint.state(self.network)}

    def write(self, folder: Path) -> None:
        """Write the network in diffusers' format, its number of steps, and the log."""
        self.network.write(folder)
        if self.log is not None:
            self.log.write(folder / LOG)

    @classmethod
    def open(cls, name: str | Path) -> Remover:
        """Open a remover; see :meth:`read`."""
        return cls.read(name)

    @classmethod
    def read(cls, path: str | Path) -> Remover:
        """Read a remover from a folder, or a built-in one.

        Raises:
            CheckpointError: when there is none, or it is damaged.
        """
        if str(path) in BUILT_IN:
            from lamella.methods.refacade import nano_parts  # imported here, since it is trained on first use

            return cls(network=nano_parts.remover(str(path)))
        path = Path(path)
        return cls(network=TextureRemover.read(path), log=read_log(path))


@dataclass(kw_only=True)
class Retexturer(Result):
    """A control branch with the remover that it was trained with.

    Attributes:
        adapter: metadata of the branch.
        weights: weights of the branch, by name.
        remover: the texture remover.
        log: log of the training.
        built_in: whether it is nano.
    """

    adapter: AdapterMetadata
    weights: dict[str, Tensor]
    remover: TextureRemover
    log: TrainingLog | None = None
    built_in: bool = False

    kind: ClassVar[str] = "retexturer"
    needs_folder: ClassVar[bool] = True
    metavar: ClassVar[str] = "MODEL"
    source_help: ClassVar[str] = "a folder of `train`; or nano, a small built-in one"
    default: ClassVar[str] = TRAINED
    example: ClassVar[Fixture] = Fixture(UNTRAINED)

    @classmethod
    def of(cls, base: Base, branch: ControlBranch, remover: TextureRemover, **fields: Any) -> Retexturer:
        """Make the result from a branch and its base.

        Args:
            base: the video transformer.
            branch: the control branch.
            remover: the texture remover that it was trained with.
            **fields: further fields of the result.
        """
        blocks: Any = branch.blocks
        patches: Any = branch.patches
        sizes = (patches["video"].in_channels, patches["reference"].in_channels)
        width = blocks[0].feed_forward["video"].net[0].proj.out_features
        hidden = None if width == base.network.config.ffn_dim else width
        adapter = AdapterMetadata(
            base=base.digest, name=base.name, layers=tuple(branch.layers), channels=sizes, hidden=hidden
        )
        weights = {name: each.detach().contiguous() for name, each in branch.state_dict().items()}
        return cls(adapter=adapter, weights=weights, remover=remover.eval(), **fields)

    def branch(self, base: Base) -> ControlBranch:
        """Build the branch for its base, in the precision of the base.

        Raises:
            MethodError: for another base.
            CheckpointError: for weights that do not fit such a branch.
        """
        if base.digest != self.adapter.base:
            raise MethodError(
                f"the branch belongs to a base '{self.adapter.name}' with the digest {self.adapter.base[:12]}, and "
                f"{base.name} has {base.digest[:12]}: give --base"
            )
        if self.adapter.channels != base.control_channels:
            raise CheckpointError(f"{ADAPTER}: channels {self.adapter.channels}, not {base.control_channels}")
        width = self.weights.get("blocks.0.feed_forward.video.net.0.proj.weight")
        if self.adapter.hidden is not None and (width is None or width.shape[0] != self.adapter.hidden):
            raise CheckpointError(f"{ADAPTER}: hidden {self.adapter.hidden} is not the width of its weights")
        branch = ControlBranch(base.network, self.adapter.layers, *self.adapter.channels, self.adapter.hidden)
        fill(branch, self.weights, ADAPTER)
        return branch.to(base.network.device, base.network.dtype).requires_grad_(False).eval()

    def describe(self) -> dict[str, Any]:
        """Return its metadata for the provenance."""
        metadata = {
            "base": self.adapter.name,
            "layers": list(self.adapter.layers),
            "sha256": fingerprint.weights(self.weights),
        }
        return metadata | {"remover": fingerprint.state(self.remover), "removal": self.remover.steps}

    def write(self, folder: Path) -> None:
        """Write the adapter, the remover and the log."""
        metadata = {"refacade": self.adapter.model_dump_json(by_alias=True)}
        save_file({name: each.cpu() for name, each in self.weights.items()}, folder / ADAPTER, metadata=metadata)
        self.remover.write(folder / REMOVER)
        if self.log is not None:
            self.log.write(folder / LOG)

    @classmethod
    def open(cls, name: str | Path) -> Retexturer:
        """Open a retexturer; see :meth:`read`."""
        return cls.read(name)

    @classmethod
    def read(cls, path: str | Path) -> Retexturer:
        """Read a retexturer from a folder, or the built-in one.

        Raises:
            CheckpointError: when it is missing or damaged.
        """
        if str(path) in BUILT_IN:
            from lamella.methods.refacade import nano_parts  # imported here, since it is trained on first use

            base = Base.open(str(path))
            known = {"built_in": str(path) == TRAINED}
            return cls.of(base, nano_parts.branch(base, str(path)), nano_parts.remover(str(path)), **known)
        path = Path(path)
        adapter, weights = read_adapter(path / ADAPTER)
        return cls(adapter=adapter, weights=weights, remover=TextureRemover.read(path / REMOVER), log=read_log(path))


def read_adapter(file: Path) -> tuple[AdapterMetadata, dict[str, Tensor]]:
    """Read the metadata and weights of an adapter file.

    Raises:
        CheckpointError: when it is missing, damaged, or no adapter.
    """
    hint = "give a folder of `lamella run refacade train`"
    try:
        with safe_open(file, framework="pt") as opened:
            adapter = AdapterMetadata.model_validate_json((opened.metadata() or {}).get("refacade", "{}"))
            weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118, no dictionary
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{file}: no adapter ({where}: {first['msg']}): {hint}") from None
    except Exception as error:  # damaged files raise anything
        raise CheckpointError(f"{file}: no adapter ({reason_of(error)}): {hint}") from None
    return adapter, weights


def read_log(folder: Path) -> TrainingLog | None:
    """Read the training log of a folder, if there is one."""
    return TrainingLog.read(folder / LOG) if (folder / LOG).is_file() else None


@dataclass(kw_only=True)
class Retextured(Result):
    """Retextured frames, with the inputs of the network.

    Attributes:
        frames: RGB values [frames, height, width, 3].
        untextured: the untextured object, in the same form.
        reference: the jigsawed reference [1, height, width, 3].
    """

    frames: NDArray[np.uint8]
    untextured: NDArray[np.uint8]
    reference: NDArray[np.uint8]

    kind: ClassVar[str] = "retextured"
    needs_folder: ClassVar[bool] = True

    PARTS: ClassVar[tuple[str, ...]] = ("frames", "untextured", "reference")

    def write(self, folder: Path) -> None:
        """Write a folder of images for each part, and all frames as one file, animated if there are several."""
        image = require("PIL.Image", "vision", "writing images")
        for part in self.PARTS:
            (folder / part).mkdir()
            for index, each in enumerate(getattr(self, part), start=1):
                image.fromarray(each).save(folder / part / f"{index:04}.png")
        first, *others = map(image.fromarray, self.frames)
        if others:
            first.save(folder / "result.webp", save_all=True, append_images=others, duration=80, loop=0, lossless=True)
        else:
            first.save(folder / "result.png")

    @classmethod
    def read(cls, path: str | Path) -> Retextured:
        """Read the images from a folder of results.

        Raises:
            CheckpointError: when they are missing or damaged.
        """
        path = Path(path)
        evidence = Evidence.read(path)
        try:
            parts: dict[str, Any] = {
                part: np.stack([each[..., :3] for each in read_frames(path / part)]) for part in cls.PARTS
            }
        except (LamellaError, ValueError) as error:
            raise CheckpointError(f"{path}: no retextured images ({error}): run refacade again") from None
        return cls(**parts, findings=evidence.findings, notes=evidence.notes)
