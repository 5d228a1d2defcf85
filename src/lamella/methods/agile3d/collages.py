"""Synthetic images with ground truth: overlapping textured shapes in colours that do not separate them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from lamella.methods.agile3d.images import image_scene
from lamella.methods.agile3d.rooms import Part
from lamella.methods.agile3d.scene import ClickScene

SIZE = 96  # image width and height in pixels
FEWEST, MOST = 4, 7  # number of shapes
PALETTE = 4  # colours of a collage; every texture uses two of them
MIN_VISIBLE = 48  # pixels: a shape with fewer visible pixels counts as background
NOISE = 0.04  # standard deviation of the colour noise
Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]


def collages(part: Part = "train", seed: int = 0) -> Iterator[ClickScene]:
    """Yield an infinite sequence of random collages; the two splits are disjoint.

    Args:
        part: the split.
        seed: random seed.
    """
    number = 0
    while True:
        generator = np.random.default_rng([seed, get_args(Part).index(part), number])
        yield collage(generator, f"collage {number} of {part}")
        number += 1


def collage(generator: np.random.Generator, name: str = "the collage") -> ClickScene:
    """Generate four to seven overlapping discs, boxes and triangles, striped or checked in two of four colours each.

    Args:
        generator: random generator.
        name: name of the scene.
    """
    palette = generator.uniform(0.05, 0.95, (PALETTE, 3))
    image, objects = _texture(generator, palette), np.zeros((SIZE, SIZE), np.int64)
    for number in range(1, int(generator.integers(FEWEST, MOST + 1)) + 1):
        covered = _shape(generator)
        image[covered] = _texture(generator, palette)[covered]
        objects[covered] = number
    for number in range(1, objects.max() + 1):
        if (objects == number).sum() < MIN_VISIBLE:
            objects[objects == number] = 0
    image += generator.normal(0, NOISE, image.shape)
    return image_scene((255 * image.clip(0, 1)).round().astype(np.uint8), objects, name)


def _texture(generator: np.random.Generator, palette: Floats) -> Floats:
    """Generate stripes or checks of two colours [SIZE, SIZE, 3]."""
    y, x = np.mgrid[:SIZE, :SIZE]
    angle, width = generator.uniform(0, np.pi), generator.uniform(3, 8)
    across = (x * np.cos(angle) + y * np.sin(angle)) // width
    along = (y * np.cos(angle) - x * np.sin(angle)) // width if generator.integers(2) else 0
    pair = palette[generator.choice(PALETTE, 2, replace=False)]
    return pair[((across + along) % 2).astype(int)]


def _shape(generator: np.random.Generator) -> Mask:
    """Generate the mask of one random shape [SIZE, SIZE]."""
    radius = generator.uniform(0.12, 0.24) * SIZE
    middle = generator.uniform(radius / 2, SIZE - radius / 2, 2)
    angle = generator.uniform(0, 2 * np.pi)
    y, x = np.mgrid[:SIZE, :SIZE] - middle[:, None, None]
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    kind = generator.integers(3)
    if kind == 0:
        return u**2 + v**2 <= radius**2
    if kind == 1:
        return (abs(u) <= radius) & (abs(v) <= generator.uniform(0.5, 1) * radius)
    return (v >= -radius / 2) & (v + np.sqrt(3) * abs(u) <= radius)  # with its corners on the circle
