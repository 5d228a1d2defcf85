"""The vectors of a floor plan: rooms, walls between and around them, doors and windows in the walls.

Everything is in pixels of the plan. Rooms partition a footprint; a wall stands on every stretch of an edge between two
rooms, or between a room and the outside; an opening is a rectangle as thick as its wall, so it lies inside it.
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
MARGIN = (0.06, 0.14)  # between footprint and border, as a share of the side
EXTERIOR, INTERIOR = (4, 7), (2, 5)  # pixels of thickness at 128, the upper end left out
DOOR, WINDOW = (9, 13), (9, 19)  # pixels of width at 128, likewise
DOORS, WINDOWS, ENTRANCES = 0.75, 0.8, 0.1  # how often a wall has one
AT = 128  # pixels of a side that sizes are given for


@dataclass(frozen=True)
class Box:
    """A rectangle from (x0, y0) to (x1, y1)."""

    x0: float
    y0: float
    x1: float
    y1: float

    @property
    def width(self) -> float:
        return self.x1 - self.x0

    @property
    def height(self) -> float:
        return self.y1 - self.y0


@dataclass(frozen=True)
class Wall:
    """A straight wall.

    Attributes:
        box: what it covers; its ends reach to the far side of the walls that it meets.
        rooms: the two it stands between, by number; :data:`OUTSIDE` is none.
        across: whether it runs from left to right.
        span: where it begins and ends along its run, on the centre lines.
        centre: of its thickness.
        thickness: across its run.
    """

    box: Box
    rooms: tuple[int, int]
    across: bool
    span: tuple[float, float]
    centre: float
    thickness: float


@dataclass(frozen=True)
class Opening:
    """A door or a window.

    Attributes:
        kind: which.
        box: its rectangle in the wall, without the swing of a door.
        across: whether its wall runs from left to right.
        hinge: of a door, which end it turns at: 0 or 1.
        side: into which side it opens: -1 up or left, 1 down or right.
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
        side: pixels of its width and height.
        rooms: they touch along their edges, which are centre lines of walls.
        walls, openings: what stands there.
    """

    side: int
    rooms: tuple[Box, ...]
    walls: tuple[Wall, ...]
    openings: tuple[Opening, ...]

    def document(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    def svg(self) -> str:
        """The plan as SVG: walls as filled rectangles, openings over them."""
        shapes = [rect(wall.box, "wall") for wall in self.walls]
        return document(self.side, self.side, shapes + [rect(each.box, each.kind) for each in self.openings])


STYLE = ".wall{fill:#334155}.door{fill:#ea580c}.window{fill:#0ea5e9}.other{fill:#16a34a}"


def document(width: float, height: float, shapes: Sequence[str]) -> str:
    """An SVG of a plan, in its pixels."""
    size = f'width="{width:g}" height="{height:g}" viewBox="0 0 {width:g} {height:g}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{STYLE}</style>'
    return "\n".join([head, *shapes, "</svg>\n"])


def rect(box: Box, name: str) -> str:
    """A rectangle of SVG; of a class that is drawn in a colour of its own, or as another."""
    known = name if name in ("wall", *KINDS) else "other"
    return (
        f'<rect class="{known}" data-kind="{escape(name)}" x="{box.x0:.2f}" y="{box.y0:.2f}" '
        f'width="{box.width:.2f}" height="{box.height:.2f}"/>'
    )


def draw(
    drawn: np.random.Generator, side: int, *, corner: bool = False, reachable: bool = False, thin: float = 1.0
) -> Drawing:
    """A plan by chance.

    Args:
        drawn: the chance.
        side: pixels of the plan.
        corner: leave a room at a corner out, so that the outline has more than four.
        reachable: put doors so that every room can be walked to.
        thin: thickness of all walls, as a share of the usual.
    """
    scale = side / AT
    low, high = (round(side * share) for share in MARGIN)
    x0, y0 = drawn.integers(low, high + 1, 2)
    x1, y1 = side - drawn.integers(low, high + 1, 2)
    rooms = _parted(drawn, (int(x0), int(y0), int(x1), int(y1)), side // SMALLEST)
    if corner and len(rooms) > 3:
        at = [n for n, (a, b, c, d) in enumerate(rooms) if (a == x0 or c == x1) and (b == y0 or d == y1)]
        rooms.pop(at[int(drawn.integers(len(at)))])
    outer = _thickness(drawn, EXTERIOR, scale * thin)
    inner = _thickness(drawn, INTERIOR, scale * thin)
    walls = tuple(_wall(edge, outer if OUTSIDE in edge.rooms else inner, outer) for edge in _edges(rooms))
    tree = _tree(drawn, walls, len(rooms), scale) if reachable else set()
    openings = [each for place, wall in enumerate(walls) for each in _openings(drawn, wall, scale, place in tree)]
    return Drawing(side, tuple(Box(*map(float, room)) for room in rooms), walls, tuple(openings))


Room = tuple[int, int, int, int]


def _parted(drawn: np.random.Generator, whole: Room, smallest: int) -> list[Room]:
    """A rectangle cut in two, and each part again, until parts are small or chance leaves them whole."""
    x0, y0, x1, y1 = whole
    sides = np.array([x1 - x0, y1 - y0])
    wide = sides >= 2 * smallest
    if not wide.any() or (sides.max() < 3 * smallest and drawn.random() < 0.25):
        return [whole]
    axis = int(np.argmax(sides)) if wide.all() and drawn.random() < 0.7 else int(drawn.choice(np.flatnonzero(wide)))
    at = int(drawn.integers(smallest, sides[axis] - smallest + 1))
    halves: tuple[Room, Room] = ((x0, y0, x0 + at, y1), (x0 + at, y0, x1, y1))
    if axis == 1:
        halves = ((x0, y0, x1, y0 + at), (x0, y0 + at, x1, y1))
    return [part for half in halves for part in _parted(drawn, half, smallest)]


@dataclass(frozen=True)
class _Edge:
    """A stretch between two rooms, on a centre line."""

    rooms: tuple[int, int]
    across: bool
    at: int
    start: int
    end: int


def _edges(rooms: Sequence[Room]) -> list[_Edge]:
    """All stretches between two rooms, or a room and the outside, as long as they go."""
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


def _thickness(drawn: np.random.Generator, of: tuple[int, int], scale: float) -> float:
    return max(1.0, round(float(drawn.integers(*of)) * scale))


def _wall(edge: _Edge, thickness: float, outer: float) -> Wall:
    reach = (outer if OUTSIDE in edge.rooms else thickness) / 2
    along, low = (floor(edge.start - reach), ceil(edge.end + reach)), floor(edge.at - thickness / 2)
    box = _box(edge.across, along, (low, low + thickness))  # of whole pixels
    return Wall(box, edge.rooms, edge.across, (edge.start, edge.end), low + thickness / 2, thickness)


def _box(across: bool, along: tuple[float, float], over: tuple[float, float]) -> Box:
    (a, b), (c, d) = along, over
    return Box(a, c, b, d) if across else Box(c, a, d, b)


def _tree(drawn: np.random.Generator, walls: Sequence[Wall], rooms: int, scale: float) -> set[int]:
    """Walls whose doors join all rooms, by joining what is not joined yet, in an order of chance."""
    group = list(range(rooms))
    chosen = set()
    for place in drawn.permutation(len(walls)).tolist():
        a, b = walls[place].rooms
        if OUTSIDE not in (a, b) and group[a] != group[b] and _room_for(walls[place], 1, scale) >= DOOR[0] * scale:
            chosen.add(place)
            group = [group[a] if each == group[b] else each for each in group]
    return chosen


def _ends(wall: Wall, scale: float) -> float:
    """How much of a wall's run is left free of openings: what meets it there, and a little of it."""
    return wall.thickness + 4 * scale


