"""Two decoders over one encoder: walls as pixels by a U-Net, openings as boxes by a pyramid with decoupled heads."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from lamella.errors import MethodError
from lamella.extras import require
from lamella.methods.muranet.attention import Norm
from lamella.methods.muranet.encoder import Blocks, Convolved, Encoder

Head = Literal["decoupled", "coupled"]
LEVELS = 3  # of the pyramid
PRIOR = 0.01  # of class and objectness, at first
LARGEST = 8.0  # of a raw width or height, whose exponential would overflow
DEEP = {4: 0.4, 8: 0.2}  # weights of deep supervision, by the stride of its map


class UNetDecoder(nn.Module):
    """From maps, finest first, to a logit for each pixel: doubled, joined with the next finer map, and convolved.

    Args:
        channels, strides: of the maps.
        blocks: a relation block of these stands behind each joining but the finest.
        deep: also give logits of coarser maps at strides 4 and 8.

    Attributes:
        weights: what the logits of each map count in training.
    """

    def __init__(self, channels: Sequence[int], strides: Sequence[int], blocks: Blocks, deep: bool = False) -> None:
        super().__init__()
        self.joins, self.further = nn.ModuleList(), nn.ModuleList()
        self.weights: tuple[float, ...] = ()
        norm, before = blocks.norm, channels[-1]
        for place in reversed(range(len(channels) - 1)):
            width = channels[place]
            convolved = [Convolved(before + width, width, norm=norm), Convolved(width, width, norm=norm)]
            self.joins.append(nn.Sequential(*convolved, *([blocks.build(width)] if place else [])))
            looked_at = deep and place > 0 and strides[place] in DEEP
            self.further.append(nn.Conv2d(width, 1, 1) if looked_at else nn.Identity())
            self.weights = (DEEP[strides[place]], *self.weights) if looked_at else self.weights
            before = width
        self.weights = (1.0, *self.weights)
        self.logit = nn.Conv2d(before, 1, 1)

    def forward(self, maps: Sequence[Tensor], size: tuple[int, int]) -> list[Tensor]:
        """Logits [B, height, width] of the picture's size; those of coarser maps behind them."""
        x, coarser = maps[-1], []
        for join, further, finer in zip(self.joins, self.further, reversed(maps[:-1]), strict=True):
            x = interpolate(x, size=finer.shape[-2:], mode="bilinear", align_corners=False)
            x = join(torch.cat([x, finer], 1))
            if isinstance(further, nn.Conv2d):
                coarser.append(further(x))
        logits = [self.logit(x), *reversed(coarser)]
        return [interpolate(each, size=size, mode="bilinear", align_corners=False)[:, 0] for each in logits]


@dataclass(frozen=True)
class Grid:
    """The cells of all levels behind one another.

    Attributes:
        corner: x and y of each, counted in cells [A, 2].
        stride: pixels of its side [A].
    """

    corner: Tensor
    stride: Tensor

    @classmethod
    def of(cls, sizes: Sequence[tuple[int, int]], strides: Sequence[int], device: torch.device) -> Grid:
        """Of levels so many cells high and wide."""
        corners, sides = [], []
        for (height, width), stride in zip(sizes, strides, strict=True):
            y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
            corners.append(torch.stack([x, y], -1).view(-1, 2))
            sides.append(torch.full((height * width,), stride))
        return cls(torch.cat(corners).float().to(device), torch.cat(sides).float().to(device))

    @property
    def centres(self) -> Tensor:
        """In pixels [A, 2]."""
        return (self.corner + 0.5) * self.stride[:, None]

    def decode(self, raw: Tensor) -> Tensor:
        """Boxes cx, cy, w, h in pixels [..., A, 4], of what a head says of each cell [..., A, 4 or more]."""
        xy = (raw[..., :2] + self.corner) * self.stride[:, None]
        wh = raw[..., 2:4].clamp(max=LARGEST).exp() * self.stride[:, None]
        return torch.cat([xy, wh], -1)

    def encode(self, boxes: Tensor) -> Tensor:
        """What a head should say [..., A, 4] of boxes [..., A, 4]."""
        xy = boxes[..., :2] / self.stride[:, None] - self.corner
        return torch.cat([xy, (boxes[..., 2:4] / self.stride[:, None]).log()], -1)


