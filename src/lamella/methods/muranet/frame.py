"""Plans as network inputs: resized to a square with their boxes, and results mapped back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.nn.utils.rnn import pad_sequence

from lamella.methods.muranet.floor_plan import FloorPlan

PAPER = 255.0  # value of the padding beside a plan
NONE = -1.0  # class of padding boxes


@dataclass(frozen=True)
class Frame:
    """The position of a plan in the square network input.

    Attributes:
        size: side of the square in pixels.
        width: width of the plan in pixels of the square; the rest is padding.
        height: height of the plan in pixels of the square.
        across: horizontal pixels of the square per pixel of the plan.
        down: vertical pixels of the square per pixel of the plan.
    """

    size: int
    width: int
    height: int
    across: float
    down: float

    @classmethod
    def of(cls, plan: FloorPlan, size: int, letterbox: bool) -> Frame:
        """Return the frame of a plan, stretched to the square, or with its aspect ratio kept and padding.

        Args:
            plan: the plan.
            size: side of the square in pixels.
            letterbox: keep the aspect ratio, and pad at the bottom or on the right; otherwise the plan is stretched.
        """
        height, width = plan.image.shape[:2]
        if not letterbox:
            return cls(size, size, size, size / width, size / height)
        scale = size / max(height, width)
        across, down = max(1, round(width * scale)), max(1, round(height * scale))
        return cls(size, across, down, across / width, down / height)

    def resized(self, maps: Tensor, filling: float, mode: str) -> Tensor:
        """Resize maps of the plan into the square [C, size, size].

        Args:
            maps: the maps [C, height, width].
            filling: value of the padding.
            mode: interpolation mode of torch, such as ``bilinear``.
        """
        if maps.shape[-2:] == (self.size, self.size):
            return maps
        smooth: dict[str, Any] = {"align_corners": False, "antialias": True} if mode == "bilinear" else {}
        scaled = interpolate(maps[None], size=(self.height, self.width), mode=mode, **smooth)[0]
        square = maps.new_full((len(maps), self.size, self.size), filling)
        square[:, : self.height, : self.width] = scaled
        return square

    def row(self, plan: FloorPlan) -> dict[str, Tensor]:
        """Return a plan as a training row: ``x`` [3, size, size] uint8, ``walls`` [size, size], ``boxes`` [n, 5]."""
        assert plan.walls is not None and plan.boxes is not None
        walls = self.resized(torch.from_numpy(plan.walls)[None].float(), 0.0, "bilinear")[0] >= 0.5
        scale = torch.tensor([1.0, self.across, self.down, self.across, self.down])
        return {"x": self.pixels(plan), "walls": walls, "boxes": torch.from_numpy(plan.boxes) * scale}

    def pixels(self, plan: FloorPlan) -> Tensor:
        """Return the image as uint8 [3, size, size]."""
        image = torch.from_numpy(np.ascontiguousarray(plan.image)).permute(2, 0, 1).float()
        return self.resized(image, PAPER, "bilinear").round().clamp(0, 255).byte()

    def back(self, maps: Tensor, plan: FloorPlan) -> Tensor:
        """Resize a map of the square [size, size] to the size of the plan [height, width].

        Args:
            maps: the map [size, size].
            plan: the plan.
        """
        height, width = plan.image.shape[:2]
        if (height, width) == maps.shape:
            return maps
        cut = maps[None, None, : self.height, : self.width]
        return interpolate(cut, size=(height, width), mode="bilinear", align_corners=False)[0, 0]

    def boxes_back(self, boxes: Tensor, plan: FloorPlan) -> Tensor:
        """Map boxes from the square to pixels of the plan, clipped to it [n, 4].

        Args:
            boxes: boxes x0, y0, x1, y1 in pixels of the square [n, 4].
            plan: the plan.
        """
        height, width = plan.image.shape[:2]
        found = boxes / boxes.new_tensor([self.across, self.down, self.across, self.down])
        return torch.minimum(found.clamp(min=0), found.new_tensor([width, height, width, height]))


@dataclass(frozen=True)
class PlanRows(Sequence[dict[str, Tensor]]):
    """Plans as training rows, made on access.

    Attributes:
        plans: labelled plans.
        size: side of the square in pixels.
        letterbox: whether plans keep their aspect ratio.
    """

    plans: Sequence[FloorPlan]
    size: int
    letterbox: bool

    def __len__(self) -> int:
        return len(self.plans)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return PlanRows(self.plans[index], self.size, self.letterbox)
        plan = self.plans[index]
        return Frame.of(plan, self.size, self.letterbox).row(plan)


def collate(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Collate rows to a batch: ``x`` [B, 3, S, S], ``walls`` [B, S, S], ``boxes`` [B, M, 5], padded with class -1."""
    boxes = pad_sequence([row["boxes"] for row in rows], batch_first=True, padding_value=NONE)
    return {name: torch.stack([row[name] for row in rows]) for name in ("x", "walls")} | {"boxes": boxes}


def rotated(x: Tensor, walls: Tensor, boxes: Tensor, flip: bool, quarters: int) -> tuple[Tensor, Tensor, Tensor]:
    """Flip and rotate a square image [3, S, S], its walls [S, S] and boxes [n, 5] together.

    Args:
        x: the image.
        walls: mask of its walls.
        boxes: class, cx, cy, w, h.
        flip: mirror from left to right, first.
        quarters: number of quarter turns anticlockwise.
    """
    size, boxes = x.shape[-1], boxes.clone()
    real = boxes[:, 0] >= 0
    if flip:
        x, walls = x.flip(-1), walls.flip(-1)
        boxes[real, 1] = size - boxes[real, 1]
    for _ in range(quarters % 4):
        x, walls = torch.rot90(x, 1, (-2, -1)), torch.rot90(walls, 1, (-2, -1))
        k, cx, cy, w, h = boxes[real].unbind(1)
        boxes[real] = torch.stack([k, cy, size - cx, h, w], 1)
    return x, walls, boxes


def recoloured(x: Tensor, contrast: float, brightness: float) -> Tensor:
    """Change contrast and brightness of a uint8 image.

    Args:
        x: the image, of any shape.
        contrast: factor on the distance from mid-grey.
        brightness: value to add, as a fraction of 255.
    """
    changed = (x.float() - 127.5) * contrast + 127.5 + 255 * brightness
    return changed.round().clamp(0, 255).byte()
