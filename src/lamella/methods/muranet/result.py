"""The result of training: a network for walls and openings, saved to a folder and loaded without executing code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

import torch
from annotated_types import Ge, Le

from lamella.errors import MethodError, listed
from lamella.methods.muranet.attention import Norm, Paths, Variant
from lamella.methods.muranet.encoder import ENCODERS, BlockDesign, EncoderWidths, PlanEncoder, mura, of_timm
from lamella.methods.muranet.modules import LEVELS, Detector, Head, PlanNetwork, UNetDecoder
from lamella.processes import local_rank
from lamella.results import TrainedNetwork
from lamella.zoo import ZOO, preference

Tasks = Literal["both", "walls", "openings"]
LARGEST = 8192  # maximum side in pixels
FINEST = 8  # stride of the finest pyramid level, if the stem halves the resolution
NECK = 128  # channels of the pyramid of a timm network


def in_zoo(encoder: str) -> str:
    """Return timm's name of an image encoder in Lamella's zoo; an empty string for anything else."""
    return ZOO[encoder].architecture if encoder in ZOO else ""


def accelerator() -> str:
    """Return the device of networks: the requested one, or an accelerator if there is one."""
    return preference().device or (f"cuda:{local_rank()}" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class RecogniserShape:
    """The architecture of a network.

    Attributes:
        encoder: ``mura``, the paper's base; ``mura-5`` or ``mura-6`` with more stages; ``nano`` with 0.2 million
            parameters; or a timm network.
        size: side in pixels of the square network input; 1536 in the paper.
        letterbox: keep the aspect ratio of plans, with padding; the paper stretches them.
        attention: kind of attention of the blocks: ``gate``, ``msca`` or ``local_softmax``; ``depthwise`` is the
            baseline.
        paths: chained or parallel 3 x 3 convolutions of the attention.
        scales: number of these convolutions.
        norm: ``batch``, or ``group`` for batches of one or two plans.
        spp: spatial pyramid pooling after the last stage.
        insert: indices of encoder stages, from 0, after which relation attention is inserted; it has no effect at
            first.
        split: number of stages that the two tasks share; all if None.
        tasks: both tasks, or a single one as a control.
        head: ``decoupled`` or ``coupled`` detection head.
        neck: channels of the feature pyramid of the detector; defaults to 256, 32 for nano and 128 for timm.
        finest: stride of the finest pyramid level; defaults to 8, 4 for nano.
        deep: deep supervision of walls, at strides 4 and 8.

    Raises:
        MethodError: for pooling with an encoder that cannot have it.
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
            raise MethodError(f"spp works with {', '.join(ENCODERS)} only: omit it")

    @property
    def frame(self) -> tuple[int, bool]:
        """The size of the network input and whether plans keep their aspect ratio; see :class:`Frame`."""
        return self.size, self.letterbox

    @property
    def blocks(self) -> BlockDesign:
        """The design of the network's blocks."""
        expand = ENCODERS.get(self.encoder, EncoderWidths()).expand
        return BlockDesign(self.attention, self.scales, self.paths, self.norm, expand)

    def build(self, classes: int, weights: Path | None = None) -> PlanNetwork:
        """Build a network of this shape with random weights.

        Args:
            classes: number of classes of openings.
            weights: a file with weights of a timm network.

        Raises:
            MethodError: for an encoder without the required maps, or a size that is no multiple of its strides.
            CheckpointError: for weights of another network.
        """
        widths = ENCODERS.get(self.encoder)
        if widths is not None and weights is not None:
            raise MethodError(f"{self.encoder} is trained from scratch: give weights with a timm network only")
        name = in_zoo(self.encoder) or self.encoder
        encoder = of_timm(name, weights) if widths is None else mura(widths, self.blocks, pooled=self.spp)
        encoder.insert(self.insert, self.blocks)
        if self.split is not None:
            encoder.split(self.split)
        if self.size % encoder.strides[-1]:
            raise MethodError(f"size {self.size}: give a multiple of {encoder.strides[-1]}, the coarsest stride")
        walls = UNetDecoder(encoder.channels, encoder.strides, self.blocks, self.deep)
        levels = self._levels(encoder)
        channels, strides = ([each[index] for index in levels] for each in (encoder.channels, encoder.strides))
        neck = self.neck or (NECK if widths is None else widths.neck)
        openings = Detector(channels, strides, neck, classes, self.head, self.norm)
        return PlanNetwork(
            encoder,
            None if self.tasks == "openings" else walls,
            None if self.tasks == "walls" else openings,
            levels,
        )

    def _levels(self, encoder: PlanEncoder) -> Sequence[int]:
        finest = self.finest or (FINEST if encoder.strides[0] > 1 else FINEST // 2)
        if finest not in encoder.strides:
            raise MethodError(f"finest {finest}: the maps of {self.encoder} have strides {listed(encoder.strides)}")
        first = encoder.strides.index(finest)
        return range(first, min(first + LEVELS, len(encoder.strides)))


@dataclass(kw_only=True)
class Recogniser(TrainedNetwork):
    """A trained network for floor plans.

    Attributes:
        shape: its architecture.
        classes: classes of openings.
    """

    model: PlanNetwork
    shape: RecogniserShape
    classes: tuple[str, ...]

    kind: ClassVar[str] = "recogniser"
    schema: ClassVar[str] = "lamella.muranet/1"
    shaped: ClassVar[tuple[str, ...]] = ("shape", "classes")
    made_by: ClassVar[str] = "lamella run muranet"

    @classmethod
    def build(cls, *, shape: RecogniserShape, classes: tuple[str, ...]) -> PlanNetwork:  # type: ignore[override]
        """Build a network with random weights.

        Args:
            shape: shape of the network.
            classes: names of the classes of openings.
        """
        if not classes:
            raise MethodError("openings have no class: give at least one")
        return shape.build(len(classes))

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Load the network from a folder, to an accelerator if there is one.

        Raises:
            CheckpointError: when there is none, or it is damaged.
        """
        found = super().read(path)
        found.model.to(accelerator())
        return found

    def changed(self, insert: Sequence[int] = (), split: int | None = None) -> Recogniser:
        """Return a copy with attention inserted after stages, and stages split off, that computes the same.

        Args:
            insert: indices of the stages.
            split: number of stages to share; unchanged if None.

        Raises:
            MethodError: for a stage that does not exist, already has attention, or is already split.
        """
        if repeated := sorted(set(insert) & set(self.shape.insert)):
            raise MethodError(f"stage {repeated[0]} has attention inserted already: give others")
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