class LevelHead(nn.Module):
    """What is in each cell of a map: four numbers of a box, objectness, and classes [B, H W, 5 + classes].

    Args:
        width: of the map.
        classes: how many.
        head: ``decoupled``, with a tower for classes and one for boxes and objectness, or ``coupled``, one for all.
        norm: of convolutions.
    """

    def __init__(self, width: int, classes: int, head: Head, norm: Norm) -> None:
        super().__init__()
        self.stem = Convolved(width, width, 1, act=nn.SiLU, norm=norm)
        self.boxes = self._tower(width, norm)
        self.classes = self._tower(width, norm) if head == "decoupled" else None
        self.box, self.objectness = nn.Conv2d(width, 4, 1), nn.Conv2d(width, 1, 1)
        self.label = nn.Conv2d(width, classes, 1)
        for each in (self.objectness, self.label):
            assert each.bias is not None
            nn.init.constant_(each.bias, -math.log((1 - PRIOR) / PRIOR))

    @staticmethod
    def _tower(width: int, norm: Norm) -> nn.Module:
        return nn.Sequential(*(Convolved(width, width, act=nn.SiLU, norm=norm) for _ in range(2)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        boxes = self.boxes(x)
        classes = boxes if self.classes is None else self.classes(x)
        found = torch.cat([self.box(boxes), self.objectness(boxes), self.label(classes)], 1)
        return found.flatten(2).transpose(1, 2)


class Detector(nn.Module):
    """A feature pyramid and a head on each of its levels.

    Args:
        channels, strides: of the maps that it is made of, finest first.
        neck: channels of the pyramid.
        classes: of openings.
        head: of each level.
        norm: of convolutions.

    Raises:
        LamellaError: when torchvision is missing.
    """

    def __init__(
        self, channels: Sequence[int], strides: Sequence[int], neck: int, classes: int, head: Head, norm: Norm
    ) -> None:
        super().__init__()
        ops = require("torchvision.ops", "vision", "finding openings")
        self.strides = tuple(strides)
        self.pyramid = ops.FeaturePyramidNetwork(list(channels), neck)
        self.levels = nn.ModuleList(LevelHead(neck, classes, head, norm) for _ in channels)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, Grid]:
        """What is in each cell [B, A, 5 + classes], and where the cells are."""
        levels = list(self.pyramid(OrderedDict((str(n), each) for n, each in enumerate(maps))).values())
        sizes = [(each.shape[-2], each.shape[-1]) for each in levels]
        said = torch.cat([head(each) for head, each in zip(self.levels, levels, strict=True)], 1)
        return said, Grid.of(sizes, self.strides, said.device)


@dataclass(frozen=True)
class Seen:
    """What a network sees in pictures.

    Attributes:
        walls: logits [B, H, W], those of deep supervision behind the first; none without that task.
        cells: what is in each cell [B, A, 5 + classes]; None without that task.
        grid: of the cells.
    """

    walls: list[Tensor]
    cells: Tensor | None
    grid: Grid | None


class PlanNetwork(nn.Module):
    """One encoder, and a decoder for each task.

    Args:
        encoder: of both.
        walls: for the first task; None for a network of openings alone.
        openings: for the second, on the maps at ``levels``; None for a network of walls alone.
        levels: places of the maps that openings are found in.
    """

    def __init__(
        self, encoder: Encoder, walls: UNetDecoder | None, openings: Detector | None, levels: Sequence[int] = ()
    ) -> None:
        super().__init__()
        self.encoder, self.walls, self.openings, self.levels = encoder, walls, openings, tuple(levels)
        self.held: tuple[nn.Module, ...] = ()  # as they are, statistics too
        self.free: tuple[nn.Module, ...] = ()  # of what is inside these

    def hold(self, *parts: nn.Module, but: Sequence[nn.Module] = ()) -> None:
        """Let parts stay as they are while the rest trains, what batch norms have seen too.

        Args:
            parts: that stay.
            but: what trains all the same inside them.
        """
        self.held, self.free = parts, tuple(but)
        self.requires_grad_(True)
        for part in self.held:
            part.requires_grad_(False)
        for part in self.free:
            part.requires_grad_(True)
        self.train(self.training)

    def train(self, mode: bool = True) -> PlanNetwork:
        super().train(mode)
        for part in self.held:
            part.eval()
        for part in self.free:
            part.train(mode)
        return self

    def forward(self, pixels: Tensor) -> Seen:
        """What is seen in pictures [B, 3, H, W] of bytes, whose sides the coarsest stride divides.

        Raises:
            MethodError: for other sides.
        """
        height, width = pixels.shape[-2:]
        coarsest = self.encoder.strides[-1]
        if height % coarsest or width % coarsest:
            raise MethodError(f"{width} x {height} pixels: give sides that {coarsest} divides")
        maps, others = self.encoder(pixels)
        walls = [] if self.walls is None else self.walls(maps, (height, width))
        if self.openings is None:
            return Seen(walls, None, None)
        return Seen(walls, *self.openings([others[place] for place in self.levels]))
