"""A synthetic dataset with two independent factors: a fine texture and the direction between two spots.

The texture needs high frequencies, the direction needs attention to distant positions.

    class = texture * 4 + arrangement        5 textures of periods of two to four pixels, 4 directions: 20 classes

In ``textures`` the spots are anywhere, so a single position does not determine the direction. In ``faint-textures``
they are near the centre, where a single position is informative and small networks soon learn the rest; the texture is
hard to see because it is fainter than the noise.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from lamella.data import Captioned

SIDE = 32
TEXTURES = ("rows", "columns", "rising", "falling", "checks")
ARRANGEMENTS = {"beside": 0.0, "above": np.pi / 2, "rising": np.pi / 4, "falling": -np.pi / 4}
CLASSES = len(TEXTURES) * len(ARRANGEMENTS)
NOISE, SPOT = 24.0, 120.0  # grey levels
WORLDS = {  # grey levels of the texture; maximum offset of the spots' centre from the image centre, in pixels per axis
    "textures": (24.0, SIDE / 2),
    "faint-textures": (10.0, 5.0),
}
MARGIN = 3.0  # border in pixels that contains no centre of a spot
Field = npt.NDArray[np.float64]


def textures(split: str, seed: int = 0, world: str = "textures") -> Iterator[Captioned]:
    """Infinite iterator of images, class after class, deterministic for a split and seed.

    Args:
        split: ``test`` or another split.
        seed: random seed.
        world: ``textures`` or ``faint-textures``.
    """
    number = 0
    while True:
        label = number % CLASSES
        yield texture_image(label, (seed, int(split == "test"), number), world)
        number += 1


def texture_image(label: int, seed: Any, world: str = "textures") -> Captioned:
    """Create one image of a class [32, 32, 3], which is rendered on access.

    Args:
        label: the class.
        seed: random seed.
        world: ``textures`` or ``faint-textures``.
    """
    texture, direction = factors(label)
    text = f"a texture of {texture} with two spots {direction}"
    return Captioned(partial(render, label, seed, world), text, label)


def factors(label: int) -> tuple[str, str]:
    """The texture and the arrangement of a class."""
    texture, arrangement = divmod(label, len(ARRANGEMENTS))
    return TEXTURES[texture], list(ARRANGEMENTS)[arrangement]


def render(label: int, seed: Any, world: str) -> npt.NDArray[np.uint8]:
    """Render one image; contrast, phases, positions, colour and noise are random.

    Args:
        label: the class.
        seed: random seed.
        world: ``textures`` or ``faint-textures``.
    """
    draw, (contrast, away) = np.random.default_rng(seed), WORLDS[world]
    texture, direction = factors(label)
    y, x = np.mgrid[:SIDE, :SIDE].astype(np.float64)
    grey = 90 + 10 * _slope(x, y, draw) + contrast * draw.uniform(0.7, 1.3) * _texture(texture, x, y, draw)
    for at_x, at_y in _spots(ARRANGEMENTS[direction], away, draw):
        grey += SPOT * np.exp(-((x - at_x) ** 2 + (y - at_y) ** 2) / (2 * 3.0**2))
    grey = grey[..., None] * draw.uniform(0.9, 1.1, 3) + NOISE * draw.standard_normal((SIDE, SIDE, 1))
    return grey.clip(0, 255).round().astype(np.uint8)


def _slope(x: Field, y: Field, draw: np.random.Generator) -> Field:
    """Brightness gradient, which is not informative."""
    angle = draw.uniform(0, 2 * np.pi)
    return (np.cos(angle) * (x - SIDE / 2) + np.sin(angle) * (y - SIDE / 2)) / SIDE * 2


def _texture(name: str, x: Field, y: Field, draw: np.random.Generator) -> Field:
    """Waves with a mean near 0 and a period of 2.5 to 3.5 pixels."""
    frequency, phase = 2 * np.pi / draw.uniform(2.5, 3.5), draw.uniform(0, 2 * np.pi, 2)
    half = frequency / np.sqrt(2)
    if name == "checks":
        return np.sin(frequency * x + phase[0]) * np.sin(frequency * y + phase[1]) * np.sqrt(2)
    along = {"rows": frequency * y, "columns": frequency * x, "rising": half * (x + y), "falling": half * (x - y)}
    return np.sin(along[name] + phase[0])


def _spots(angle: float, away: float, draw: np.random.Generator) -> list[tuple[float, float]]:
    """Two positions in a direction, up to seven degrees off, whose centre is at most ``away`` pixels off per axis."""
    angle += draw.uniform(-1, 1) * np.pi / 25
    reach = draw.uniform(6, 9)
    step_x, step_y = reach * np.cos(angle), -reach * np.sin(angle)
    room_x, room_y = (min(away, SIDE / 2 - MARGIN - abs(step)) for step in (step_x, step_y))
    at_x, at_y = SIDE / 2 + draw.uniform(-room_x, room_x), SIDE / 2 + draw.uniform(-room_y, room_y)
    return [(at_x - step_x, at_y - step_y), (at_x + step_x, at_y + step_y)]
