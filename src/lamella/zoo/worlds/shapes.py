"""Scenes of coloured shapes on a grid, and their images.

    1  .  .  ^  .      a scene has up to four objects, each in its own cell: a coloured shape, or a tile, which may
    2  O  .  .  .      hide something. In images, size, position within the cell, brightness and background vary
    3  .  .  [] .      slightly.
    4  .  .  .  +

The parts are disjoint: a scene belongs to one of them by its content, whatever the seed. Some combinations of colour
and shape occur only in the part ``novel``.
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

GRID = 4  # rows and columns
MOST = 4  # objects in a scene
SIZE = 32  # pixels of an image, the smallest size at which shapes can be distinguished
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
TEST_EVERY = 5  # one scene in this many is for testing
RADII = (0.34, 0.42)  # of shapes, in cells: a shape stays within its cell


class SceneObject(NamedTuple):
    """An object in its cell, rows and columns counted from 0."""

    shape: str
    colour: str
    row: int
    column: int


@dataclass(frozen=True)
class ShapeScene:
    """Objects in reading order."""

    objects: tuple[SceneObject, ...]

    @property
    def shapes(self) -> tuple[SceneObject, ...]:
        """The visible shapes."""
        return tuple(each for each in self.objects if each.shape != TILE)

    @property
    def hides(self) -> bool:
        """Whether a tile may hide something."""
        return len(self.shapes) < len(self.objects)

    @property
    def part(self) -> Part:
        """The part that it belongs to."""
        if any((each.colour, each.shape) in NOVEL for each in self.objects):
            return "novel"
        description = ";".join(f"{shape} {colour} {row} {column}" for shape, colour, row, column in self.objects)
        return "calibration" if hashlib.sha256(description.encode()).digest()[0] % TEST_EVERY else "test"


def scenes(
    part: Part, seed: int | Sequence[int] = 0, objects: tuple[int, int] = (1, MOST), tiles: bool = False
) -> Iterator[ShapeScene]:
    """Yield scenes of one part, without end.

    Args:
        part: ``calibration``, which is also used for training, ``test``, or ``novel``.
        seed: of the random draws; one number or several.
        objects: minimum and maximum number in a scene.
        tiles: let one object of every other scene be a tile.

    Raises:
        CalibrationError: for an unknown part.
    """
    if part not in get_args(Part):
        raise CalibrationError(f"the shapes have no part '{part}': choose one of {', '.join(get_args(Part))}")
    rng = np.random.default_rng([*([seed] if isinstance(seed, int) else seed), get_args(Part).index(part)])
    while True:
        scene = _scene(rng, objects, tiles)
        if scene.part == part:
            yield scene


def _scene(rng: np.random.Generator, objects: tuple[int, int], tiles: bool) -> ShapeScene:
    count = int(rng.integers(objects[0], objects[1] + 1))
    cells = np.sort(rng.choice(GRID * GRID, count, replace=False)).tolist()
    found = [
        SceneObject(SHAPES[rng.integers(len(SHAPES))], list(COLOURS)[rng.integers(len(COLOURS))], *divmod(cell, GRID))
        for cell in cells
    ]
    if tiles and rng.integers(2):
        index = int(rng.integers(count))
        found[index] = found[index]._replace(shape=TILE, colour=GREY)
    return ShapeScene(tuple(found))


def render(scene: ShapeScene, size: int = SIZE, seed: int | Sequence[int] | None = None) -> Image:
    """Return the image of a scene.

    Args:
        scene: the scene.
        size: image size in pixels; for a vision tower with patches of 4, 32 makes 64 tokens and 64 makes 256.
        seed: of the variations; None: without any.

    Raises:
        CalibrationError: for an unsupported size.
    """
    if size < SIZE or size % GRID:
        raise CalibrationError(f"images of {size} pixels: give a multiple of {GRID}, {SIZE} or more")
    rng = None if seed is None else np.random.default_rng(seed)
    ground = 24.0 if rng is None else rng.uniform(0, 48)
    image = np.full((size, size, 3), ground)
    cell = size / GRID
    y, x = np.mgrid[:size, :size] + 0.5  # the middle of each pixel
    for item in scene.objects:
        radius, shift, light = (RADII[1], (0.0, 0.0), 1.0) if rng is None else _look(rng)
        shift = (0.0, 0.0) if item.shape == TILE else shift  # tiles fill their cell
        middle = np.round(2 * cell * (np.array(item[2:]) + 0.5 + shift)) / 2  # half pixels: shapes are even
        dy, dx = (y - middle[0]) / cell, (x - middle[1]) / cell  # in cells, from the centre of the object
        if item.shape == TILE:
            image[np.maximum(abs(dy), abs(dx)) < 0.5] = light * 130
        else:
            image[_covers(item.shape, dy / radius, dx / radius)] = light * np.array(COLOURS[item.colour])
    if rng is not None:
        image += rng.uniform(-6, 6, image.shape)
    return image.round().clip(0, 255).astype(np.uint8)


def _look(rng: np.random.Generator) -> tuple[float, tuple[float, float], float]:
    """Return a radius, a shift that keeps the object in its cell, and a brightness."""
    radius = rng.uniform(*RADII)
    free = 0.5 - radius
    return radius, (rng.uniform(-free, free), rng.uniform(-free, free)), rng.uniform(0.85, 1.0)


def _covers(shape: str, dy: npt.NDArray[np.float64], dx: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Return the pixels of a shape, given the distances from its centre, in radii."""
    across, along = np.minimum(abs(dy), abs(dx)), np.maximum(abs(dy), abs(dx))
    if shape == "circle":
        return abs(dy) ** 1.7 + abs(dx) ** 1.7 <= 1  # with exponent 2, some discs of 5 x 5 pixels would be squares
    if shape == "square":
        return along <= 0.9
    if shape == "cross":
        return (across <= 0.33) & (along <= 1)
    return (dy <= 0.85) & (abs(dx) <= (dy + 1) / 2)  # an upright triangle
