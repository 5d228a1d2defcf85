"""Synthetic rooms with ground truth: furniture on a floor, close together, in colours that do not separate objects."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from lamella.methods.agile3d.scene import ClickScene

Part = Literal["train", "test"]
Floats = NDArray[np.float64]

FLOOR, WALL = 4.0, 2.0  # metres: side of the square floor, height of the wall
FEWEST, MOST = 5, 9  # number of objects
NEAR = 0.6  # fraction of objects that stand near an earlier one, at a distance of:
DISTANCE = (0.5, 0.85)  # metres
PALETTE = 4  # number of colours in a room
COLOUR_NOISE, POSITION_NOISE = 0.08, 0.01  # standard deviations; the latter in metres
DENSITY = 550.0  # points per square metre
LEG = 0.06  # metres: thickness of table tops, seats and legs


def rooms(part: Part = "train", seed: int = 0) -> Iterator[ClickScene]:
    """Yield an infinite sequence of random rooms; the two splits are disjoint.

    Args:
        part: the split.
        seed: random seed.
    """
    number = 0
    while True:
        generator = np.random.default_rng([seed, get_args(Part).index(part), number])
        yield room(generator, f"room {number} of {part}")
        number += 1


def room(generator: np.random.Generator, name: str = "the room") -> ClickScene:
    """Generate a 4 x 4 m floor, a wall and five to nine objects, with points on all of their surfaces.

    Objects are boxes, cylinders, spheres, tables and chairs. All colours of a room come from a palette of four.

    Args:
        generator: random generator.
        name: name of the scene.
    """
    palette = generator.uniform(0.1, 0.9, (PALETTE, 3))
    middle = FLOOR / 2
    surfaces = [
        parallelogram(generator, (middle, middle, 0), (FLOOR, 0, 0), (0, FLOOR, 0)),
        parallelogram(generator, (middle, FLOOR, WALL / 2), (FLOOR, 0, 0), (0, 0, WALL)),
    ]
    positions: list[Floats] = []
    for _ in range(int(generator.integers(FEWEST, MOST + 1))):
        positions.append(_object_position(generator, positions))
        surfaces.append(_rotated(_furniture(generator), generator.uniform(0, 2 * np.pi)) + np.append(positions[-1], 0))
    coords = np.concatenate(surfaces)
    sizes = [len(each) for each in surfaces]
    colours = palette[generator.integers(PALETTE, size=len(surfaces))].repeat(sizes, axis=0)
    coords += generator.normal(0, POSITION_NOISE, coords.shape)
    colours += generator.normal(0, COLOUR_NOISE, colours.shape)
    objects = np.array([0, 0, *range(1, len(positions) + 1)]).repeat(sizes)
    return ClickScene(coords.astype(np.float32), colours.clip(0, 1).astype(np.float32), objects, name)


def _object_position(generator: np.random.Generator, positions: list[Floats]) -> Floats:
    """Choose the position of an object [2]: anywhere, or near an earlier one."""
    if not positions or generator.random() > NEAR:
        return generator.uniform(0.5, FLOOR - 0.5, 2)
    angle, distance = generator.uniform(0, 2 * np.pi), generator.uniform(*DISTANCE)
    near = positions[generator.integers(len(positions))] + distance * np.array([np.cos(angle), np.sin(angle)])
    return near.clip(0.4, FLOOR - 0.4)


def _furniture(generator: np.random.Generator) -> Floats:
    """Sample the surface of one random object that stands on the floor at the origin [points, 3]."""
    make = (_box, _cylinder, _sphere, _table, _chair)[generator.integers(5)]
    return make(generator)


def _box(generator: np.random.Generator) -> Floats:
    x, y, z = generator.uniform(0.3, 0.7, 3)
    return box(generator, (0, 0, z / 2), (x, y, z))


def _cylinder(generator: np.random.Generator) -> Floats:
    radius, height = generator.uniform(0.15, 0.3), generator.uniform(0.4, 1.0)
    angle = generator.uniform(0, 2 * np.pi, _points(2 * np.pi * radius * height))
    side = np.stack([radius * np.cos(angle), radius * np.sin(angle), generator.uniform(0, height, len(angle))], axis=1)
    angle = generator.uniform(0, 2 * np.pi, _points(np.pi * radius**2))
    r = radius * np.sqrt(generator.random(len(angle)))
    lid = np.stack([r * np.cos(angle), r * np.sin(angle), np.full(len(angle), height)], axis=1)
    return np.concatenate([side, lid])


def _sphere(generator: np.random.Generator) -> Floats:
    radius = generator.uniform(0.2, 0.35)
    directions = generator.normal(size=(_points(4 * np.pi * radius**2), 3))
    return radius * directions / np.linalg.norm(directions, axis=1, keepdims=True) + [0, 0, radius]


def _table(generator: np.random.Generator) -> Floats:
    (x, y), height = generator.uniform(0.5, 0.9, 2), generator.uniform(0.5, 0.75)
    return np.concatenate([box(generator, (0, 0, height), (x, y, LEG)), *_legs(generator, x, y, height)])


def _chair(generator: np.random.Generator) -> Floats:
    side, seat, back = generator.uniform(0.35, 0.5), generator.uniform(0.35, 0.5), generator.uniform(0.35, 0.5)
    seated = box(generator, (0, 0, seat), (side, side, LEG))
    behind = box(generator, (0, side / 2, seat + back / 2), (side, LEG, back))
    return np.concatenate([seated, behind, *_legs(generator, side, side, seat)])


def _legs(generator: np.random.Generator, x: float, y: float, height: float) -> list[Floats]:
    corners = [(a * (x - LEG) / 2, b * (y - LEG) / 2) for a in (-1, 1) for b in (-1, 1)]
    return [box(generator, (a, b, height / 2), (LEG, LEG, height)) for a, b in corners]


def box(
    generator: np.random.Generator, centre: tuple[float, float, float], sides: tuple[float, float, float]
) -> Floats:
    """Sample points on the six faces of a box [points, 3].

    Args:
        generator: random generator.
        centre: centre of the box.
        sides: edge lengths in metres.
    """
    edges = np.diag(sides)
    faces = []
    for axis in range(3):
        first, second = edges[(axis + 1) % 3], edges[(axis + 2) % 3]
        faces += [parallelogram(generator, centre + side * edges[axis] / 2, first, second) for side in (-1, 1)]
    return np.concatenate(faces)


def parallelogram(generator: np.random.Generator, centre: object, first: object, second: object) -> Floats:
    """Sample points on a parallelogram [points, 3].

    Args:
        generator: random generator.
        centre: its centre [3].
        first: one side as a vector [3].
        second: the other side as a vector [3].
    """
    a, b = np.asarray(first, float), np.asarray(second, float)
    u, v = generator.uniform(-0.5, 0.5, (2, _points(float(np.linalg.norm(np.cross(a, b)))), 1))
    return np.asarray(centre, float) + u * a + v * b


def _points(area: float) -> int:
    return max(1, round(DENSITY * area))


def _rotated(points: Floats, angle: float) -> Floats:
    """Rotate points about the z axis."""
    c, s = np.cos(angle), np.sin(angle)
    return points @ np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]])
