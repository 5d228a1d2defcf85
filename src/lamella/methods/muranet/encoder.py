"""The encoder of both tasks: a chain of stages, from scratch or from a timm network, shared or split at some stage.

image -> stem -> stage 1 -> ... -> stage n           each stage returns a map, the input of the next one
                   |
                   `-> stage 2' -> ... -> stage n'    copies for the openings, from the split on
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import max_pool2d

from lamella.errors import MethodError, listed
from lamella.methods.muranet.attention import SCALE, Norm, Paths, RelationBlock, Variant, normed
from lamella.zoo import timm_features

LEAST_MAPS = 3


@dataclass(frozen=True)
class EncoderWidths:
    """Widths and depths of an encoder; the defaults are the paper's base.

    Attributes:
        stem: channels of the first map.
        stride: stride of the first map in pixels.
        stages: channels of each stage; each halves the resolution.
        depths: number of blocks of each stage.
        neck: channels of the feature pyramid of the detector.
        expand: expansion factor of feed-forward parts.
    """

    stem: int = 32
    stride: int = 2
    stages: tuple[int, ...] = (64, 128, 256, 512)
    depths: tuple[int, ...] = (2, 2, 4, 2)
    neck: int = 256
    expand: int = 4


ENCODERS = {
    "mura": EncoderWidths(),
    "mura-5": EncoderWidths(stages=(64, 128, 256, 512, 512), depths=(2, 2, 4, 2, 2)),
    "mura-6": EncoderWidths(stages=(64, 128, 256, 512, 512, 512), depths=(2, 2, 4, 2, 2, 2)),
    "nano": EncoderWidths(12, 1, (16, 24, 48, 64), (2, 2, 2, 2), neck=32, expand=2),
}


@dataclass(frozen=True)
class BlockDesign:
    """The design of a network's blocks; see :class:`RelationBlock` for the fields.

    Attributes:
        variant: kind of attention.
        scales: number of 3 x 3 paths.
        paths: chained or parallel paths.
        norm: batch or group norm.
        expand: expansion factor of the feed-forward part.
    """

    variant: Variant = "gate"
    scales: int = 3
    paths: Paths = "chained"
    norm: Norm = "batch"
    expand: int = 4

    def build(self, channels: int, scale: float = SCALE) -> RelationBlock:
        """Build a block with random weights.

        Args:
            channels: number of channels.
            scale: initial scale of the block's residual updates; at 0 it has no effect.
        """
        return RelationBlock(
            channels, self.variant, self.scales, self.paths, norm=self.norm, expand=self.expand, scale=scale
        )


class ConvBlock(nn.Module):
    """A convolution with a 1 x 1 or 3 x 3 kernel, a norm and an activation."""

    def __init__(
        self, before: int, after: int, side: int = 3, stride: int = 1, act: type[nn.Module] = nn.GELU,
        norm: Norm = "batch",
    ) -> None:  # fmt: skip
        super().__init__()
        self.conv = nn.Conv2d(before, after, side, stride, side // 2, bias=False)
        self.norm = normed(after, norm)
        self.act = act()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to x [B, C, H, W]."""
        found: Tensor = self.act(self.norm(self.conv(x)))
        return found


