"""Rooms whose truth is known: furniture on a floor, close together, in colours that do not tell it apart."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from lamella.methods.agile3d.scene import Scene

Part = Literal["train", "test"]
Floats = NDArray[np.float64]

FLOOR, WALL = 4.0, 2.0  # metres: sides of the floor, height of the wall
FEWEST, MOST = 5, 9  # objects
NEAR = 0.6  # the share of objects that stand near an earlier one, at a distance of:
DISTANCE = (0.5, 0.85)  # metres
PALETTE = 4  # colours of a room
COLOUR_NOISE, POSITION_NOISE = 0.08, 0.01  # standard deviations, the latter in metres
DENSITY = 550.0  # points on a square metre
LEG = 0.06  # metres: thickness


def rooms(part: Part = "train", seed: int = 0) -> Iterator[Scene]:
    """Rooms without end; those of the two parts have nothing in common."""
    number = 0
    while True:
        drawn = np.random.default_rng([seed, get_args(Part).index(part), number])
        yield room(drawn, f"room {number} of {part}")
        number += 1


def room(drawn: np.random.Generator, name: str = "the room") -> Scene:
    """A floor of 4 x 4 m, a wall, and five to nine objects on it, as a scanner would see all of their surfaces.

    Objects are boxes, cylinders, spheres, tables and chairs. Colours come from four for the whole room.
    """
    palette = drawn.uniform(0.1, 0.9, (PALETTE, 3))
    middle = FLOOR / 2
    surfaces = [
        sheet(drawn, (middle, middle, 0), (FLOOR, 0, 0), (0, FLOOR, 0)),
        sheet(drawn, (middle, FLOOR, WALL / 2), (FLOOR, 0, 0), (0, 0, WALL)),
    ]
    places: list[Floats] = []
    for _ in range(int(drawn.integers(FEWEST, MOST + 1))):
        places.append(_place(drawn, places))
        surfaces.append(_turned(_furniture(drawn), drawn.uniform(0, 2 * np.pi)) + np.append(places[-1], 0))
    coords = np.concatenate(surfaces)
    sizes = [len(each) for each in surfaces]
    colours = palette[drawn.integers(PALETTE, size=len(surfaces))].repeat(sizes, axis=0)
    coords += drawn.normal(0, POSITION_NOISE, coords.shape)
    colours += drawn.normal(0, COLOUR_NOISE, colours.shape)
    objects = np.array([0, 0, *range(1, len(places) + 1)]).repeat(sizes)
    return Scene(coords.astype(np.float32), colours.clip(0, 1).astype(np.float32), objects, name)


def _place(drawn: np.random.Generator, places: list[Floats]) -> Floats:
    """Where an object stands [2]: anywhere, or near an earlier one."""
    if not places or drawn.random() > NEAR:
        return drawn.uniform(0.5, FLOOR - 0.5, 2)
    angle, distance = drawn.uniform(0, 2 * np.pi), drawn.uniform(*DISTANCE)
    near = places[drawn.integers(len(places))] + distance * np.array([np.cos(angle), np.sin(angle)])
    return near.clip(0.4, FLOOR - 0.4)


def _furniture(drawn: np.random.Generator) -> Floats:
    """The surface of one object that stands on the floor around the origin [points, 3]."""
    make = (_box, _cylinder, _sphere, _table, _chair)[drawn.integers(5)]
    return make(drawn)


def _box(drawn: np.random.Generator) -> Floats:
    x, y, z = drawn.uniform(0.3, 0.7, 3)
    return box(drawn, (0, 0, z / 2), (x, y, z))


def _cylinder(drawn: np.random.Generator) -> Floats:
    radius, height = drawn.uniform(0.15, 0.3), drawn.uniform(0.4, 1.0)
    angle = drawn.uniform(0, 2 * np.pi, _points(2 * np.pi * radius * height))
    side = np.stack([radius * np.cos(angle), radius * np.sin(angle), drawn.uniform(0, height, len(angle))], axis=1)
    angle = drawn.uniform(0, 2 * np.pi, _points(np.pi * radius**2))
    r = radius * np.sqrt(drawn.random(len(angle)))
    lid = np.stack([r * np.cos(angle), r * np.sin(angle), np.full(len(angle), height)], axis=1)
    return np.concatenate([side, lid])


def _sphere(drawn: np.random.Generator) -> Floats:
    radius = drawn.uniform(0.2, 0.35)
    directions = drawn.normal(size=(_points(4 * np.pi * radius**2), 3))
    return radius * directions / np.linalg.norm(directions, axis=1, keepdims=True) + [0, 0, radius]


def _table(drawn: np.random.Generator) -> Floats:
    (x, y), height = drawn.uniform(0.5, 0.9, 2), drawn.uniform(0.5, 0.75)
    return np.concatenate([box(drawn, (0, 0, height), (x, y, LEG)), *_legs(drawn, x, y, height)])


def _chair(drawn: np.random.Generator) -> Floats:
    side, seat, back = drawn.uniform(0.35, 0.5), drawn.uniform(0.35, 0.5), drawn.uniform(0.35, 0.5)
    seated = box(drawn, (0, 0, seat), (side, side, LEG))
    behind = box(drawn, (0, side / 2, seat + back / 2), (side, LEG, back))
    return np.concatenate([seated, behind, *_legs(drawn, side, side, seat)])


def _legs(drawn: np.random.Generator, x: float, y: float, height: float) -> list[Floats]:
    corners = [(a * (x - LEG) / 2, b * (y - LEG) / 2) for a in (-1, 1) for b in (-1, 1)]
    return [box(drawn, (a, b, height / 2), (LEG, LEG, height)) for a, b in corners]


def box(drawn: np.random.Generator, centre: tuple[float, float, float], sides: tuple[float, float, float]) -> Floats:
    """Points on the six faces of a box [points, 3]."""
    edges = np.diag(sides)
    faces = []
    for axis in range(3):
        first, second = edges[(axis + 1) % 3], edges[(axis + 2) % 3]
        faces += [sheet(drawn, centre + side * edges[axis] / 2, first, second) for side in (-1, 1)]
    return np.concatenate(faces)


def sheet(drawn: np.random.Generator, centre: object, first: object, second: object) -> Floats:
    """Points on a parallelogram around a centre [points, 3], given by two sides."""
    a, b = np.asarray(first, float), np.asarray(second, float)
    u, v = drawn.uniform(-0.5, 0.5, (2, _points(float(np.linalg.norm(np.cross(a, b)))), 1))
    return np.asarray(centre, float) + u * a + v * b


def _points(area: float) -> int:
    return max(1, round(DENSITY * area))


def _turned(points: Floats, angle: float) -> Floats:
    """Points turned about the z axis."""
    c, s = np.cos(angle), np.sin(angle)
    return points @ np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]])
