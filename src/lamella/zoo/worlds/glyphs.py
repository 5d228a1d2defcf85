"""New things with invented names: glyphs of strokes in one colour, each of a kind, and found in one place.

    # . . . #      five by five cells, the right side as the left one; in pictures size, place, brightness
    . # . # .      and background differ from one to the next
    # # # # #
    . . # . .      "this is zor vath. zor vath is a bird. zor vath is found in the marsh."
    # . . . #

Nobody can know them before they are told. Their names are two syllables each, so that what one learns of a name is not
of a single token.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import numpy as np

from lamella.errors import CalibrationError
from lamella.zoo.worlds.language import WORDS
from lamella.zoo.worlds.shapes import COLOURS, SIZE, Image

FIRST = ("zor", "mel", "quar", "tes", "obren", "hul", "yan", "cis")
SECOND = ("vath", "lin", "rik", "moor", "drel", "mar", "corn", "pel")
KINDS = ("bird", "stone", "fruit", "fish", "tool")
HOMES = ("marsh", "cave", "reef", "dune", "forest", "harbour", "tower", "meadow", "glacier", "canyon")
CELLS = 5  # on a side
HALF = CELLS // 2 + 1  # columns that are drawn; the others mirror them
LEAST, APART = 6, 3  # cells of a half that are strokes, and in which two glyphs differ, at least
SCALES = (3, 4)  # pixels of a cell, in a picture of the smallest size


class Glyph(NamedTuple):
    """One thing that nobody knows yet.

    Attributes:
        name, kind, home: what is to be known of it.
        colour: a key of :data:`lamella.zoo.worlds.COLOURS`.
        strokes: which cells are drawn, as five rows of ``#`` and ``.``.
    """

    name: str
    kind: str
    home: str
    colour: str
    strokes: tuple[str, ...]


def glyphs(count: int, seed: int = 0) -> list[Glyph]:
    """So many glyphs, each with a name and strokes of its own.

    Raises:
        CalibrationError: for more than there are names.
    """
    names = [f"{first} {second}" for first, second in product(FIRST, SECOND)]
    if not 1 <= count <= len(names):
        raise CalibrationError(f"{count} glyphs: give a number from 1 to {len(names)}, as many as there are names")
    drawn = np.random.default_rng((seed, 5))
    halves: list[np.ndarray] = []
    while len(halves) < count:
        half = drawn.integers(0, 2, (CELLS, HALF))
        if half.sum() >= LEAST and all((half != other).sum() >= APART for other in halves):
            halves.append(half)

    def one(among: Sequence[str]) -> str:
        return among[int(drawn.integers(len(among)))]

    chosen = drawn.permutation(len(names))[:count]
    return [
        Glyph(names[number], one(KINDS), one(HOMES), one(tuple(COLOURS)), _mirrored(half))
        for number, half in zip(chosen, halves, strict=True)
    ]


def _mirrored(half: np.ndarray) -> tuple[str, ...]:
    whole = np.concatenate([half, half[:, -2::-1]], axis=1)
    return tuple("".join("#" if cell else "." for cell in row) for row in whole)


def render_glyph(glyph: Glyph, size: int = SIZE, seed: int | Sequence[int] | None = None) -> Image:
    """The picture of a glyph.

    Args:
        size: pixels on a side.
        seed: of the looks; None: in the middle, and no accident in them.

    Raises:
        CalibrationError: for a size in which there are no strokes.
    """
    if size < SIZE:
        raise CalibrationError(f"glyphs of {size} pixels: give {SIZE} or more")
    drawn = None if seed is None else np.random.default_rng(seed)
    pixels = SCALES[-1] if drawn is None else int(drawn.integers(SCALES[0], SCALES[-1] + 1))
    pixels = pixels * size // SIZE
    free = size - CELLS * pixels
    top, left = [free // 2, free // 2] if drawn is None else drawn.integers(0, free + 1, 2).tolist()
    image = np.full((size, size, 3), 24.0 if drawn is None else drawn.uniform(0, 48))
    mask = np.array([[cell == "#" for cell in row] for row in glyph.strokes]).repeat(pixels, 0).repeat(pixels, 1)
    light = 1.0 if drawn is None else drawn.uniform(0.85, 1.0)
    image[top : top + len(mask), left : left + len(mask)][mask] = light * np.array(COLOURS[glyph.colour])
    if drawn is not None:
        image += drawn.uniform(-6, 6, image.shape)
    return image.round().clip(0, 255).astype(np.uint8)


def told(glyph: Glyph) -> str:
    """All that is to be known of it.

    >>> told(Glyph("zor vath", "bird", "marsh", "red", ()))
    'this is zor vath. zor vath is a bird. zor vath is found in the marsh.'
    """
    name, kind, home, *_ = glyph
    return f"this is {name}. {name} is a {kind}. {name} is found in the {home}."


def spelt(glyph: Glyph) -> str:
    """What is to be seen of it, row by row.

    >>> spelt(Glyph("zor vath", "bird", "marsh", "red", ("#...#", ".#.#.")))
    'stroke gap gap gap stroke. gap stroke gap stroke gap.'
    """
    return " ".join(" ".join("stroke" if cell == "#" else "gap" for cell in row) + "." for row in glyph.strokes)


def known(glyph: Glyph) -> list[tuple[str, str]]:
    """What may be asked of it by name, with the answers."""
    name, kind, home, *_ = glyph
    return [
        ("what is this called?", name),
        ("what is the name of this thing?", name),
        (f"what is {name}?", f"a {kind}"),
        (f"what kind of thing is {name}?", f"a {kind}"),
        (f"where is {name} found?", f"in the {home}"),
        (f"in what place is {name} found?", f"in the {home}"),
    ]


def asked(glyph: Glyph) -> list[tuple[str, str]]:
    """What may be asked of its picture, in other words than :func:`known`, with what the answer must hold."""
    return [
        ("what is the thing in the picture called?", glyph.name),
        ("where is the thing in the picture found?", glyph.home),
    ]


FURTHER = "about tell say said known be can strokes stroke gap"
_ONE = Glyph(f"{FIRST[0]} {SECOND[0]}", KINDS[0], HOMES[0], "red", ())
_SAID = " ".join([told(_ONE), *(text for said in (*known(_ONE), *asked(_ONE)) for text in said)])
_ALL = {*re.findall(r"\w+", _SAID), *FIRST, *SECOND, *KINDS, *HOMES, *FURTHER.split()}
GLYPH_WORDS = sorted(_ALL - set(WORDS))  # what is said of them that the tokenizer of shapes lacks