class PyramidPooling(nn.Module):
    """Spatial pyramid pooling: maxima over windows of 5, 9 and 13 pixels, concatenated with the map itself."""

    def __init__(self, channels: int, norm: Norm) -> None:
        super().__init__()
        self.mix = ConvBlock(4 * channels, channels, 1, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to x [B, C, H, W]."""
        found: Tensor = self.mix(torch.cat([x, *(max_pool2d(x, side, 1, side // 2) for side in (5, 9, 13))], 1))
        return found


class PlanEncoder(nn.Module):
    """A chain of stages whose maps both tasks use, with separate copies for the openings from some stage on.

    Args:
        stages: modules from one map to the next; the input of the first is images.
        channels: channels of each map.
        strides: strides of the maps in pixels.
        mean: mean of the colours in [0, 1] that the stages expect.
        spread: standard deviation of the colours that the stages expect.
        split: number of shared stages; all if None.

    Raises:
        MethodError: for stages that do not halve the resolution, or a split beyond the number of stages.
    """

    mean: Tensor
    spread: Tensor

    def __init__(
        self,
        stages: Sequence[nn.Module],
        channels: Sequence[int],
        strides: Sequence[int],
        mean: Sequence[float] = (0.5,) * 3,
        spread: Sequence[float] = (0.5,) * 3,
        split: int | None = None,
    ) -> None:
        super().__init__()
        if len(stages) < LEAST_MAPS or any(b != 2 * a for a, b in pairwise(strides)):
            raise MethodError(
                f"the encoder has maps at strides {listed(strides)}: give one whose stages halve the resolution, with "
                f"{LEAST_MAPS} or more"
            )
        self.channels, self.strides = tuple(channels), tuple(strides)
        self.stages = nn.ModuleList(stages)
        self.apart = nn.ModuleList()
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("spread", torch.tensor(spread).view(3, 1, 1))
        if split is not None:
            self.split(split)

    @property
    def shared(self) -> int:
        """The number of stages that both tasks share."""
        return len(self.stages) - len(self.apart)

    def split(self, shared: int) -> None:
        """Copy all stages after the first ``shared`` ones for the openings; the network's function does not change.

        Raises:
            MethodError: for a negative number, or more than are shared.
        """
        if not 0 <= shared <= self.shared:
            raise MethodError(f"split {shared}: {self.shared} stages are shared: give 0 to {self.shared}")
        self.apart = nn.ModuleList([*copy.deepcopy(self.stages[shared : self.shared]), *self.apart])

    def insert(self, after: Sequence[int], blocks: BlockDesign) -> None:
        """Insert blocks that have no effect at first after some stages, and after the copies of these stages.

        Args:
            after: indices of the stages.
            blocks: design of the blocks.

        Raises:
            MethodError: for an unknown or repeated stage.
        """
        wrong = [each for each in after if not 0 <= each < len(self.stages)]
        if wrong or len(set(after)) < len(after):
            raise MethodError(f"after {listed(after)}: give each stage once, from 0 to {len(self.stages) - 1}")
        for index in after:
            block = blocks.build(self.channels[index], scale=0.0)
            self.stages[index] = nn.Sequential(self.stages[index], block)
            if index >= self.shared:
                copy_of = self.apart[index - self.shared]
                self.apart[index - self.shared] = nn.Sequential(copy_of, copy.deepcopy(block))

    def forward(self, pixels: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return the maps for walls and those for openings, finest first, of uint8 images [B, 3, H, W]."""
        x = (pixels.to(self.mean.dtype) / 255 - self.mean) / self.spread
        shared: list[Tensor] = []
        for stage in self.stages[: self.shared]:
            x = stage(x)
            shared.append(x)
        return shared + _run_chain(self.stages[self.shared :], x), shared + _run_chain(self.apart, x)


def _run_chain(stages: nn.ModuleList, x: Tensor) -> list[Tensor]:
    maps = []
    for stage in stages:
        x = stage(x)
        maps.append(x)
    return maps


def mura(widths: EncoderWidths, blocks: BlockDesign, *, pooled: bool = False) -> PlanEncoder:
    """Build the paper's encoder: a stem, and stages of a strided convolution and residual blocks.

    Args:
        widths: its widths and depths.
        blocks: design of its blocks.
        pooled: spatial pyramid pooling after the last stage (``+spp``).
    """
    norm = blocks.norm
    stages: list[nn.Module] = [ConvBlock(3, widths.stem, stride=widths.stride, norm=norm)]
    before = widths.stem
    for channels, depth in zip(widths.stages, widths.depths, strict=True):
        halved = nn.Sequential(nn.Conv2d(before, channels, 3, 2, 1, bias=False), normed(channels, norm))
        stages.append(nn.Sequential(halved, *(blocks.build(channels) for _ in range(depth))))
        before = channels
    if pooled:
        stages[-1] = nn.Sequential(stages[-1], PyramidPooling(before, norm))
    strides = [widths.stride * 2**index for index in range(len(stages))]
    return PlanEncoder(stages, [widths.stem, *widths.stages], strides)


def of_timm(name: str, weights: Path | None = None) -> PlanEncoder:
    """Build an encoder from a timm network as a chain of stages; its maps are bitwise equal to the network's own.

    Args:
        name: name of the network in timm.
        weights: a safetensors file with the weights of the whole network or of its features; random weights if None.

    Raises:
        MethodError: for a network that timm does not have, or that is no chain of stages.
        CheckpointError: for weights of another network.
        LamellaError: when timm is missing.
    """
    try:
        backbone = timm_features(name, weights)
    except MethodError as error:
        raise MethodError(f"{error}, or one of {', '.join(ENCODERS)}") from None
    info = backbone.feature_info
    stages = _stages(backbone, info.module_name(), name)
    config = getattr(backbone, "pretrained_cfg", None) or getattr(backbone, "default_cfg", {})
    mean, spread = config.get("mean", (0.5,) * 3), config.get("std", (0.5,) * 3)
    encoder = PlanEncoder(stages, info.channels(), info.reduction(), mean, spread)
    if not encoder.mean.is_meta:
        _verify(encoder, backbone, name)
    return encoder


def _stages(backbone: nn.Module, ends: Sequence[str], name: str) -> list[nn.Module]:
    """Group the steps of a network in their order, so that each group ends with a feature map."""
    map_names = {end.replace(".", "_") for end in ends}
    steps: list[tuple[str, nn.Module]] = []
    for path, child in backbone.named_children():
        inner = any(end.startswith(f"{path}_") for end in map_names) and path not in map_names
        steps += [(f"{path}_{key}", step) for key, step in child.named_children()] if inner else [(path, child)]
    stages: list[nn.Module] = []
    group: list[nn.Module] = []
    for path, step in steps:
        group.append(step)
        if path.replace(".", "_") in map_names:
            stages.append(nn.Sequential(*group))
            group = []
    if len(stages) != len(ends):
        raise MethodError(f"{name} is no chain of stages: choose another network, such as resnet18 or convnext_atto")
    return stages


@torch.no_grad()
def _verify(encoder: PlanEncoder, backbone: nn.Module, name: str) -> None:
    """Check that the chain of stages computes the network's own maps.

    Raises:
        MethodError: when it does not.
    """
    side = 2 * encoder.strides[-1]
    modes = backbone.training
    pixels = torch.arange(3 * side * side, dtype=torch.float32).view(1, 3, side, side).sin()
    try:
        theirs = backbone.eval()(pixels)
        ours = _run_chain(encoder.eval().stages, pixels)
        same = all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    except (RuntimeError, ValueError, TypeError, AssertionError):
        same = False
    if not same:
        raise MethodError(f"{name} is no chain of stages: choose another network, such as resnet18 or convnext_atto")
    encoder.train(modes)
