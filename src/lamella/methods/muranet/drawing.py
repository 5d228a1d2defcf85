"""The vectors of a floor plan: rooms, walls between and around them, doors and windows in the walls.

All coordinates are in pixels of the plan. Rooms partition a footprint; a wall is on every stretch of an edge between
two rooms, or between a room and the outside; an opening is a rectangle as thick as its wall, so it lies inside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from itertools import pairwise
from math import ceil, floor
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Kind = Literal["door", "window"]
KINDS: tuple[Kind, ...] = ("door", "window")
OUTSIDE = -1
SMALLEST = 5  # a room's side is at least a fifth of the plan's
MARGIN = (0.06, 0.14)  # between footprint and border, as a fraction of the side
EXTERIOR, INTERIOR = (4, 7), (2, 5)  # thickness in pixels at a side of 128, without the upper end
DOOR, WINDOW = (9, 13), (9, 19)  # width in pixels at a side of 128, likewise
DOORS, WINDOWS, ENTRANCES = 0.75, 0.8, 0.1  # probability that a wall has one
AT = 128  # side in pixels to which the sizes above refer


@dataclass(frozen=True)
class Box:
    """A rectangle from (x0, y0) to (x1, y1)."""

    x0: float
    y0: float
    x1: float
    y1: float

    @property
    def width(self) -> float:
        """Its width in pixels."""
        return self.x1 - self.x0

    @property
    def height(self) -> float:
        """Its height in pixels."""
        return self.y1 - self.y0


@dataclass(frozen=True)
class Wall:
    """A straight wall.

    Attributes:
        box: its rectangle; its ends reach to the far side of the walls that it meets.
        rooms: indices of the two rooms on its sides; :data:`OUTSIDE` is none.
        across: whether it runs from left to right.
        span: where it starts and ends along its run, on the centre lines.
        centre: centre line across its run.
        thickness: thickness across its run.
    """

    box: Box
    rooms: tuple[int, int]
    across: bool
    span: tuple[float, float]
    centre: float
    thickness: float


@dataclass(frozen=True)
class WallOpening:
    """A door or a window.

    Attributes:
        kind: ``door`` or ``window``.
        box: its rectangle in the wall, without the swing of a door.
        across: whether its wall runs from left to right.
        hinge: the end at which a door turns: 0 or 1.
        side: the side to which a door opens: -1 up or left, 1 down or right.
    """

    kind: Kind
    box: Box
    across: bool
    hinge: int = 0
    side: int = 1


@dataclass(frozen=True)
class Drawing:
    """A plan as vectors.

    Attributes:
        side: width and height of the plan in pixels.
        rooms: the rooms; they touch along their edges, which are centre lines of walls.
        walls: the walls.
        openings: the doors and windows.
    """

    side: int
    rooms: tuple[Box, ...]
    walls: tuple[Wall, ...]
    openings: tuple[WallOpening, ...]

    def document(self) -> dict[str, Any]:
        """Return the drawing as JSON values."""
        return asdict(self)

    def svg(self) -> str:
        """Return the drawing as SVG: walls as filled rectangles, openings on top."""
        shapes = [rect(wall.box, "wall") for wall in self.walls]
        return document(self.side, self.side, shapes + [rect(each.box, each.kind) for each in self.openings])


STYLE = ".wall{fill:#334155}.door{fill:#ea580c}.window{fill:#0ea5e9}.other{fill:#16a34a}"


def document(width: float, height: float, shapes: Sequence[str]) -> str:
    """Return an SVG document of a plan, in the plan's pixels.

    Args:
        width: width of the plan in pixels.
        height: height of the plan in pixels.
        shapes: SVG elements, in the order of drawing.
    """
    size = f'width="{width:g}" height="{height:g}" viewBox="0 0 {width:g} {height:g}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{STYLE}</style>'
    return "\n".join([head, *shapes, "</svg>\n"])


def rect(box: Box, name: str) -> str:
    """Return a rectangle as an SVG element, whose class is its kind, or ``other``.

    Args:
        box: the rectangle in pixels.
        name: its kind, such as ``wall``.
    """
    known = name if name in ("wall", *KINDS) else "other"
    return (
        f'<rect class="{known}" data-kind="{escape(name)}" x="{box.x0:.2f}" y="{box.y0:.2f}" '
        f'width="{box.width:.2f}" height="{box.height:.2f}"/>'
    )


def polygon(corners: Sequence[Sequence[float]], name: str) -> str:
    """Return a polygon as an SVG element, whose class is its kind, or ``other``.

    Args:
        corners: x and y of its corners in pixels.
        name: its kind, such as ``door``.
    """
    known = name if name in ("wall", *KINDS) else "other"
    points = " ".join(f"{x:.2f},{y:.2f}" for x, y in corners)
    return f'<polygon class="{known}" data-kind="{escape(name)}" points="{points}"/>'


def draw(
    rng: np.random.Generator, side: int, *, corner: bool = False, reachable: bool = False, thin: float = 1.0
) -> Drawing:
    """Draw a random plan.

    Args:
        rng: random number generator.
        side: width and height of the plan in pixels.
        corner: omit a room at a corner, so that the outline has more than four corners.
        reachable: place doors so that every room can be reached.
        thin: factor on the thickness of all walls.
    """
    scale = side / AT
    low, high = (round(side * fraction) for fraction in MARGIN)
    x0, y0 = rng.integers(low, high + 1, 2)
    x1, y1 = side - rng.integers(low, high + 1, 2)
    rooms = _partition(rng, (int(x0), int(y0), int(x1), int(y1)), side // SMALLEST)
    if corner and len(rooms) > 3:
        at = [n for n, (a, b, c, d) in enumerate(rooms) if (a == x0 or c == x1) and (b == y0 or d == y1)]
        rooms.pop(at[int(rng.integers(len(at)))])
    outer = _thickness(rng, EXTERIOR, scale * thin)
    inner = _thickness(rng, INTERIOR, scale * thin)
    walls = tuple(_wall(edge, outer if OUTSIDE in edge.rooms else inner, outer) for edge in _edges(rooms))
    tree = _tree(rng, walls, len(rooms), scale) if reachable else set()
    openings = [each for index, wall in enumerate(walls) for each in _openings(rng, wall, scale, index in tree)]
    return Drawing(side, tuple(Box(*map(float, room)) for room in rooms), walls, tuple(openings))


Room = tuple[int, int, int, int]


def _partition(rng: np.random.Generator, whole: Room, smallest: int) -> list[Room]:
    """Split a rectangle recursively in two, until parts are small or a random choice stops."""
    x0, y0, x1, y1 = whole
    sides = np.array([x1 - x0, y1 - y0])
    wide = sides >= 2 * smallest
    if not wide.any() or (sides.max() < 3 * smallest and rng.random() < 0.25):
        return [whole]
    axis = int(np.argmax(sides)) if wide.all() and rng.random() < 0.7 else int(rng.choice(np.flatnonzero(wide)))
    at = int(rng.integers(smallest, sides[axis] - smallest + 1))
    halves: tuple[Room, Room] = ((x0, y0, x0 + at, y1), (x0 + at, y0, x1, y1))
    if axis == 1:
        halves = ((x0, y0, x1, y0 + at), (x0, y0 + at, x1, y1))
    return [part for half in halves for part in _partition(rng, half, smallest)]


@dataclass(frozen=True)
class _Edge:
    """A stretch between two rooms, on a centre line."""

    rooms: tuple[int, int]
    across: bool
    at: int
    start: int
    end: int


def _edges(rooms: Sequence[Room]) -> list[_Edge]:
    """Return all maximal stretches between two rooms, or a room and the outside."""
    found: list[_Edge] = []
    for across in (True, False):
        flat = [room if across else (room[1], room[0], room[3], room[2]) for room in rooms]
        ends = sorted({end for room in flat for end in (room[0], room[2])})
        for at in sorted({line for room in flat for line in (room[1], room[3])}):
            run: _Edge | None = None
            for start, end in pairwise(ends):
                above = _room_at(flat, start, end, lambda room, at=at: room[3] == at)
                below = _room_at(flat, start, end, lambda room, at=at: room[1] == at)
                if above == below:  # both outside, since a room does not touch itself
                    run = None
                elif run is not None and run.rooms == (above, below):
                    found[-1] = run = _Edge(run.rooms, across, at, run.start, end)
                else:
                    run = _Edge((above, below), across, at, start, end)
                    found.append(run)
    return found


def _room_at(rooms: Sequence[Room], start: int, end: int, touches: Any) -> int:
    return next((n for n, room in enumerate(rooms) if touches(room) and room[0] <= start and end <= room[2]), OUTSIDE)


def _thickness(rng: np.random.Generator, of: tuple[int, int], scale: float) -> float:
    return max(1.0, round(float(rng.integers(*of)) * scale))


def _wall(edge: _Edge, thickness: float, outer: float) -> Wall:
    reach = (outer if OUTSIDE in edge.rooms else thickness) / 2
    along, low = (floor(edge.start - reach), ceil(edge.end + reach)), floor(edge.at - thickness / 2)
    box = _box(edge.across, along, (low, low + thickness))  # of whole pixels
    return Wall(box, edge.rooms, edge.across, (edge.start, edge.end), low + thickness / 2, thickness)


def _box(across: bool, along: tuple[float, float], over: tuple[float, float]) -> Box:
    (a, b), (c, d) = along, over
    return Box(a, c, b, d) if across else Box(c, a, d, b)


def _tree(rng: np.random.Generator, walls: Sequence[Wall], rooms: int, scale: float) -> set[int]:
    """Return indices of walls whose doors connect all rooms: a random spanning tree."""
    group = list(range(rooms))
    chosen = set()
    for index in rng.permutation(len(walls)).tolist():
        a, b = walls[index].rooms
        if OUTSIDE not in (a, b) and group[a] != group[b] and _space_for(walls[index], 1, scale) >= DOOR[0] * scale:
            chosen.add(index)
            group = [group[a] if each == group[b] else each for each in group]
    return chosen


def _ends(wall: Wall, scale: float) -> float:
    """Return the length of a wall's run that stays free of openings because of adjoining walls."""
    return wall.thickness + 4 * scale


