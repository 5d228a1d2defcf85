"""The result of training: a network for walls and openings, as a folder that is read back without running anything."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file, save_file

from lamella.errors import CheckpointError, MethodError
from lamella.methods.muranet.attention import Norm, Paths, Variant
from lamella.methods.muranet.encoder import ENCODERS, Blocks, Encoder, Widths, mura, of_timm
from lamella.methods.muranet.modules import LEVELS, Detector, Head, PlanNetwork, UNetDecoder, digest
from lamella.reading import parse_json, read_text
from lamella.results import Result
from lamella.train import TrainingLog
from lamella.zoo import ZOO

SCHEMA = "lamella.muranet/1"
SHAPE, WEIGHTS, LOG = "recogniser.json", "model.safetensors", "log.json"
Tasks = Literal["both", "walls", "openings"]
LARGEST = 8192  # pixels of a side
FINEST = 8  # stride of the finest level of boxes, where the stem halves the picture
NECK = 128  # channels of the pyramid over a network of timm


@dataclass(frozen=True)
class Shape:
    """What a network is made of.

    Attributes:
        encoder: ``mura``, the paper's base; ``mura-5`` or ``mura-6`` with more stages; ``nano`` with 0.2 million
            parameters; or a network of timm.
        size: pixels of the square that plans are brought to; the paper's 1536.
        letterbox: let plans keep their shape, with paper beside them; the paper stretches them.
        attention: of the blocks: ``gate``, ``msca`` or ``local_softmax``, or ``depthwise`` to compare with.
        paths: of its 3 x 3 convolutions: chained or parallel.
        scales: how many of them.
        norm: ``batch``, or ``group`` where a batch is of one or two plans.
        spp: spatial pyramid pooling behind the last stage.
        insert: stages of an encoder, the first being 0, behind which relation attention is inserted, at first without
            effect.
        split: how many stages the two tasks share; all when left out.
        tasks: both, or one alone to compare with.
        head: ``decoupled`` or ``coupled``.
        neck: channels of the pyramid that boxes are found in; 256, 32 for nano and 128 for timm when left out.
        finest: stride of its finest level; 8, or 4 for nano when left out.
        deep: deep supervision of walls, at strides 4 and 8.

    Raises:
        MethodError: for values out of range.
    """

    encoder: str = "mura"
    size: int = 1536
    letterbox: bool = False
    attention: Variant = "gate"
    paths: Paths = "chained"
    scales: int = 3
    norm: Norm = "batch"
    spp: bool = False
    insert: tuple[int, ...] = ()
    split: int | None = None
    tasks: Tasks = "both"
    head: Head = "decoupled"
    neck: int | None = None
    finest: int | None = None
    deep: bool = False

    def __post_init__(self) -> None:
        if not 16 <= self.size <= LARGEST:
            raise MethodError(f"size={self.size}: give 16 to {LARGEST} pixels")
        if self.neck is not None and not 8 <= self.neck <= 4096:
            raise MethodError(f"neck={self.neck}: give 8 to 4096 channels")
        if self.spp and self.encoder not in ENCODERS:
            raise MethodError(f"spp stands behind {', '.join(ENCODERS)} alone: leave it out")

    @property
    def frame(self) -> tuple[int, bool]:
        """How plans are brought to the network; see :class:`Frame`."""
        return self.size, self.letterbox

    @property
    def blocks(self) -> Blocks:
        expand = ENCODERS.get(self.encoder, Widths()).expand
        return Blocks(self.attention, self.scales, self.paths, self.norm, expand)

    def build(self, classes: int, weights: Path | None = None) -> PlanNetwork:
        """A network of this shape with fresh weights.

        Args:
            classes: of openings.
            weights: a file of those of a timm network.

        Raises:
            MethodError: for an encoder without the maps that are needed, or a size that its strides do not divide.
            CheckpointError: for weights of another network.
        """
        widths = ENCODERS.get(self.encoder)
        if widths is not None and weights is not None:
            raise MethodError(f"{self.encoder} learns from scratch: give weights to a network of timm alone")
        name = ZOO[self.encoder].architecture if self.encoder in ZOO else self.encoder
        encoder = of_timm(name, weights) if widths is None else mura(widths, self.blocks, pooled=self.spp)
        encoder.insert(self.insert, self.blocks)
        if self.split is not None:
            encoder.split(self.split)
        if self.size % encoder.strides[-1]:
            raise MethodError(f"size={self.size}: give a multiple of {encoder.strides[-1]}, the coarsest stride")
        walls = UNetDecoder(encoder.channels, encoder.strides, self.blocks, self.deep)
        levels = self._levels(encoder)
        channels, strides = ([each[place] for place in levels] for each in (encoder.channels, encoder.strides))
        neck = self.neck or (NECK if widths is None else widths.neck)
        openings = Detector(channels, strides, neck, classes, self.head, self.norm)
        return PlanNetwork(
            encoder,
            None if self.tasks == "openings" else walls,
            None if self.tasks == "walls" else openings,
            levels,
        )

    def _levels(self, encoder: Encoder) -> Sequence[int]:
        finest = self.finest or (FINEST if encoder.strides[0] > 1 else FINEST // 2)
        if finest not in encoder.strides:
            raise MethodError(f"finest={finest}: the maps of {self.encoder} have strides {list(encoder.strides)}")
        first = encoder.strides.index(finest)
        return range(first, min(first + LEVELS, len(encoder.strides)))


@dataclass(kw_only=True)
class Recogniser(Result):
    """A trained network.

    Attributes:
        model: in evaluation mode.
        shape: of it.
        classes: of openings.
        log: of its training.
    """

    model: PlanNetwork
    shape: Shape
    classes: tuple[str, ...]
    log: TrainingLog

    kind: ClassVar[str] = "recogniser"
    needs_folder: ClassVar[bool] = True

    def describe(self) -> dict[str, Any]:
        """What provenance says of it."""
        shape = asdict(self.shape) | {"insert": list(self.shape.insert)}
        return {"shape": shape, "classes": list(self.classes), "sha256": digest(self.model)}

    def changed(self, insert: Sequence[int] = (), split: int | None = None) -> Recogniser:
        """A copy with attention inserted behind stages, and stages split off, that computes the same.

        Raises:
            MethodError: for a stage that there is not, or that has attention or is split already.
        """
        if twice := sorted(set(insert) & set(self.shape.insert)):
            raise MethodError(f"stage {twice[0]} has attention inserted already: give others")
        if self.shape.split is not None and split is not None and split > self.shape.split:
            raise MethodError(f"split={split}: the network shares {self.shape.split} stages; give fewer")
        shape = replace(
            self.shape,
            insert=(*self.shape.insert, *insert),
            split=self.shape.split if split is None else split,
        )
        with torch.device("meta"):
            model = self.shape.build(len(self.classes))
        model.load_state_dict({name: each.clone() for name, each in self.model.state_dict().items()}, assign=True)
        model.encoder.insert(insert, shape.blocks)
        if split is not None:
            model.encoder.split(split)
        return Recogniser(model=model.eval(), shape=shape, classes=self.classes, log=self.log)

    def write(self, folder: Path) -> None:
        """Weights, shape and log."""
        save_file({name: each.contiguous() for name, each in self.model.state_dict().items()}, folder / WEIGHTS)
        said = {"schema": SCHEMA, "classes": self.classes} | asdict(self.shape)
        (folder / SHAPE).write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
        self.log.write(folder / LOG)

    @classmethod
    def read(cls, path: str | Path) -> Recogniser:
        """The network in a folder.

        Raises:
            CheckpointError: when there is none, or it is damaged.
        """
        path = Path(path)
        mend = "train one with `lamella run muranet`"
        try:
            said = parse_json(read_text(path / SHAPE, "give a folder that muranet has written"))
            if not isinstance(said, dict) or said.pop("schema", None) != SCHEMA:
                raise ValueError(f"{SHAPE} is no document of the schema {SCHEMA}")
            classes = TypeAdapter(tuple[str, ...]).validate_python(said.pop("classes"))
            if not classes:
                raise ValueError(f"{SHAPE} names no class")
            if said.keys() != {each.name for each in fields(Shape)}:
                raise ValueError(f"{SHAPE} does not name each size once")
            shape = TypeAdapter(Shape).validate_json(json.dumps(said), strict=True)
            with torch.device("meta"):  # whatever sizes it claims, the weights are those that the file has
                model = shape.build(len(classes))
            model.load_state_dict(load_file(path / WEIGHTS), assign=True)
            log = TrainingLog.read(path / LOG)
        except ValidationError as error:
            first = error.errors()[0]
            reason = f"{SHAPE}: {'.'.join(map(str, first['loc']))}: {first['msg']}"
            raise CheckpointError(f"{path}: no recogniser ({reason}): {mend}") from None
        except Exception as error:  # each part has its own for a damaged file
            reason = " ".join(str(error).split())[:160]
            raise CheckpointError(f"{path}: no recogniser ({reason}): {mend}") from None
        return cls(model=model.eval(), shape=shape, classes=classes, log=log)
