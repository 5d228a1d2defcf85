"""The result of training: a model that answers clicks, as a folder that is read back without running anything in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt

from lamella.errors import MethodError
from lamella.methods.agile3d.decoder import ClickDecoder
from lamella.methods.agile3d.modules import NANO, ClickSegmenter, SparseUNet, Widths
from lamella.methods.agile3d.pictures import PictureEncoder
from lamella.results import TrainedNetwork
from lamella.zoo import ZOO

ENCODERS: dict[str, Widths] = {"res16unet34c": Widths(), "nano": NANO}


@dataclass(frozen=True)
class Shape:
    """How large a model is.

    Attributes:
        encoder: a sparse U-Net, the paper's or one with 0.3 million parameters; or for pictures a public image network.
        voxel: side of a voxel, in metres; the paper's 0.05. In pictures, 4 x 4 pixels take its place.
        hidden: d, the width of queries and features; 128.
        heads: of each attention; 8.
        feedforward: F; 1024.
        layers: L, of the decoder; 3.
        background: B, learned queries for the background; 10.
        shared: let one layer run L times.

    Raises:
        MethodError: when the heads do not divide the width, or the width is odd.
    """

    encoder: Literal["res16unet34c", "nano", "efficientnet-lite0"] = "res16unet34c"
    voxel: Annotated[float, Gt(0), Lt(1000)] = 0.05
    hidden: Annotated[int, Ge(1), Le(4096)] = 128
    heads: Annotated[int, Ge(1), Le(64)] = 8
    feedforward: Annotated[int, Ge(1), Le(16384)] = 1024
    layers: Annotated[int, Ge(1), Le(64)] = 3
    background: Annotated[int, Ge(1), Le(1024)] = 10
    shared: bool = False

    def __post_init__(self) -> None:
        if self.hidden % 2 or (self.heads and self.hidden % self.heads):
            raise MethodError(f"hidden {self.hidden}: give an even multiple of the {self.heads} heads")

    @property
    def public(self) -> bool:
        """Whether its encoder has public weights, which are in the zoo."""
        return self.encoder not in ENCODERS

    def build(self, weights: Path | None = None, frozen: bool = False) -> ClickSegmenter:
        """A model of this shape with fresh weights.

        Args:
            weights: a file of those of a public encoder.
            frozen: train what stands above it alone.
        """
        sizes = (self.hidden, self.heads, self.feedforward, self.layers, self.background)
        encoder: SparseUNet | PictureEncoder
        if self.public:
            encoder = PictureEncoder(ZOO[self.encoder].architecture, weights=weights, frozen=frozen)
        else:
            encoder = SparseUNet(ENCODERS[self.encoder], self.voxel)
        return ClickSegmenter(encoder, ClickDecoder(encoder.dims, *sizes, shared=self.shared))


@dataclass(kw_only=True)
class Segmenter(TrainedNetwork):
    """A trained model for interactive segmentation.

    Attributes:
        shape: of it.
    """

    model: ClickSegmenter
    shape: Shape

    kind: ClassVar[str] = "segmenter"
    schema: ClassVar[str] = "lamella.agile3d/1"
    shaped: ClassVar[tuple[str, ...]] = ("shape",)
    made_by: ClassVar[str] = "lamella run agile3d"

    @classmethod
    def build(cls, *, shape: Shape) -> ClickSegmenter:  # type: ignore[override]
        return shape.build()