def _space_for(wall: Wall, openings: int, scale: float) -> float:
    """Return the maximum width of each opening of a wall."""
    return (wall.span[1] - wall.span[0] - _ends(wall, scale)) / openings - 2


def _openings(rng: np.random.Generator, wall: Wall, scale: float, must: bool) -> list[WallOpening]:
    """Draw random openings of a wall."""
    if OUTSIDE not in wall.rooms:
        return _place_openings(rng, wall, ["door"], scale) if must or rng.random() < DOORS else []
    kinds: list[Kind] = ["window"] if rng.random() < WINDOWS else []
    if kinds and _space_for(wall, 2, scale) > 1.5 * WINDOW[0] * scale and rng.random() < 0.5:
        kinds.append("window")
    if rng.random() < ENTRANCES:
        kinds.append("door")
    return _place_openings(rng, wall, kinds, scale)


def _place_openings(rng: np.random.Generator, wall: Wall, kinds: Sequence[Kind], scale: float) -> list[WallOpening]:
    """Place openings side by side, as many as fit."""
    while kinds and _space_for(wall, len(kinds), scale) < DOOR[0] * scale:
        kinds = kinds[:-1]
    ends = _ends(wall, scale) / 2
    slots = np.linspace(wall.span[0] + ends, wall.span[1] - ends, len(kinds) + 1)
    found = []
    for kind, start, end in zip(kinds, slots, slots[1:], strict=False):
        least, most = DOOR if kind == "door" else WINDOW
        widest = int(min((most - 1) * scale, end - start - 2))
        width = int(rng.integers(min(ceil(least * scale), widest), widest + 1))
        free = ceil(start + 0.5), int(end - 0.5) - width
        first = int(rng.integers(free[0], max(free) + 1))
        low = wall.centre - wall.thickness / 2
        box = _box(wall.across, (first, first + width), (low, low + wall.thickness))
        found.append(WallOpening(kind, box, wall.across, int(rng.integers(2)), int(rng.choice((-1, 1)))))
    return found


def covered(boxes: Sequence[Box], side: int, times: int = 1) -> NDArray[np.bool_]:
    """Mark the pixels whose centre is inside a rectangle [side * times, side * times].

    Args:
        boxes: rectangles in pixels of the plan.
        side: side of the plan in pixels.
        times: pixels of the mask per pixel of the plan.
    """
    found = np.zeros((side * times, side * times), bool)
    for box in boxes:  # a centre is at n + 0.5
        x0, y0, x1, y1 = (max(0, ceil(each * times - 0.5)) for each in (box.x0, box.y0, box.x1, box.y1))
        found[y0:y1, x0:x1] = True
    return found
