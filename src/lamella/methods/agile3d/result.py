"""The result of training: a click segmenter, saved as a folder that is loaded without executing code from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Le, Lt

from lamella.errors import CheckpointError, MethodError, reason_of
from lamella.methods.agile3d.decoder import ClickDecoder
from lamella.methods.agile3d.images import ImageEncoder
from lamella.methods.agile3d.modules import NANO, ClickSegmenter, SparseUNet, UNetWidths
from lamella.methods.agile3d.published import read_published
from lamella.plan.filling import check_tensors, fill
from lamella.results import TrainedNetwork
from lamella.train import TrainingLog
from lamella.zoo import ZOO
from lamella.zoo.checks import check_pickle

ENCODERS: dict[str, UNetWidths] = {"res16unet34c": UNetWidths(), "nano": NANO}


@dataclass(frozen=True)
class SegmenterShape:
    """The size of a click segmenter.

    Attributes:
        encoder: ``res16unet34c``, the paper's sparse U-Net; ``nano``, one with 0.3 million parameters; or
            ``efficientnet-lite0``, a public image backbone for images.
        voxel: side of a voxel in metres; 0.05 in the paper. Not used for images, whose cells are 4 x 4 pixels.
        hidden: d, the hidden size of queries and features; 128 in the paper.
        heads: number of attention heads; 8 in the paper.
        feedforward: F, the intermediate size of the MLP; 1024 in the paper.
        layers: L, the number of decoder layers; 3 in the paper.
        background: B, the number of learned background queries; 10 in the paper.
        shared: run one decoder layer L times (weight sharing).

    Raises:
        MethodError: if the heads do not divide the hidden size, or it is odd.
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
        """Whether the encoder has public pretrained weights in the zoo."""
        return self.encoder not in ENCODERS

    def build(self, weights: Path | None = None, frozen: bool = False) -> ClickSegmenter:
        """Build a model of this shape with freshly initialised weights.

        Args:
            weights: file with the weights of a public encoder.
            frozen: train only the layers above it.
        """
        sizes = (self.hidden, self.heads, self.feedforward, self.layers, self.background)
        encoder: SparseUNet | ImageEncoder
        if self.public:
            encoder = ImageEncoder(ZOO[self.encoder].architecture, weights=weights, frozen=frozen)
        else:
            encoder = SparseUNet(ENCODERS[self.encoder], self.voxel)
        return ClickSegmenter(encoder, ClickDecoder(encoder.dims, *sizes, shared=self.shared))


@dataclass(kw_only=True)
class Segmenter(TrainedNetwork):
    """A trained model for interactive segmentation.

    Attributes:
        model: the network.
        shape: its size.
    """

    model: ClickSegmenter
    shape: SegmenterShape

    kind: ClassVar[str] = "segmenter"
    schema: ClassVar[str] = "lamella.agile3d/1"
    shaped: ClassVar[tuple[str, ...]] = ("shape",)
    made_by: ClassVar[str] = "lamella run agile3d"
    pickled: ClassVar[bool] = True

    @classmethod
    def build(cls, *, shape: SegmenterShape) -> ClickSegmenter:  # type: ignore[override]
        """Build the network of a shape."""
        return shape.build()

    @classmethod
    def read(cls, path: str | Path, *, allow_pickle: bool = False) -> Segmenter:
        """Read a folder that ``agile3d`` has written, or the weights that the paper's authors released.

        Args:
            path: the folder, or the released ``.pth`` file.
            allow_pickle: read the file, which is a pickle. Only its tensors and settings are read, and no code in it is
                run.

        Raises:
            CheckpointError: if there is none, or it is damaged, or it is a file and ``allow_pickle`` is false.
        """
        file = Path(path)
        if not file.is_file():
            return super().read(path)
        check_pickle(file, allow_pickle)
        try:
            fields, tensors = read_published(file)
            shape: SegmenterShape = cls._shaped({"schema": cls.schema, "shape": fields})["shape"]
            with torch.device("meta"):  # before memory is allocated
                check_tensors(shape.build(), {name: each.shape for name, each in tensors.items()}, "it")
            return cls(model=fill(shape.build(), tensors, "it").eval(), shape=shape, log=TrainingLog({}))
        except Exception as error:  # each part raises its own errors for a damaged file
            raise CheckpointError(
                f"{file}: no weights of AGILE3D ({reason_of(error)}): give the authors' file, or a folder that "
                f"`{cls.made_by}` has written"
            ) from None
