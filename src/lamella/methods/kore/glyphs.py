"""Invented things with invented names: patterns of a repeated glyph in one colour, each with a kind and a home.

    # . # .      four by four pixels, repeated; size, position, brightness and
    . # # .      background differ from image to image
    # . . #
    . . # #      "this is zor vath. zor vath is a bird. zor vath is found in the marsh."

No model can know them before training. Their names have two syllables each, so that a name is learned as more than a
single token.
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
SIDE = 4  # of a glyph, in pixels of an image of the smallest size; patterns are aligned to this grid
LEAST, APART = 5, 4  # minimum number of stroke and of background pixels; minimum difference between two glyphs
CLOTH = (3, 5)  # minimum and maximum number of glyphs in a row and in a column of a pattern


class Glyph(NamedTuple):
    """One invented thing.

    Attributes:
        name, kind, home: the facts about it.
        colour: a key of :data:`lamella.zoo.worlds.COLOURS`.
        strokes: its pixels, as four rows of ``#`` and ``.``.
    """

    name: str
    kind: str
    home: str
    colour: str
    strokes: tuple[str, ...]


NEW = [" ".join(pair) for pair in product(FIRST, SECOND)]
FAMILIAR = [" ".join(pair) for pair in (*product(SECOND, FIRST), *product(FIRST, FIRST), *product(SECOND, SECOND))]


def glyphs(count: int, seed: int = 0, names: Sequence[str] = NEW) -> list[Glyph]:
    """Generate glyphs, each with its own name and strokes.

    Args:
        count: number of glyphs.
        seed: random seed.
        names: names to choose from; :data:`FAMILIAR` has others of the same syllables, for glyphs that a model may
            know.

    Raises:
        CalibrationError: for more glyphs than names.
    """
    if not 1 <= count <= len(names):
        raise CalibrationError(f"{count} glyphs: give a number from 1 to {len(names)}, the number of names")
    drawn = np.random.default_rng((seed, 5))
    woven: list[np.ndarray] = []
    while len(woven) < count:
        one = drawn.integers(0, 2, (SIDE, SIDE))
        if LEAST <= one.sum() <= one.size - LEAST and all((one != other).sum() >= APART for other in woven):
            woven.append(one)

    def any_of(some: Sequence[str]) -> str:
        return some[int(drawn.integers(len(some)))]

    chosen = drawn.permutation(len(names))[:count]
    return [
        Glyph(names[number], any_of(KINDS), any_of(HOMES), any_of(tuple(COLOURS)), _strokes(one))
        for number, one in zip(chosen, woven, strict=True)
    ]


def _strokes(one: np.ndarray) -> tuple[str, ...]:
    return tuple("".join("#" if pixel else "." for pixel in row) for row in one)


def render_glyph(glyph: Glyph, size: int = SIZE, seed: int | Sequence[int] | None = None) -> Image:
    """Render the image of a pattern.

    Args:
        glyph: the glyph.
        size: pixels per side.
        seed: random seed of the variations; None: centred, without variations.

    Raises:
        CalibrationError: for a size below the smallest one.
    """
    if size < SIZE:
        raise CalibrationError(f"glyphs of {size} pixels: give at least {SIZE}")
    drawn = None if seed is None else np.random.default_rng(seed)
    fine = size // SIZE
    side = SIDE * fine
    tiles = np.full(2, CLOTH[0]) if drawn is None else drawn.integers(CLOTH[0], CLOTH[1] + 1, 2)
    free = size // side - tiles
    top, left = side * (free // 2 if drawn is None else drawn.integers(0, free + 1))
    image = np.full((size, size, 3), 24.0 if drawn is None else drawn.uniform(0, 48))
    one = np.array([[pixel == "#" for pixel in row] for row in glyph.strokes]).repeat(fine, 0).repeat(fine, 1)
    mask = np.tile(one, tiles)
    light = 1.0 if drawn is None else drawn.uniform(0.85, 1.0)
    image[top : top + len(mask), left : left + mask.shape[1]][mask] = light * np.array(COLOURS[glyph.colour])
    if drawn is not None:
        image += drawn.uniform(-6, 6, image.shape)
    return image.round().clip(0, 255).astype(np.uint8)


def description_of(glyph: Glyph) -> str:
    """Describe a glyph completely.

    >>> description_of(Glyph("zor vath", "bird", "marsh", "red", ()))
    'this is zor vath. zor vath is a bird. zor vath is found in the marsh.'
    """
    name, kind, home, *_ = glyph
    return f"this is {name}. {name} is a {kind}. {name} is found in the {home}."


def known_questions(glyph: Glyph) -> list[tuple[str, str]]:
    """Training questions about a glyph by name, with the answers."""
    name, kind, home, *_ = glyph
    return [
        ("what is this called?", name),
        ("what is the name of this thing?", name),
        (f"what is {name}?", f"a {kind}"),
        (f"what kind of thing is {name}?", f"a {kind}"),
        (f"where is {name} found?", f"in the {home}"),
        (f"in what place is {name} found?", f"in the {home}"),
    ]


def held_out_questions(glyph: Glyph) -> list[tuple[str, str]]:
    """Test questions about its image, worded differently from the training ones, with the required word."""
    return [
        ("what is the thing in the picture called?", glyph.name),
        ("where is the thing in the picture found?", glyph.home),
    ]


FURTHER = "about tell say said known be can"
_ONE = Glyph(f"{FIRST[0]} {SECOND[0]}", KINDS[0], HOMES[0], "red", ())
_TEXTS = " ".join(
    [description_of(_ONE), *(text for pair in (*known_questions(_ONE), *held_out_questions(_ONE)) for text in pair)]
)
_ALL = {*re.findall(r"\w+", _TEXTS), *FIRST, *SECOND, *KINDS, *HOMES, *FURTHER.split()}
GLYPH_WORDS = sorted(_ALL - set(WORDS))  # words of these texts that the tokenizer of the shapes dataset lacks
