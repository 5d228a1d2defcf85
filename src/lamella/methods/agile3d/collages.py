"""Collages whose truth is known: textured shapes that overlap, in colours that do not tell them apart."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from lamella.methods.agile3d.pictures import pictured
from lamella.methods.agile3d.rooms import Part
from lamella.methods.agile3d.scene import Scene

SIZE = 96  # pixels of a side
FEWEST, MOST = 4, 7  # shapes
PALETTE = 4  # colours of a collage, of which every texture has two
SEEN = 48  # pixels: a shape of which less is seen is background
NOISE = 0.04  # standard deviation of colours
Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]


def collages(part: Part = "train", seed: int = 0) -> Iterator[Scene]:
    """Collages without end; those of the two parts have nothing in common."""
    number = 0
    while True:
        drawn = np.random.default_rng([seed, get_args(Part).index(part), number])
        yield collage(drawn, f"collage {number} of {part}")
        number += 1


def collage(drawn: np.random.Generator, name: str = "the collage") -> Scene:
    """Four to seven discs, boxes and triangles over one another, striped or checked in two of four colours each."""
    palette = drawn.uniform(0.05, 0.95, (PALETTE, 3))
    image, objects = _texture(drawn, palette), np.zeros((SIZE, SIZE), np.int64)
    for number in range(1, int(drawn.integers(FEWEST, MOST + 1)) + 1):
        covered = _shape(drawn)
        image[covered] = _texture(drawn, palette)[covered]
        objects[covered] = number
    for number in range(1, objects.max() + 1):
        if (objects == number).sum() < SEEN:
            objects[objects == number] = 0
    image += drawn.normal(0, NOISE, image.shape)
    return pictured((255 * image.clip(0, 1)).round().astype(np.uint8), objects, name)


def _texture(drawn: np.random.Generator, palette: Floats) -> Floats:
    """Stripes or checks of two colours over the whole picture [SIZE, SIZE, 3]."""
    y, x = np.mgrid[:SIZE, :SIZE]
    angle, width = drawn.uniform(0, np.pi), drawn.uniform(3, 8)
    across = (x * np.cos(angle) + y * np.sin(angle)) // width
    along = (y * np.cos(angle) - x * np.sin(angle)) // width if drawn.integers(2) else 0
    pair = palette[drawn.choice(PALETTE, 2, replace=False)]
    return pair[((across + along) % 2).astype(int)]


def _shape(drawn: np.random.Generator) -> Mask:
    """The pixels of one shape [SIZE, SIZE]."""
    radius = drawn.uniform(0.12, 0.24) * SIZE
    middle = drawn.uniform(radius / 2, SIZE - radius / 2, 2)
    angle = drawn.uniform(0, 2 * np.pi)
    y, x = np.mgrid[:SIZE, :SIZE] - middle[:, None, None]
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    kind = drawn.integers(3)
    if kind == 0:
        return u**2 + v**2 <= radius**2
    if kind == 1:
        return (abs(u) <= radius) & (abs(v) <= drawn.uniform(0.5, 1) * radius)
    return (v >= -radius / 2) & (v + np.sqrt(3) * abs(u) <= radius)  # with its corners on the circle
