"""The results: a remover, a control branch as an adapter file, and retextured pictures.

An adapter is one safetensors file: the branch's weights, and in its metadata the layers that it is for and the digest
of the base that it belongs to. It cannot be merged, since it is a stream of its own; without it the base is as it was.
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
from lamella.methods.refacade.frames import read
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


class Adapter(BaseModel):
    """What an adapter's metadata says.

    Attributes:
        schema_: of the file.
        base: the digest of the base's weights.
        name: what the base was called.
        layers: at which hints are added.
        channels: of c and of c_r.
        hidden: width of the feed-forward maps, where it is not the base's.
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
        log: of its training.
    """

    network: TextureRemover
    log: TrainingLog | None = None

    kind: ClassVar[str] = "remover"
    needs_folder: ClassVar[bool] = True
    metavar: ClassVar[str] = "REMOVER"
    source_help: ClassVar[str] = "a folder that `remover` or `distil` has written, or nano, which is built in"
    default: ClassVar[str] = TRAINED
    example: ClassVar[Fixture] = Fixture(UNTRAINED)

    def describe(self) -> dict[str, Any]:
        """What provenance says of it."""
        steps = self.network.steps
        return {"kind": self.network.kind, "steps": steps, "sha256": fingerprint.state(self.network)}

    def write(self, folder: Path) -> None:
        """The network as diffusers writes one, its steps, and the log."""
        self.network.write(folder)
        if self.log is not None:
            self.log.write(folder / LOG)

    @classmethod
    def open(cls, name: str | Path) -> Remover:
        """Open a remover; see :meth:`read`."""
        return cls.read(name)

    @classmethod
    def read(cls, path: str | Path) -> Remover:
        """The remover in a folder, or a built-in one.

        Raises:
            CheckpointError: when there is none, or it is damaged.
        """
        if str(path) in BUILT_IN:
            from lamella.methods.refacade import nano_parts  # here, since it is trained when it is first asked for

            return cls(network=nano_parts.remover(str(path)))
        path = Path(path)
        return cls(network=TextureRemover.read(path), log=read_log(path))


@dataclass(kw_only=True)
class Retexturer(Result):
    """A control branch with the remover that it was trained with.

    Attributes:
        adapter: what it belongs to.
        weights: of the branch, by name.
        remover: takes texture away.
        log: of its training.
        built_in: whether it is nano.
    """

    adapter: Adapter
    weights: dict[str, Tensor]
    remover: TextureRemover
    log: TrainingLog | None = None
    built_in: bool = False

    kind: ClassVar[str] = "retexturer"
    needs_folder: ClassVar[bool] = True
    metavar: ClassVar[str] = "MODEL"
    source_help: ClassVar[str] = "a folder that `train` has written; or nano, a small one that is built in"
    default: ClassVar[str] = TRAINED
    example: ClassVar[Fixture] = Fixture(UNTRAINED)

    @classmethod
    def of(cls, base: Base, branch: ControlBranch, remover: TextureRemover, **told: Any) -> Retexturer:
        """A branch with what it belongs to."""
        blocks: Any = branch.blocks
        patches: Any = branch.patches
        sizes = (patches["video"].in_channels, patches["reference"].in_channels)
        width = blocks[0].feed_forward["video"].net[0].proj.out_features
        hidden = None if width == base.network.config.ffn_dim else width
        adapter = Adapter(base=base.digest, name=base.name, layers=tuple(branch.layers), channels=sizes, hidden=hidden)
        weights = {name: each.detach().contiguous() for name, each in branch.state_dict().items()}
        return cls(adapter=adapter, weights=weights, remover=remover.eval(), **told)

    def branch(self, base: Base) -> ControlBranch:
        """The branch for its base.

        Raises:
            MethodError: for another base.
            CheckpointError: for weights that are not those of such a branch.
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
        made = ControlBranch(base.network, self.adapter.layers, *self.adapter.channels, self.adapter.hidden)
        fill(made, self.weights, ADAPTER)
        return made.to(base.network.device).requires_grad_(False).eval()

    def describe(self) -> dict[str, Any]:
        """What provenance says of it."""
        said = {
            "base": self.adapter.name,
            "layers": list(self.adapter.layers),
            "sha256": fingerprint.weights(self.weights),
        }
        return said | {"remover": fingerprint.state(self.remover), "removal": self.remover.steps}

    def write(self, folder: Path) -> None:
        """The adapter, the remover and the log."""
        said = {"refacade": self.adapter.model_dump_json(by_alias=True)}
        save_file({name: each.cpu() for name, each in self.weights.items()}, folder / ADAPTER, metadata=said)
        self.remover.write(folder / REMOVER)
        if self.log is not None:
            self.log.write(folder / LOG)

    @classmethod
    def open(cls, name: str | Path) -> Retexturer:
        """Open a retexturer; see :meth:`read`."""
        return cls.read(name)

    @classmethod
    def read(cls, path: str | Path) -> Retexturer:
        """What a folder holds, or the built-in one.

        Raises:
            CheckpointError: when it is missing or damaged.
        """
        if str(path) in BUILT_IN:
            from lamella.methods.refacade import nano_parts  # here, since it is trained when it is first asked for

            base = Base.open(str(path))
            known = {"built_in": str(path) == TRAINED}
            return cls.of(base, nano_parts.branch(base, str(path)), nano_parts.remover(str(path)), **known)
        path = Path(path)
        adapter, weights = read_adapter(path / ADAPTER)
        return cls(adapter=adapter, weights=weights, remover=TextureRemover.read(path / REMOVER), log=read_log(path))


