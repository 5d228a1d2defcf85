"""Scenes of coloured shapes on a grid, and their pictures.

    1  .  .  ^  .      a scene has up to four things, each in a cell of its own: a shape in a colour, or a tile, behind
    2  O  .  .  .      which something may be. In pictures size, place within the cell, brightness and background
    3  .  .  [] .      differ a little from one to the next.
    4  .  .  .  +

The parts never meet: a scene belongs to one of them by what it shows, whatever the seed. Some colours of some shapes
are in the part ``novel`` alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from lamella.errors import CalibrationError

Part = Literal["calibration", "test", "novel"]
Image = npt.NDArray[np.uint8]  # [size, size, 3]

GRID = 4  # cells in a row, and rows
MOST = 4  # things in a scene
SIZE = 32  # pixels of a picture, the smallest in which shapes can be told apart
SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (220, 50, 50),
    "green": (60, 180, 75),
    "blue": (60, 90, 230),
    "yellow": (235, 215, 60),
    "purple": (170, 60, 200),
    "cyan": (60, 210, 220),
}
TILE, GREY = "tile", "grey"
NOVEL = {("cyan", "circle"), ("purple", "square"), ("yellow", "triangle"), ("green", "cross")}
FIFTH = 5  # one scene in so many is for testing
RADII = (0.34, 0.42)  # of shapes, in cells: a shape stays within its cell wherever it stands there


class Thing(NamedTuple):
    """One thing in its cell, rows and columns counted from 0."""

    shape: str
    colour: str
    row: int
    column: int


@dataclass(frozen=True)
class Scene:
    """Things, in the order in which one reads."""

    things: tuple[Thing, ...]

    @property
    def shapes(self) -> tuple[Thing, ...]:
        """What can be seen for what it is."""
        return tuple(each for each in self.things if each.shape != TILE)

    @property
    def hides(self) -> bool:
        """Whether something may be behind a tile."""
        return len(self.shapes) < len(self.things)

    @property
    def part(self) -> Part:
        """The part that it belongs to."""
        if any((each.colour, each.shape) in NOVEL for each in self.things):
            return "novel"
        said = ";".join(f"{shape} {colour} {row} {column}" for shape, colour, row, column in self.things)
        return "calibration" if hashlib.sha256(said.encode()).digest()[0] % FIFTH else "test"


def scenes(
    part: Part, seed: int | Sequence[int] = 0, things: tuple[int, int] = (1, MOST), tiles: bool = False
) -> Iterator[Scene]:
    """Scenes of one part, without end.

    Args:
        part: ``calibration``, which is also what models are trained on, ``test``, or ``novel``.
        seed: of what is drawn; one number or several.
        things: the fewest and the most in a scene.
        tiles: let one thing of every other scene be a tile.

    Raises:
        CalibrationError: for a part that there is not.
    """
    if part not in get_args(Part):
        raise CalibrationError(f"the shapes have no part '{part}': choose one of {', '.join(get_args(Part))}")
    drawn = np.random.default_rng([*([seed] if isinstance(seed, int) else seed), get_args(Part).index(part)])
    while True:
        scene = _scene(drawn, things, tiles)
        if scene.part == part:
            yield scene


def _scene(drawn: np.random.Generator, things: tuple[int, int], tiles: bool) -> Scene:
    count = int(drawn.integers(things[0], things[1] + 1))
    cells = np.sort(drawn.choice(GRID * GRID, count, replace=False)).tolist()
    found = [
        Thing(SHAPES[drawn.integers(len(SHAPES))], list(COLOURS)[drawn.integers(len(COLOURS))], *divmod(cell, GRID))
        for cell in cells
    ]
    if tiles and drawn.integers(2):
        place = int(drawn.integers(count))
        found[place] = found[place]._replace(shape=TILE, colour=GREY)
    return Scene(tuple(found))


def render(scene: Scene, size: int = SIZE, seed: int | Sequence[int] | None = None) -> Image:
    """The picture of a scene.

    Args:
        size: pixels on a side; of a vision tower with patches of 4, 32 make 64 tokens and 64 make 256.
        seed: of the looks; None: no accident in them.

    Raises:
        CalibrationError: for a size in which there are no shapes.
    """
    if size < SIZE or size % GRID:
        raise CalibrationError(f"pictures of {size} pixels: give a multiple of {GRID}, {SIZE} or more")
    drawn = None if seed is None else np.random.default_rng(seed)
    ground = 24.0 if drawn is None else drawn.uniform(0, 48)
    image = np.full((size, size, 3), ground)
    cell = size / GRID
    y, x = np.mgrid[:size, :size] + 0.5  # the middle of each pixel
    for thing in scene.things:
        radius, shift, light = (RADII[1], (0.0, 0.0), 1.0) if drawn is None else _look(drawn)
        shift = (0.0, 0.0) if thing.shape == TILE else shift  # which fills its cell
        middle = np.round(2 * cell * (np.array(thing[2:]) + 0.5 + shift)) / 2  # half pixels: shapes are even
        dy, dx = (y - middle[0]) / cell, (x - middle[1]) / cell  # in cells, from the middle of the thing
        if thing.shape == TILE:
            image[np.maximum(abs(dy), abs(dx)) < 0.5] = light * 130
        else:
            image[_covers(thing.shape, dy / radius, dx / radius)] = light * np.array(COLOURS[thing.colour])
    if drawn is not None:
        image += drawn.uniform(-6, 6, image.shape)
    return image.round().clip(0, 255).astype(np.uint8)


def _look(drawn: np.random.Generator) -> tuple[float, tuple[float, float], float]:
    """A radius, a shift that keeps the thing in its cell, and a brightness."""
    radius = drawn.uniform(*RADII)
    free = 0.5 - radius
    return radius, (drawn.uniform(-free, free), drawn.uniform(-free, free)), drawn.uniform(0.85, 1.0)


def _covers(shape: str, dy: npt.NDArray[np.float64], dx: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """The pixels of a shape, by how far they are from its middle, in radii."""
    across, along = np.minimum(abs(dy), abs(dx)), np.maximum(abs(dy), abs(dx))
    if shape == "circle":
        return abs(dy) ** 1.7 + abs(dx) ** 1.7 <= 1  # squared, some discs of 5 x 5 pixels would be squares
    if shape == "square":
        return along <= 0.9
    if shape == "cross":
        return (across <= 0.33) & (along <= 1)
    return (dy <= 0.85) & (abs(dx) <= (dy + 1) / 2)  # a triangle that stands