def _room_for(wall: Wall, openings: int, scale: float) -> float:
    """How wide each of so many openings may be."""
    return (wall.span[1] - wall.span[0] - _ends(wall, scale)) / openings - 2


def _openings(drawn: np.random.Generator, wall: Wall, scale: float, must: bool) -> list[Opening]:
    """What is in a wall by chance."""
    if OUTSIDE not in wall.rooms:
        return _placed(drawn, wall, ["door"], scale) if must or drawn.random() < DOORS else []
    kinds: list[Kind] = ["window"] if drawn.random() < WINDOWS else []
    if kinds and _room_for(wall, 2, scale) > 1.5 * WINDOW[0] * scale and drawn.random() < 0.5:
        kinds.append("window")
    if drawn.random() < ENTRANCES:
        kinds.append("door")
    return _placed(drawn, wall, kinds, scale)


def _placed(drawn: np.random.Generator, wall: Wall, kinds: Sequence[Kind], scale: float) -> list[Opening]:
    """Openings side by side, as many as there is room for."""
    while kinds and _room_for(wall, len(kinds), scale) < DOOR[0] * scale:
        kinds = kinds[:-1]
    ends = _ends(wall, scale) / 2
    slots = np.linspace(wall.span[0] + ends, wall.span[1] - ends, len(kinds) + 1)
    found = []
    for kind, start, end in zip(kinds, slots, slots[1:], strict=False):
        least, most = DOOR if kind == "door" else WINDOW
        widest = int(min((most - 1) * scale, end - start - 2))
        width = int(drawn.integers(min(ceil(least * scale), widest), widest + 1))
        free = ceil(start + 0.5), int(end - 0.5) - width
        first = int(drawn.integers(free[0], max(free) + 1))
        low = wall.centre - wall.thickness / 2
        box = _box(wall.across, (first, first + width), (low, low + wall.thickness))
        found.append(Opening(kind, box, wall.across, int(drawn.integers(2)), int(drawn.choice((-1, 1)))))
    return found


def covered(boxes: Sequence[Box], side: int, times: int = 1) -> NDArray[np.bool_]:
    """Which pixels have their centre inside a rectangle [side * times, side * times].

    Args:
        boxes: in pixels of the plan.
        side: of the plan.
        times: pixels of the picture for one of the plan.
    """
    found = np.zeros((side * times, side * times), bool)
    for box in boxes:  # a centre is at n + 0.5
        x0, y0, x1, y1 = (max(0, ceil(each * times - 0.5)) for each in (box.x0, box.y0, box.x1, box.y1))
        found[y0:y1, x0:x1] = True
    return found
