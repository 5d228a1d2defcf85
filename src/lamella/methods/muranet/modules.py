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
from lamella.methods.muranet.encoder import BlockDesign, ConvBlock, PlanEncoder

Head = Literal["decoupled", "coupled"]
LEVELS = 3  # levels of the pyramid
PRIOR = 0.01  # initial probability of class and objectness
LARGEST = 8.0  # upper bound of a raw width or height, against overflow of the exponential
DEEP = {4: 0.4, 8: 0.2}  # weights of deep supervision, by the stride of its map
OVERFLOWS = "the network overflows there: train it again with a lower --lr, or with --clip-each"


class UNetDecoder(nn.Module):
    """Decode maps, finest first, to a logit per pixel: upsample, concatenate with the next finer map, and convolve.

    Args:
        channels: channels of the maps.
        strides: strides of the maps in pixels.
        blocks: design of the relation block after each concatenation but the finest.
        deep: also return logits of coarser maps at strides 4 and 8.

    Attributes:
        weights: loss weight of each returned map.
    """

    def __init__(
        self, channels: Sequence[int], strides: Sequence[int], blocks: BlockDesign, deep: bool = False
    ) -> None:
        super().__init__()
        self.joins, self.further = nn.ModuleList(), nn.ModuleList()
        self.weights: tuple[float, ...] = ()
        norm, before = blocks.norm, channels[-1]
        for index in reversed(range(len(channels) - 1)):
            width = channels[index]
            convolutions = [ConvBlock(before + width, width, norm=norm), ConvBlock(width, width, norm=norm)]
            self.joins.append(nn.Sequential(*convolutions, *([blocks.build(width)] if index else [])))
            supervised = deep and index > 0 and strides[index] in DEEP
            self.further.append(nn.Conv2d(width, 1, 1) if supervised else nn.Identity())
            self.weights = (DEEP[strides[index]], *self.weights) if supervised else self.weights
            before = width
        self.weights = (1.0, *self.weights)
        self.logit = nn.Conv2d(before, 1, 1)

    def forward(self, maps: Sequence[Tensor], size: tuple[int, int]) -> list[Tensor]:
        """Return logits at the size of the image [B, height, width], followed by those of coarser maps, resized to it.

        Args:
            maps: feature maps of the encoder [B, C, h, w], the finest first.
            size: height and width of the image in pixels.
        """
        x, coarser = maps[-1], []
        for join, further, finer in zip(self.joins, self.further, reversed(maps[:-1]), strict=True):
            x = interpolate(x, size=finer.shape[-2:], mode="bilinear", align_corners=False)
            x = join(torch.cat([x, finer], 1))
            if isinstance(further, nn.Conv2d):
                coarser.append(further(x))
        logits = [self.logit(x), *reversed(coarser)]
        return [interpolate(each, size=size, mode="bilinear", align_corners=False)[:, 0] for each in logits]


@dataclass(frozen=True)
class CellGrid:
    """The cells of all levels, concatenated.

    Attributes:
        corner: x and y of each cell, in cells [A, 2].
        stride: side of each cell in pixels [A].
    """

    corner: Tensor
    stride: Tensor

    @classmethod
    def of(cls, sizes: Sequence[tuple[int, int]], strides: Sequence[int], device: torch.device) -> CellGrid:
        """Return the grid of cells of all levels.

        Args:
            sizes: height and width of each level in cells.
            strides: side of a cell of each level in pixels.
            device: device of the tensors.
        """
        corners, sides = [], []
        for (height, width), stride in zip(sizes, strides, strict=True):
            y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
            corners.append(torch.stack([x, y], -1).view(-1, 2))
            sides.append(torch.full((height * width,), stride))
        return cls(torch.cat(corners).float().to(device), torch.cat(sides).float().to(device))

    @property
    def centres(self) -> Tensor:
        """Centres of the cells in pixels [A, 2]."""
        return (self.corner + 0.5) * self.stride[:, None]

    def decode(self, raw: Tensor) -> Tensor:
        """Return boxes cx, cy, w, h in pixels [..., A, 4] from raw predictions of each cell [..., A, 4 or more]."""
        xy = (raw[..., :2] + self.corner) * self.stride[:, None]
        wh = raw[..., 2:4].clamp(max=LARGEST).exp() * self.stride[:, None]
        return torch.cat([xy, wh], -1)

    def encode(self, boxes: Tensor) -> Tensor:
        """Return the raw predictions [..., A, 4] that decode to boxes [..., A, 4]."""
        xy = boxes[..., :2] / self.stride[:, None] - self.corner
        return torch.cat([xy, (boxes[..., 2:4] / self.stride[:, None]).log()], -1)


