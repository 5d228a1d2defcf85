"""Synthetic floor plans with ground truth: vectors first, and an image of them in one of several styles.

The image is drawn at four times the size and averaged. The ground truth comes from the vectors alone. Walls are solid,
grey with an outline, or two lines; rooms contain furniture and strokes that look like text; paper is tinted, and the
image is blurred and noisy. A grey threshold finds only part of the walls.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from lamella.errors import CalibrationError
from lamella.extras import require
from lamella.methods.muranet.drawing import KINDS, Box, Drawing, WallOpening, covered, draw
from lamella.methods.muranet.floor_plan import FloorPlan

Part = Literal["train", "test"]
Style = Literal["solid", "grey", "double"]
STYLES: tuple[Style, ...] = get_args(Style)
TIMES = 4  # supersampling factor per axis
LINE = 3  # thickness of a line in supersampled pixels
SMALLEST, LARGEST = 64, 4096
Pixels = NDArray[np.float32]


def floor_plans(
    part: Part = "train", seed: int = 0, side: int = 128, styles: Sequence[Style] = STYLES, **how: Any
) -> Iterator[FloorPlan]:
    """Infinite iterator of synthetic plans; the two splits have nothing in common.

    Args:
        part: the split.
        seed: random seed.
        side: side of the plans in pixels.
        styles: styles of walls, one of which is drawn for each plan.
        how: see :func:`synthetic_floor_plan`.
    """
    index = 0
    while True:
        rng = np.random.default_rng([seed, get_args(Part).index(part), index])
        name = f"plan-{part}-{index:05}"
        yield synthetic_floor_plan(rng, side, style=styles[int(rng.integers(len(styles)))], name=name, **how)
        index += 1


def synthetic_floor_plan(
    seed: int | np.random.Generator,
    side: int = 128,
    *,
    style: Style | None = None,
    corner: bool | None = None,
    reachable: bool = False,
    thin: float = 1.0,
    contrast: float = 1.0,
    tilt: float = 0.0,
    name: str = "the plan",
) -> FloorPlan:
    """Draw one plan: its image, walls with their openings, boxes of doors and windows, and the vectors.

    Args:
        seed: random seed; equal seeds give bitwise equal plans.
        side: side of the square image in pixels.
        style: style of the walls; random if None.
        corner: whether a room at a corner of the footprint is omitted; random if None.
        reachable: every room can be reached through doors.
        thin: factor on the thickness of walls, at most 1: thicker ones leave no space for doors.
        contrast: factor on the contrast of ink and paper.
        tilt: rotation about the centre in degrees. Boxes then enclose the rotated openings, and reach beyond the wall.
        name: name of the plan.

    Raises:
        CalibrationError: for a side too small for rooms, or a thickness out of range.
        LamellaError: when Pillow is missing.
    """
    if not SMALLEST <= side <= LARGEST:
        raise CalibrationError(f"side {side}: give {SMALLEST} to {LARGEST} pixels")
    if not 0 < thin <= 1:
        raise CalibrationError(f"thin {thin:g}: give a value above 0 and at most 1")
    rng = seed if isinstance(seed, np.random.Generator) else np.random.default_rng(seed)
    corner = bool(rng.random() < 0.3) if corner is None else corner
    drawing = draw(rng, side, corner=corner, reachable=reachable, thin=thin)
    chosen: Style = STYLES[int(rng.integers(len(STYLES)))] if style is None else style
    ink = _Ink(rng, drawing, chosen)
    walls = covered([wall.box for wall in drawing.walls], side, TIMES)
    image, mask = ink.image, _image(walls)
    if tilt:
        image = image.rotate(tilt, resample=2, fillcolor=255)  # bilinear
        mask = mask.rotate(tilt)
    pixels = ink.photograph(image, contrast)
    small = covered([wall.box for wall in drawing.walls], side) if not tilt else _downscale(mask, side)
    boxes = [[KINDS.index(each.kind), *_rotated_box(each.box, side, tilt)] for each in drawing.openings]
    truth = np.array(boxes, np.float32).reshape(-1, 5)
    return FloorPlan(name, pixels, small, truth, KINDS, drawing)


def _rotated_box(box: Box, side: int, tilt: float) -> tuple[float, float, float, float]:
    """Return (cx, cy, w, h) of the bounding box of a rectangle rotated anticlockwise about the centre of the plan."""
    angle = -np.deg2rad(tilt)  # y points down
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    corners = np.array([(x, y) for x in (box.x0, box.x1) for y in (box.y0, box.y1)]) - side / 2
    rotated = corners @ turn.T + side / 2
    (x0, y0), (x1, y1) = rotated.min(0), rotated.max(0)
    return float(x0 + x1) / 2, float(y0 + y1) / 2, float(x1 - x0), float(y1 - y0)


def _image(mask: NDArray[np.bool_]) -> Any:
    return require("PIL.Image", "vision", "drawing floor plans").fromarray(mask.astype(np.uint8) * 255)


def _downscale(mask: Any, side: int) -> NDArray[np.bool_]:
    """Downscale a mask to the size of the plan: pixels that are at least half covered."""
    found: NDArray[np.bool_] = np.asarray(mask.resize((side, side), 4)) >= 128  # by boxes
    return found


def _inner(mask: NDArray[np.bool_], by: int) -> NDArray[np.bool_]:
    """Erode a mask by ``by`` pixels."""
    for axis in (0, 1):
        eroded = mask.copy()
        for step in range(-by, by + 1):
            eroded &= np.roll(mask, step, axis)
        mask = eroded
    return mask


class _Ink:
    """The greyscale image of a drawing, :data:`TIMES` as large."""

    def __init__(self, rng: np.random.Generator, drawing: Drawing, style: Style) -> None:
        self.rng, self.side = rng, drawing.side
        walls = covered([wall.box for wall in drawing.walls], drawing.side, TIMES)
        solid = walls & ~covered([each.box for each in drawing.openings], drawing.side, TIMES)
        self.line = max(LINE, round(LINE * drawing.side / 256))
        inner = _inner(solid, self.line)
        filling = {"solid": 0, "grey": int(rng.integers(110, 190)), "double": 255}[style]
        grey = np.where(solid, np.where(inner, filling, 0), 255).astype(np.uint8)
        self.image = require("PIL.Image", "vision", "drawing floor plans").fromarray(grey)
        self.pen = require("PIL.ImageDraw", "vision", "drawing floor plans").Draw(self.image)
        for room in drawing.rooms:
            self._furnish(room)
        for each in drawing.openings:
            (self._door if each.kind == "door" else self._window)(each)

    def _stroke(self, *points: tuple[float, float], shade: int = 0) -> None:
        self.pen.line([(TIMES * x, TIMES * y) for x, y in points], fill=shade, width=self.line)

    def _furnish(self, room: Box) -> None:
        """Draw outlines of furniture, and strokes that look like text."""
        shade = int(self.rng.integers(0, 110))
        for _ in range(int(self.rng.integers(0, 3))):
            w, h = self.rng.uniform(0.12, 0.4, 2) * (room.width, room.height)
            x = self.rng.uniform(room.x0 + 0.15 * room.width, room.x1 - 0.15 * room.width - w)
            y = self.rng.uniform(room.y0 + 0.15 * room.height, room.y1 - 0.15 * room.height - h)
            corners = [TIMES * each for each in (x, y, x + w, y + h)]
            shape = self.pen.rectangle if self.rng.random() < 0.6 else self.pen.ellipse
            shape(corners, outline=shade, width=self.line)
        if self.rng.random() < 0.6:
            x, y = (room.x0 + room.x1) / 2, (room.y0 + room.y1) / 2
            for letter in range(int(self.rng.integers(3, 7))):
                position = x + (2.2 * letter - 6) * self.side / 128
                high = self.rng.uniform(1.5, 3) * self.side / 128
                lean = self.rng.uniform(-1, 1) * self.side / 128
                self._stroke((position, y), (position + lean, y - high), shade=shade)

    def _window(self, window: WallOpening) -> None:
        """Draw two or three lines along the wall."""
        box, count = window.box, int(self.rng.integers(2, 4))
        for fraction in np.linspace(0.1, 0.9, count):
            if window.across:
                y = box.y0 + fraction * box.height
                self._stroke((box.x0, y), (box.x1, y))
            else:
                x = box.x0 + fraction * box.width
                self._stroke((x, box.y0), (x, box.y1))

    def _door(self, door: WallOpening) -> None:
        """Draw an open leaf, and the quarter circle of its swing."""
        box = door.box
        start, end = (box.x0, box.x1) if door.across else (box.y0, box.y1)
        low, high = (box.y0, box.y1) if door.across else (box.x0, box.x1)
        hinge, jamb = (start, end) if door.hinge == 0 else (end, start)
        at, width = (low if door.side < 0 else high), end - start
        angle = np.linspace(0, np.pi / 2, 12)
        along = hinge + (jamb - hinge) * np.cos(angle)
        over = at + door.side * width * np.sin(angle)
        arc = [*zip(along.tolist(), over.tolist(), strict=True)]
        leaf = [(hinge, at), (hinge, at + door.side * width)]
        for line in (arc, leaf):
            self._stroke(*(line if door.across else [(y, x) for x, y in line]))

    def photograph(self, image: Any, contrast: float) -> NDArray[np.uint8]:
        """Return the image at its final size [side, side, 3]: blurred, in coloured ink on tinted paper, with noise."""
        blur = require("PIL.ImageFilter", "vision", "drawing floor plans").GaussianBlur
        image = image.filter(blur(self.rng.uniform(0, 0.5) * TIMES)).resize((self.side, self.side), 4)  # by boxes
        fraction = np.asarray(image, np.float32)[..., None] / 255
        paper, ink = self.rng.uniform(0.88, 1, 3), self.rng.uniform(0, 0.25) + self.rng.uniform(0, 0.05, 3)
        ink = paper + contrast * (ink - paper)
        pixels = fraction * paper + (1 - fraction) * ink
        pixels = pixels + self.rng.normal(0, self.rng.uniform(0, 0.04), pixels.shape)
        found: NDArray[np.uint8] = (255 * pixels.clip(0, 1)).round().astype(np.uint8)
        return found