def read_adapter(file: Path) -> tuple[Adapter, dict[str, Tensor]]:
    """What an adapter file says and holds.

    Raises:
        CheckpointError: when it is missing, damaged, or no adapter.
    """
    hint = "give a folder that `lamella run refacade train` has written"
    try:
        with safe_open(file, framework="pt") as opened:
            adapter = Adapter.model_validate_json((opened.metadata() or {}).get("refacade", "{}"))
            weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118, no dictionary
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{file}: no adapter ({where}: {first['msg']}): {hint}") from None
    except Exception as error:  # of damaged files, anything
        raise CheckpointError(f"{file}: no adapter ({reason_of(error)}): {hint}") from None
    return adapter, weights


def read_log(folder: Path) -> TrainingLog | None:
    return TrainingLog.read(folder / LOG) if (folder / LOG).is_file() else None


@dataclass(kw_only=True)
class Retextured(Result):
    """Retextured frames, with what the network was shown.

    Attributes:
        frames: [frames, height, width, 3].
        untextured: the object without texture, likewise.
        reference: the jigsawed reference [1, height, width, 3].
    """

    frames: NDArray[np.uint8]
    untextured: NDArray[np.uint8]
    reference: NDArray[np.uint8]

    kind: ClassVar[str] = "retextured"
    needs_folder: ClassVar[bool] = True

    PARTS: ClassVar[tuple[str, ...]] = ("frames", "untextured", "reference")

    def write(self, folder: Path) -> None:
        """A folder of pictures for each part; and all frames as one file, which moves where they are several."""
        image = require("PIL.Image", "vision", "writing pictures")
        for part in self.PARTS:
            (folder / part).mkdir()
            for number, each in enumerate(getattr(self, part), start=1):
                image.fromarray(each).save(folder / part / f"{number:04}.png")
        first, *others = map(image.fromarray, self.frames)
        if others:
            first.save(folder / "result.webp", save_all=True, append_images=others, duration=80, loop=0, lossless=True)
        else:
            first.save(folder / "result.png")

    @classmethod
    def read(cls, path: str | Path) -> Retextured:
        """The pictures in a folder of results.

        Raises:
            CheckpointError: when they are missing or damaged.
        """
        path = Path(path)
        evidence = Evidence.read(path)
        try:
            parts: dict[str, Any] = {
                part: np.stack([each[..., :3] for each in read(path / part)]) for part in cls.PARTS
            }
        except (LamellaError, ValueError) as error:
            raise CheckpointError(f"{path}: no retextured pictures ({error}): run refacade again") from None
        return cls(**parts, findings=evidence.findings, notes=evidence.notes)
