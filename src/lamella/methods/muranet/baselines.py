"""Networks to compare with: a U-Net for walls and a YOLO-like detector for openings, each with an encoder of its own.

    unet    stages of max-pooling and two 3 x 3 convolutions; the decoder concatenates (Ronneberger et al., 2015)
    yolo    strided convolutions and Darknet's residual blocks (1 x 1, then 3 x 3), a feature pyramid, and coupled heads
            (Redmon and Farhadi, 2018)

Losses, and the assignment of cells to boxes, are those of MuraNet, so that only the networks differ.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from lamella.methods.muranet.encoder import BlockDesign, ConvBlock, EncoderWidths, PlanEncoder
from lamella.methods.muranet.modules import LEVELS, Detector, PlanNetwork, UNetDecoder


class NoBlocks(BlockDesign):
    """A design whose blocks do nothing."""

    def build(self, channels: int, scale: float = 0.0) -> nn.Module:  # type: ignore[override]
        """Return the identity."""
        return nn.Identity()


def unet(widths: EncoderWidths) -> PlanNetwork:
    """Build a U-Net with random weights, for walls alone.

    Args:
        widths: its channels; depths are not used.
    """
    stages: list[nn.Module] = [_double(3, widths.stem, widths.stride)]
    for before, after in pairwise((widths.stem, *widths.stages)):
        stages.append(nn.Sequential(nn.MaxPool2d(2), _double(before, after)))
    encoder = _chain(stages, widths)
    return PlanNetwork(encoder, UNetDecoder(encoder.channels, encoder.strides, NoBlocks()), None, [])


def _double(before: int, after: int, stride: int = 1) -> nn.Module:
    return nn.Sequential(ConvBlock(before, after, stride=stride, act=nn.ReLU), ConvBlock(after, after, act=nn.ReLU))


def yolo(widths: EncoderWidths, classes: int, finest: int) -> PlanNetwork:
    """Build a YOLO-like detector with random weights, for openings alone.

    Args:
        widths: its channels and depths.
        classes: number of classes of openings.
        finest: index of the first of the maps from which boxes are predicted.
    """
    stages: list[nn.Module] = [ConvBlock(3, widths.stem, stride=widths.stride, act=nn.LeakyReLU)]
    for (before, after), depth in zip(pairwise((widths.stem, *widths.stages)), widths.depths, strict=True):
        blocks = (DarknetBlock(after) for _ in range(depth))
        stages.append(nn.Sequential(ConvBlock(before, after, stride=2, act=nn.LeakyReLU), *blocks))
    encoder, levels = _chain(stages, widths), range(finest, finest + LEVELS)
    channels, strides = ([each[level] for level in levels] for each in (encoder.channels, encoder.strides))
    detector = Detector(channels, strides, widths.neck, classes, "coupled", "batch")
    return PlanNetwork(encoder, None, detector, levels)


def _chain(stages: list[nn.Module], widths: EncoderWidths) -> PlanEncoder:
    strides = [widths.stride * 2**index for index in range(len(stages))]
    return PlanEncoder(stages, [widths.stem, *widths.stages], strides)


class DarknetBlock(nn.Module):
    """A residual block of Darknet-53 on maps [B, C, H, W]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.convolutions = nn.Sequential(
            ConvBlock(channels, half, 1, act=nn.LeakyReLU), ConvBlock(half, channels, act=nn.LeakyReLU)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to x [B, C, H, W]."""
        found: Tensor = x + self.convolutions(x)
        return found
