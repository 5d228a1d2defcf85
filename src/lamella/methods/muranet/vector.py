"""Vectorisation of predictions: walls as outlines, openings as rectangles in the nearest wall, at its angle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import theilslopes

from lamella.extras import require
from lamella.methods.muranet.drawing import Box, document, polygon

TOLERANCE = 0.3  # maximum error of a simplified outline in pixels
SMALLEST = 8.0  # area in pixels below which an outline is noise
FAR = 1.0  # maximum distance of a wall, in thicknesses of the opening
BEYOND = 3  # pixels beyond each end of an opening that are searched as well
WALL = 0.5  # probability from which a pixel is wall
STRAIGHT = 0.05  # slope of a wall below which it counts as parallel to an axis, about 3 degrees

Points = NDArray[np.float64]  # x, y [n, 2]


@dataclass(frozen=True)
class SnappedOpening:
    """An opening, snapped to its wall.

    Attributes:
        kind: its class.
        score: its score.
        box: its rectangle before it is rotated, as thick as the wall if there is one.
        across: whether it runs from left to right rather than from top to bottom.
        snapped: whether a wall was found.
        angle: rotation of the rectangle about its centre in degrees, clockwise on the page, from -45 to 45.
    """

    kind: str
    score: float
    box: Box
    across: bool
    snapped: bool
    angle: float = 0.0

    @property
    def corners(self) -> Points:
        """The corners of the rotated rectangle [4, 2]."""
        box, turn = self.box, np.deg2rad(self.angle)
        found = np.array([(box.x0, box.y0), (box.x1, box.y0), (box.x1, box.y1), (box.x0, box.y1)])
        middle = found.mean(0)
        return (found - middle) @ np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]]) + middle

    def as_dict(self) -> dict[str, Any]:
        """Return the opening as JSON values, with x, y, width and height as in COCO before the rotation."""
        sides = [self.box.x0, self.box.y0, self.box.width, self.box.height]
        bbox = [round(each, 2) for each in sides]
        found = {"kind": self.kind, "score": round(self.score, 4), "bbox": bbox, "snapped": self.snapped}
        return found | {"angle": round(self.angle, 2), "corners": self.corners.round(2).tolist()}


def outlines(walls: NDArray[np.float32]) -> list[Points]:
    """Return closed outlines of walls and of holes in them, in pixels from the corner of the plan.

    Args:
        walls: probability [height, width].

    Raises:
        LamellaError: when scikit-image is missing.
    """
    measure = require("skimage.measure", "vision", "outlines of walls")
    padded = np.pad(walls.astype(np.float64), 1)
    found = []
    for contour in measure.find_contours(padded, WALL):
        if abs(area(contour)) < SMALLEST:
            continue
        simple = measure.approximate_polygon(contour, TOLERANCE)
        found.append(simple[:-1, ::-1] - 0.5)  # row, column of centres with a rim, as x, y of corners
    return found


def area(points: Points) -> float:
    """Return the signed area of a closed outline; the sign is its orientation."""
    x, y = points.T
    return float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2


def snap(box: Box, kind: str, score: float, walls: NDArray[np.bool_] | None) -> SnappedOpening:
    """Snap an opening to the wall nearest to its axis, with the thickness and the angle of that wall.

    Its longer side runs along the wall. In each column of it, and slightly beyond its ends, the run of wall pixels
    nearest to its axis is found; the line through the middles of these runs, by the median of their slopes (Theil and
    Sen), is the axis of the wall, and their median length its thickness, measured across the columns.

    Args:
        box: rectangle that encloses the opening.
        kind: its class.
        score: its score.
        walls: mask of walls [height, width]; None if unknown.
    """
    across = box.width >= box.height
    if walls is None:
        return SnappedOpening(kind, score, box, across, False)
    mask = walls if across else walls.T
    start, end, low, high = (box.x0, box.x1, box.y0, box.y1) if across else (box.y0, box.y1, box.x0, box.x1)
    axis, thick = (low + high) / 2, high - low
    columns = range(max(0, int(start) - BEYOND), min(mask.shape[1], int(np.ceil(end)) + BEYOND))
    runs = {column: run for column in columns if (run := _nearest(mask[:, column], axis, FAR * thick)) is not None}
    if 2 * len(runs) < len(columns) or not runs:
        return SnappedOpening(kind, score, box, across, False)
    ends, at = np.array([*runs.values()]), np.array([*runs]) + 0.5
    slope = float(theilslopes(ends.mean(1), at).slope) if len(runs) > 1 else 0.0
    if abs(slope) <= STRAIGHT or abs(slope) > 1:
        first, last = np.median(ends, axis=0)
        found = Box(start, first, end, last) if across else Box(first, start, last, end)
        return SnappedOpening(kind, score, found, across, True)
    turn = np.arctan(slope)
    middle = (start + end) / 2
    centre = float(np.median(ends.mean(1) - slope * (at - middle)))
    half = float(np.median(ends[:, 1] - ends[:, 0])) * np.cos(turn) / 2  # of the thickness
    length = max((end - start - 2 * half * abs(np.sin(turn))) / np.cos(turn), 2 * half)
    along, over = (middle - length / 2, middle + length / 2), (centre - half, centre + half)
    found = Box(along[0], over[0], along[1], over[1]) if across else Box(over[0], along[0], over[1], along[1])
    return SnappedOpening(kind, score, found, across, True, float(np.rad2deg(turn if across else -turn)))


def _nearest(column: NDArray[np.bool_], axis: float, far: float) -> tuple[float, float] | None:
    """Return the start and end of the run of wall pixels whose centre is nearest, unless it is too far."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], column, [False]]).astype(np.int8)))
    runs = edges.reshape(-1, 2).astype(float)
    if not len(runs):
        return None
    away = np.abs(runs.mean(axis=1) - axis)
    best = int(away.argmin())
    return (runs[best, 0], runs[best, 1]) if away[best] <= max(far, 2.0) else None


def vector(
    walls: NDArray[np.float32] | None, openings: Sequence[SnappedOpening], size: tuple[int, int]
) -> tuple[str, dict[str, Any]]:
    """Return a plan as SVG and as JSON values.

    Args:
        walls: probability [height, width]; None if unknown.
        openings: the snapped openings.
        size: height and width of the plan.
    """
    height, width = size
    lines = [] if walls is None else outlines(walls)
    shapes = []
    if lines:
        steps = ("M" + "L".join(f"{x:.2f} {y:.2f}" for x, y in line) + "Z" for line in lines)
        shapes.append(f'<path class="wall" fill-rule="evenodd" d="{"".join(steps)}"/>')
    shapes += [polygon(each.corners.tolist(), each.kind) for each in openings]
    values = {
        "width": width,
        "height": height,
        "walls": [line.round(2).tolist() for line in lines],
        "openings": [each.as_dict() for each in openings],
    }
    return document(width, height, shapes), values