class LevelHead(nn.Module):
    """Predict for each cell of a map four box values, objectness, and classes [B, H W, 5 + classes].

    Args:
        width: channels of the map.
        classes: number of classes.
        head: ``decoupled``, with one tower for classes and one for boxes and objectness, or ``coupled``, one for all.
        norm: normalisation of convolutions.
    """

    def __init__(self, width: int, classes: int, head: Head, norm: Norm) -> None:
        super().__init__()
        self.stem = ConvBlock(width, width, 1, act=nn.SiLU, norm=norm)
        self.boxes = self._tower(width, norm)
        self.classes = self._tower(width, norm) if head == "decoupled" else None
        self.box, self.objectness = nn.Conv2d(width, 4, 1), nn.Conv2d(width, 1, 1)
        self.label = nn.Conv2d(width, classes, 1)
        for each in (self.objectness, self.label):
            assert each.bias is not None
            nn.init.constant_(each.bias, -math.log((1 - PRIOR) / PRIOR))

    @staticmethod
    def _tower(width: int, norm: Norm) -> nn.Module:
        return nn.Sequential(*(ConvBlock(width, width, act=nn.SiLU, norm=norm) for _ in range(2)))

    def forward(self, x: Tensor) -> Tensor:
        """Return the predictions of the cells of x [B, C, H, W]."""
        x = self.stem(x)
        boxes = self.boxes(x)
        classes = boxes if self.classes is None else self.classes(x)
        found = torch.cat([self.box(boxes), self.objectness(boxes), self.label(classes)], 1)
        return found.flatten(2).transpose(1, 2)


class Detector(nn.Module):
    """A feature pyramid with a head on each of its levels.

    Args:
        channels: channels of the input maps, finest first.
        strides: strides of the input maps in pixels.
        neck: channels of the pyramid.
        classes: number of classes of openings.
        head: kind of head of each level.
        norm: normalisation of convolutions.

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

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, CellGrid]:
        """Return the raw predictions of each cell [B, A, 5 + classes], and the grid of the cells."""
        levels = list(self.pyramid(OrderedDict((str(n), each) for n, each in enumerate(maps))).values())
        sizes = [(each.shape[-2], each.shape[-1]) for each in levels]
        cells = torch.cat([head(each) for head, each in zip(self.levels, levels, strict=True)], 1)
        return cells, CellGrid.of(sizes, self.strides, cells.device)


@dataclass(frozen=True)
class PlanOutput:
    """The output of a network for a batch of images.

    Attributes:
        walls: logits [B, H, W], followed by those of deep supervision; empty without that task.
        cells: raw predictions of each cell [B, A, 5 + classes]; None without that task.
        grid: the grid of the cells.
    """

    walls: list[Tensor]
    cells: Tensor | None
    grid: CellGrid | None


class PlanNetwork(nn.Module):
    """One encoder, and a decoder for each task.

    Args:
        encoder: encoder of both tasks.
        walls: decoder of the walls; None for a network of openings only.
        openings: decoder of the openings, on the maps at ``levels``; None for a network of walls only.
        levels: indices of the maps in which openings are detected.
    """

    def __init__(
        self, encoder: PlanEncoder, walls: UNetDecoder | None, openings: Detector | None, levels: Sequence[int] = ()
    ) -> None:
        super().__init__()
        self.encoder, self.walls, self.openings, self.levels = encoder, walls, openings, tuple(levels)
        self.frozen_parts: tuple[nn.Module, ...] = ()  # in evaluation mode and without gradients
        self.trained_parts: tuple[nn.Module, ...] = ()  # exceptions inside these

    def freeze(self, *parts: nn.Module, except_for: Sequence[nn.Module] = ()) -> None:
        """Freeze parts of the network, including their batch norm statistics.

        Args:
            parts: the modules to freeze.
            except_for: modules inside them that are trained nevertheless.
        """
        self.frozen_parts, self.trained_parts = parts, tuple(except_for)
        self.requires_grad_(True)
        for part in self.frozen_parts:
            part.requires_grad_(False)
        for part in self.trained_parts:
            part.requires_grad_(True)
        self.train(self.training)

    def train(self, mode: bool = True) -> PlanNetwork:
        """Set the mode; frozen parts stay in evaluation mode."""
        super().train(mode)
        for part in self.frozen_parts:
            part.eval()
        for part in self.trained_parts:
            part.train(mode)
        return self

    def forward(self, pixels: Tensor) -> PlanOutput:
        """Run the network on uint8 images [B, 3, H, W] whose sides are multiples of the coarsest stride.

        Raises:
            MethodError: for other sides.
        """
        height, width = pixels.shape[-2:]
        coarsest = self.encoder.strides[-1]
        if height % coarsest or width % coarsest:
            raise MethodError(f"{width} x {height} pixels: give sides that are multiples of {coarsest}")
        maps, others = self.encoder(pixels)
        walls = [] if self.walls is None else self.walls(maps, (height, width))
        if self.openings is None:
            return PlanOutput(walls, None, None)
        return PlanOutput(walls, *self.openings([others[index] for index in self.levels]))
