"""The result of training: a network for walls and openings, as a folder that is read back without running anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

import torch
from annotated_types import Ge, Le

from lamella.errors import MethodError, listed
from lamella.methods.muranet.attention import Norm, Paths, Variant
from lamella.methods.muranet.encoder import ENCODERS, Blocks, Encoder, Widths, mura, of_timm
from lamella.methods.muranet.modules import LEVELS, Detector, Head, PlanNetwork, UNetDecoder
from lamella.processes import local_rank
from lamella.results import TrainedNetwork
from lamella.zoo import ZOO, preference

Tasks = Literal["both", "walls", "openings"]
LARGEST = 8192  # pixels of a side
FINEST = 8  # stride of the finest level of boxes, where the stem halves the picture
NECK = 128  # channels of the pyramid over a network of timm


def in_zoo(encoder: str) -> str:
    """timm's name of an encoder that the zoo has; empty for all else, its language models and texts too."""
    return ZOO[encoder].architecture if encoder in ZOO else ""


def accelerator() -> str:
    """Where networks are: on the device that was asked for, or on the machine's accelerator where there is one."""
    return preference().device or (f"cuda:{local_rank()}" if torch.cuda.is_available() else "cpu")


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
        MethodError: for pooling behind an encoder that cannot have it.
    """

    encoder: str = "mura"
    size: Annotated[int, Ge(16), Le(LARGEST)] = 1536
    letterbox: bool = False
    attention: Variant = "gate"
    paths: Paths = "chained"
    scales: Annotated[int, Ge(1), Le(16)] = 3
    norm: Norm = "batch"
    spp: bool = False
    insert: tuple[Annotated[int, Ge(0)], ...] = ()
    split: Annotated[int, Ge(0)] | None = None
    tasks: Tasks = "both"
    head: Head = "decoupled"
    neck: Annotated[int, Ge(8), Le(4096)] | None = None
    finest: Annotated[int, Ge(1)] | None = None
    deep: bool = False

    def __post_init__(self) -> None:
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
        name = in_zoo(self.encoder) or self.encoder
        encoder = of_timm(name, weights) if widths is None else mura(widths, self.blocks, pooled=self.spp)
        encoder.insert(self.insert, self.blocks)
        if self.split is not None:
            encoder.split(self.split)
        if self.size % encoder.strides[-1]:
            raise MethodError(f"size {self.size}: give a multiple of {encoder.strides[-1]}, the coarsest stride")
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
            raise MethodError(f"finest {finest}: the maps of {self.encoder} have strides {listed(encoder.strides)}")
        first = encoder.strides.index(finest)
        return range(first, min(first + LEVELS, len(encoder.strides)))


@dataclass(kw_only=True)
class Recogniser(TrainedNetwork):
    """A trained network.

    Attributes:
        shape: of it.
        classes: of openings.
    """

    model: PlanNetwork
    shape: Shape
    classes: tuple[str, ...]

    kind: ClassVar[str] = "recogniser"
    schema: ClassVar[str] = "lamella.muranet/1"
    shaped: ClassVar[tuple[str, ...]] = ("shape", "classes")
    made_by: ClassVar[str] = "lamella run muranet"

    @classmethod
    def build(cls, *, shape: Shape, classes: tuple[str, ...]) -> PlanNetwork:  # type: ignore[override]
        """A network with fresh weights."""
        if not classes:
            raise MethodError("openings have no class: name one or more")
        return shape.build(len(classes))

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """The network in a folder, on the machine's accelerator where there is one.

        Raises:
            CheckpointError: when there is none, or it is damaged.
        """
        found = super().read(path)
        found.model.to(accelerator())
        return found

    def changed(self, insert: Sequence[int] = (), split: int | None = None) -> Recogniser:
        """A copy with attention inserted behind stages, and stages split off, that computes the same.

        Raises:
            MethodError: for a stage that there is not, or that has attention or is split already.
        """
        if twice := sorted(set(insert) & set(self.shape.insert)):
            raise MethodError(f"stage {twice[0]} has attention inserted already: give others")
        if self.shape.split is not None and split is not None and split > self.shape.split:
            raise MethodError(f"split {split}: the network shares {self.shape.split} stages; give fewer")
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
        model.to(self.model.encoder.mean.device)
        return Recogniser(model=model.eval(), shape=shape, classes=self.classes, log=self.log)
