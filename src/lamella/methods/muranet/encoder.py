"""The encoder that both tasks read: a chain of stages, from scratch or a network of timm, shared or split on the way.

    picture -> stem -> stage 1 -> ... -> stage n         each gives a map, and the next one reads it
                           \\
                            -> stage 2' -> ... stage n'   copies for the openings, from where the tasks part
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
class Widths:
    """How wide and deep an encoder is; left out, the paper's base.

    Attributes:
        stem: channels of the first map.
        stride: pixels of the picture for one of the first map.
        stages: channels of each stage, each of half the resolution of the one before.
        depths: blocks of each.
        neck: channels of the pyramid that boxes are found in.
        expand: how many times as wide feed-forward parts are inside.
    """

    stem: int = 32
    stride: int = 2
    stages: tuple[int, ...] = (64, 128, 256, 512)
    depths: tuple[int, ...] = (2, 2, 4, 2)
    neck: int = 256
    expand: int = 4


ENCODERS = {
    "mura": Widths(),
    "mura-5": Widths(stages=(64, 128, 256, 512, 512), depths=(2, 2, 4, 2, 2)),
    "mura-6": Widths(stages=(64, 128, 256, 512, 512, 512), depths=(2, 2, 4, 2, 2, 2)),
    "nano": Widths(12, 1, (16, 24, 48, 64), (2, 2, 2, 2), neck=32, expand=2),
}


@dataclass(frozen=True)
class Blocks:
    """What the blocks of a network are made of; see :class:`RelationBlock`."""

    variant: Variant = "gate"
    scales: int = 3
    paths: Paths = "chained"
    norm: Norm = "batch"
    expand: int = 4

    def build(self, channels: int, scale: float = SCALE) -> RelationBlock:
        """One of them."""
        return RelationBlock(
            channels, self.variant, self.scales, self.paths, norm=self.norm, expand=self.expand, scale=scale
        )


class Convolved(nn.Module):
    """A convolution of 1 or 3 pixels a side, a norm and an activation."""

    def __init__(
        self, before: int, after: int, side: int = 3, stride: int = 1, act: type[nn.Module] = nn.GELU,
        norm: Norm = "batch",
    ) -> None:  # fmt: skip
        super().__init__()
        self.conv = nn.Conv2d(before, after, side, stride, side // 2, bias=False)
        self.norm = normed(after, norm)
        self.act = act()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.act(self.norm(self.conv(x)))
        return found


class Pooled(nn.Module):
    """Spatial pyramid pooling: the largest within 5, 9 and 13 pixels beside the map itself."""

    def __init__(self, channels: int, norm: Norm) -> None:
        super().__init__()
        self.mix = Convolved(4 * channels, channels, 1, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.mix(torch.cat([x, *(max_pool2d(x, side, 1, side // 2) for side in (5, 9, 13))], 1))
        return found


class Encoder(nn.Module):
    """Stages in a row, whose maps both tasks read, or each its own from a stage on.

    Args:
        stages: from a map to the next; the first reads pictures.
        channels, strides: of the map of each.
        mean, spread: of colours from 0 to 1, as the stages are used to them.
        split: how many stages are shared; all when left out.

    Raises:
        MethodError: for stages that do not halve the resolution, or more that are shared than there are.
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
        """How many stages both tasks read."""
        return len(self.stages) - len(self.apart)

    def split(self, shared: int) -> None:
        """Give openings copies of all stages but the first so many; what the network computes stays the same.

        Raises:
            MethodError: for fewer than none, or more than are shared.
        """
        if not 0 <= shared <= self.shared:
            raise MethodError(f"split {shared}: {self.shared} stages are shared, so give 0 to {self.shared}")
        self.apart = nn.ModuleList([*copy.deepcopy(self.stages[shared : self.shared]), *self.apart])

    def insert(self, after: Sequence[int], blocks: Blocks) -> None:
        """Put a block that changes nothing yet behind some stages, and behind their copies.

        Raises:
            MethodError: for a stage that there is not.
        """
        wrong = [each for each in after if not 0 <= each < len(self.stages)]
        if wrong or len(set(after)) < len(after):
            raise MethodError(f"after {listed(after)}: give each once, of 0 to {len(self.stages) - 1}")
        for place in after:
            block = blocks.build(self.channels[place], scale=0.0)
            self.stages[place] = nn.Sequential(self.stages[place], block)
            if place >= self.shared:
                copied = self.apart[place - self.shared]
                self.apart[place - self.shared] = nn.Sequential(copied, copy.deepcopy(block))

    def forward(self, pixels: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The maps for walls and those for openings, finest first, of pictures [B, 3, H, W] of bytes."""
        x = (pixels.to(self.mean.dtype) / 255 - self.mean) / self.spread
        shared: list[Tensor] = []
        for stage in self.stages[: self.shared]:
            x = stage(x)
            shared.append(x)
        return shared + _chained(self.stages[self.shared :], x), shared + _chained(self.apart, x)


def _chained(stages: nn.ModuleList, x: Tensor) -> list[Tensor]:
    maps = []
    for stage in stages:
        x = stage(x)
        maps.append(x)
    return maps


def mura(widths: Widths, blocks: Blocks, *, pooled: bool = False) -> Encoder:
    """The paper's encoder: a stem, and stages of a halving convolution and residual blocks each.

    Args:
        widths: of it.
        blocks: that it is made of.
        pooled: spatial pyramid pooling behind the last stage (``+spp``).
    """
    norm = blocks.norm
    stages: list[nn.Module] = [Convolved(3, widths.stem, stride=widths.stride, norm=norm)]
    before = widths.stem
    for channels, depth in zip(widths.stages, widths.depths, strict=True):
        halved = nn.Sequential(nn.Conv2d(before, channels, 3, 2, 1, bias=False), normed(channels, norm))
        stages.append(nn.Sequential(halved, *(blocks.build(channels) for _ in range(depth))))
        before = channels
    if pooled:
        stages[-1] = nn.Sequential(stages[-1], Pooled(before, norm))
    strides = [widths.stride * 2**place for place in range(len(stages))]
    return Encoder(stages, [widths.stem, *widths.stages], strides)


def of_timm(name: str, weights: Path | None = None) -> Encoder:
    """A network of timm as a chain of stages, which gives the same maps, to the bit.

    Args:
        name: of timm's.
        weights: a file of safetensors with them, of the whole network or of its features; fresh ones when left out.

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
    encoder = Encoder(stages, info.channels(), info.reduction(), mean, spread)
    if not encoder.mean.is_meta:
        _prove(encoder, backbone, name)
    return encoder


def _stages(backbone: nn.Module, ends: Sequence[str], name: str) -> list[nn.Module]:
    """The steps of a network in their order, cut behind each one that gives a map."""
    wanted = {end.replace(".", "_") for end in ends}
    steps: list[tuple[str, nn.Module]] = []
    for path, child in backbone.named_children():
        inner = any(end.startswith(f"{path}_") for end in wanted) and path not in wanted
        steps += [(f"{path}_{key}", step) for key, step in child.named_children()] if inner else [(path, child)]
    stages: list[nn.Module] = []
    here: list[nn.Module] = []
    for path, step in steps:
        here.append(step)
        if path.replace(".", "_") in wanted:
            stages.append(nn.Sequential(*here))
            here = []
    if len(stages) != len(ends):
        raise MethodError(f"{name} is no chain of stages: choose another network, such as resnet18 or convnext_atto")
    return stages


@torch.no_grad()
def _prove(encoder: Encoder, backbone: nn.Module, name: str) -> None:
    """Check that the chain gives what the network gives.

    Raises:
        MethodError: when it does not.
    """
    side = 2 * encoder.strides[-1]
    modes = backbone.training
    pixels = torch.arange(3 * side * side, dtype=torch.float32).view(1, 3, side, side).sin()
    try:
        theirs = backbone.eval()(pixels)
        ours = _chained(encoder.eval().stages, pixels)
        same = all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    except (RuntimeError, ValueError, TypeError, AssertionError):
        same = False
    if not same:
        raise MethodError(f"{name} is no chain of stages: choose another network, such as resnet18 or convnext_atto")
    encoder.train(modes)
