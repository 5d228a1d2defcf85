"""Floor plans whose truth is known: vectors first, and a picture of them in one of several styles.

The picture is drawn at four times the size and averaged. Truth comes from the vectors alone. Walls are solid, grey with
an outline, or two lines; furniture and strokes that look like text stand in the rooms; paper is tinted, and everything
is blurred and noisy. A threshold finds no more than some of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from lamella.errors import CalibrationError
from lamella.extras import require
from lamella.methods.muranet.drawing import KINDS, Box, Drawing, Opening, covered, draw
from lamella.methods.muranet.floor_plan import FloorPlan

Part = Literal["train", "test"]
Style = Literal["solid", "grey", "double"]
STYLES: tuple[Style, ...] = get_args(Style)
TIMES = 4  # pixels that are averaged to one, on a side
LINE = 3  # of these: how thick a line is
SMALLEST, LARGEST = 64, 4096
Picture = NDArray[np.float32]


def floor_plans(
    part: Part = "train", seed: int = 0, side: int = 128, styles: Sequence[Style] = STYLES, **how: Any
) -> Iterator[FloorPlan]:
    """Plans without end; those of the two parts have nothing in common.

    Args:
        part: which.
        seed: of the chance.
        side: pixels.
        styles: of walls, one drawn for each plan.
        how: see :func:`synthetic_floor_plan`.
    """
    number = 0
    while True:
        drawn = np.random.default_rng([seed, get_args(Part).index(part), number])
        name = f"plan-{part}-{number:05}"
        yield synthetic_floor_plan(drawn, side, style=styles[int(drawn.integers(len(styles)))], name=name, **how)
        number += 1


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
    """One plan: its picture, walls with their openings, boxes of doors and windows, and the vectors.

    Args:
        seed: the same gives the same bytes.
        side: pixels of the square picture.
        style: of the walls; drawn when left out.
        corner: whether a room at a corner of the footprint is left out; drawn when left out.
        reachable: every room can be walked to.
        thin: thickness of walls, as a share of the usual, at most 1: thicker ones leave no room for doors.
        contrast: of ink to paper, as a share of the usual.
        tilt: degrees by which everything is turned about the middle. Boxes then enclose the turned openings, and reach
            beyond the wall.
        name: of the plan.

    Raises:
        CalibrationError: for a side that holds no rooms, or a thickness out of range.
        LamellaError: when Pillow is missing.
    """
    if not SMALLEST <= side <= LARGEST:
        raise CalibrationError(f"side {side}: give {SMALLEST} to {LARGEST} pixels")
    if not 0 < thin <= 1:
        raise CalibrationError(f"thin {thin:g}: give a share above 0, and at most 1")
    drawn = seed if isinstance(seed, np.random.Generator) else np.random.default_rng(seed)
    corner = bool(drawn.random() < 0.3) if corner is None else corner
    drawing = draw(drawn, side, corner=corner, reachable=reachable, thin=thin)
    chosen: Style = STYLES[int(drawn.integers(len(STYLES)))] if style is None else style
    ink = _Ink(drawn, drawing, chosen)
    walls = covered([wall.box for wall in drawing.walls], side, TIMES)
    picture, mask = ink.image, _image(walls)
    if tilt:
        picture = picture.rotate(tilt, resample=2, fillcolor=255)  # bilinear
        mask = mask.rotate(tilt)
    pixels = ink.photographed(picture, contrast)
    small = covered([wall.box for wall in drawing.walls], side) if not tilt else _halved(mask, side)
    boxes = [[KINDS.index(each.kind), *_turned(each.box, side, tilt)] for each in drawing.openings]
    truth = np.array(boxes, np.float32).reshape(-1, 5)
    return FloorPlan(name, pixels, small, truth, KINDS, drawing)


def _turned(box: Box, side: int, tilt: float) -> tuple[float, float, float, float]:
    """(cx, cy, w, h) of what encloses a rectangle that is turned against the clock about the middle of the plan."""
    angle = -np.deg2rad(tilt)  # y points down
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    corners = np.array([(x, y) for x in (box.x0, box.x1) for y in (box.y0, box.y1)]) - side / 2
    moved = corners @ turn.T + side / 2
    (x0, y0), (x1, y1) = moved.min(0), moved.max(0)
    return float(x0 + x1) / 2, float(y0 + y1) / 2, float(x1 - x0), float(y1 - y0)


def _image(mask: NDArray[np.bool_]) -> Any:
    return require("PIL.Image", "vision", "drawing floor plans").fromarray(mask.astype(np.uint8) * 255)


def _halved(mask: Any, side: int) -> NDArray[np.bool_]:
    """A mask at the size of the plan: what is at least half covered."""
    found: NDArray[np.bool_] = np.asarray(mask.resize((side, side), 4)) >= 128  # by boxes
    return found


def _inner(mask: NDArray[np.bool_], by: int) -> NDArray[np.bool_]:
    """A mask without its rim of so many pixels."""
    for axis in (0, 1):
        shifted = [np.roll(mask, step, axis) for step in range(-by, by + 1)]
        mask = np.logical_and.reduce(shifted)
    return mask


class _Ink:
    """The picture of a drawing, grey, :data:`TIMES` as large."""

    def __init__(self, drawn: np.random.Generator, drawing: Drawing, style: Style) -> None:
        self.drawn, self.side = drawn, drawing.side
        walls = covered([wall.box for wall in drawing.walls], drawing.side, TIMES)
        solid = walls & ~covered([each.box for each in drawing.openings], drawing.side, TIMES)
        self.line = max(LINE, round(LINE * drawing.side / 256))
        inner = _inner(solid, self.line)
        filling = {"solid": 0, "grey": int(drawn.integers(110, 190)), "double": 255}[style]
        grey = np.where(solid, np.where(inner, filling, 0), 255).astype(np.uint8)
        self.image = require("PIL.Image", "vision", "drawing floor plans").fromarray(grey)
        self.pen = require("PIL.ImageDraw", "vision", "drawing floor plans").Draw(self.image)
        for room in drawing.rooms:
            self._furnished(room)
        for each in drawing.openings:
            (self._door if each.kind == "door" else self._window)(each)

    def _stroke(self, *points: tuple[float, float], shade: int = 0) -> None:
        self.pen.line([(TIMES * x, TIMES * y) for x, y in points], fill=shade, width=self.line)

    def _furnished(self, room: Box) -> None:
        """Outlines of furniture, and strokes that look like text."""
        shade = int(self.drawn.integers(0, 110))
        for _ in range(int(self.drawn.integers(0, 3))):
            w, h = self.drawn.uniform(0.12, 0.4, 2) * (room.width, room.height)
            x = self.drawn.uniform(room.x0 + 0.15 * room.width, room.x1 - 0.15 * room.width - w)
            y = self.drawn.uniform(room.y0 + 0.15 * room.height, room.y1 - 0.15 * room.height - h)
            corners = [TIMES * each for each in (x, y, x + w, y + h)]
            shape = self.pen.rectangle if self.drawn.random() < 0.6 else self.pen.ellipse
            shape(corners, outline=shade, width=self.line)
        if self.drawn.random() < 0.6:
            x, y = (room.x0 + room.x1) / 2, (room.y0 + room.y1) / 2
            for letter in range(int(self.drawn.integers(3, 7))):
                here = x + (2.2 * letter - 6) * self.side / 128
                high = self.drawn.uniform(1.5, 3) * self.side / 128
                lean = self.drawn.uniform(-1, 1) * self.side / 128
                self._stroke((here, y), (here + lean, y - high), shade=shade)

    def _window(self, window: Opening) -> None:
        """Two or three lines along the wall."""
        box, count = window.box, int(self.drawn.integers(2, 4))
        for share in np.linspace(0.1, 0.9, count):
            if window.across:
                y = box.y0 + share * box.height
                self._stroke((box.x0, y), (box.x1, y))
            else:
                x = box.x0 + share * box.width
                self._stroke((x, box.y0), (x, box.y1))

    def _door(self, door: Opening) -> None:
        """A leaf that stands open, and the quarter circle that it moves on."""
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

    def photographed(self, picture: Any, contrast: float) -> NDArray[np.uint8]:
        """The picture at its size [side, side, 3]: blurred, in coloured ink on tinted paper, with noise."""
        blur = require("PIL.ImageFilter", "vision", "drawing floor plans").GaussianBlur
        picture = picture.filter(blur(self.drawn.uniform(0, 0.5) * TIMES)).resize((self.side, self.side), 4)  # by boxes
        share = np.asarray(picture, np.float32)[..., None] / 255
        paper, ink = self.drawn.uniform(0.88, 1, 3), self.drawn.uniform(0, 0.25) + self.drawn.uniform(0, 0.05, 3)
        ink = paper + contrast * (ink - paper)
        pixels = share * paper + (1 - share) * ink
        pixels = pixels + self.drawn.normal(0, self.drawn.uniform(0, 0.04), pixels.shape)
        found: NDArray[np.uint8] = (255 * pixels.clip(0, 1)).round().astype(np.uint8)
        return found
