"""Plans as a network reads them: one square size, boxes moved along, and what it finds moved back."""

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

PAPER = 255.0  # of what is beside a plan that keeps its shape
NONE = -1.0  # the class of a box that fills up a batch


@dataclass(frozen=True)
class Frame:
    """How a plan lies in the square that a network reads.

    Attributes:
        size: pixels of the square's side.
        width, height: of the plan, in pixels of the square; the rest is paper.
        across, down: pixels of the square for one of the plan.
    """

    size: int
    width: int
    height: int
    across: float
    down: float

    @classmethod
    def of(cls, plan: FloorPlan, size: int, letterbox: bool) -> Frame:
        """Of a plan, stretched to the square, or in its own shape with paper beside it."""
        height, width = plan.picture.shape[:2]
        if not letterbox:
            return cls(size, size, size, size / width, size / height)
        scale = size / max(height, width)
        across, down = max(1, round(width * scale)), max(1, round(height * scale))
        return cls(size, across, down, across / width, down / height)

    def placed(self, maps: Tensor, filling: float, mode: str) -> Tensor:
        """Maps of the plan [C, height, width] in the square [C, size, size]."""
        if maps.shape[-2:] == (self.size, self.size):
            return maps
        smooth: dict[str, Any] = {"align_corners": False, "antialias": True} if mode == "bilinear" else {}
        scaled = interpolate(maps[None], size=(self.height, self.width), mode=mode, **smooth)[0]
        square = maps.new_full((len(maps), self.size, self.size), filling)
        square[:, : self.height, : self.width] = scaled
        return square

    def row(self, plan: FloorPlan) -> dict[str, Tensor]:
        """A plan as a row to learn from: ``x`` [3, size, size] of bytes, ``walls`` [size, size], ``boxes`` [n, 5]."""
        assert plan.walls is not None and plan.boxes is not None
        walls = self.placed(torch.from_numpy(plan.walls)[None].float(), 0.0, "bilinear")[0] >= 0.5
        moved = torch.tensor([1.0, self.across, self.down, self.across, self.down])
        return {"x": self.pixels(plan), "walls": walls, "boxes": torch.from_numpy(plan.boxes) * moved}

    def pixels(self, plan: FloorPlan) -> Tensor:
        """The picture [3, size, size] of bytes."""
        picture = torch.from_numpy(np.ascontiguousarray(plan.picture)).permute(2, 0, 1).float()
        return self.placed(picture, PAPER, "bilinear").round().clamp(0, 255).byte()

    def back(self, maps: Tensor, plan: FloorPlan) -> Tensor:
        """A map of the square [size, size] at the size of the plan [height, width]."""
        height, width = plan.picture.shape[:2]
        if (height, width) == maps.shape:
            return maps
        cut = maps[None, None, : self.height, : self.width]
        return interpolate(cut, size=(height, width), mode="bilinear", align_corners=False)[0, 0]

    def boxes_back(self, boxes: Tensor, plan: FloorPlan) -> Tensor:
        """Boxes x0, y0, x1, y1 of the square [n, 4] in pixels of the plan, inside it."""
        height, width = plan.picture.shape[:2]
        found = boxes / boxes.new_tensor([self.across, self.down, self.across, self.down])
        return torch.minimum(found.clamp(min=0), found.new_tensor([width, height, width, height]))


@dataclass(frozen=True)
class Rows(Sequence[dict[str, Tensor]]):
    """Plans as rows to learn from, made when they are asked for."""

    plans: Sequence[FloorPlan]
    size: int
    letterbox: bool

    def __len__(self) -> int:
        return len(self.plans)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self[place] for place in range(len(self)))

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return Rows(self.plans[place], self.size, self.letterbox)
        plan = self.plans[place]
        return Frame.of(plan, self.size, self.letterbox).row(plan)


def together(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Rows as a batch: ``x`` [B, 3, S, S], ``walls`` [B, S, S], ``boxes`` [B, M, 5], the rest of class -1."""
    boxes = pad_sequence([row["boxes"] for row in rows], batch_first=True, padding_value=NONE)
    return {name: torch.stack([row[name] for row in rows]) for name in ("x", "walls")} | {"boxes": boxes}


def turned(x: Tensor, walls: Tensor, boxes: Tensor, flip: bool, quarters: int) -> tuple[Tensor, Tensor, Tensor]:
    """A square picture [3, S, S], its walls [S, S] and boxes [n, 5], mirrored and turned together.

    Args:
        flip: mirror from left to right, first.
        quarters: of a turn against the clock.
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


def coloured(x: Tensor, contrast: float, brightness: float) -> Tensor:
    """A picture of bytes with another contrast and brightness."""
    changed = (x.float() - 127.5) * contrast + 127.5 + 255 * brightness
    return changed.round().clamp(0, 255).byte()
