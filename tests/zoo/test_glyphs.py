"""Glyphs: each can be told from every other one by its pixels, wherever it stands, and all that is said has words."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest

from lamella.errors import CalibrationError
from lamella.zoo.worlds import GLYPH_WORDS, WORDS, asked, glyphs, known, render_glyph, spelt, told, word_tokenizer
from lamella.zoo.worlds.words import UNKNOWN


def strokes_of(image: np.ndarray) -> tuple[str, ...]:
    """The strokes in a picture, from its pixels alone: the box around what is coloured, in fives."""
    mask = np.ptp(image.astype(int), axis=2) > 60
    rows, columns = (np.nonzero(mask.any(axis))[0] for axis in (1, 0))
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return tuple("".join("#" if each else "." for each in row) for row in box)


def shrunk(strokes: tuple[str, ...]) -> tuple[str, ...]:
    """Without what is empty around them."""
    cells = np.array([[each == "#" for each in row] for row in strokes])
    rows, columns = (np.nonzero(cells.any(axis))[0] for axis in (1, 0))
    box = cells[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return tuple("".join("#" if each else "." for each in row) for row in box)


@pytest.mark.parametrize("size", [32, 64])
def test_the_strokes_can_be_read_from_any_rendering(size: int) -> None:
    for number, glyph in enumerate(glyphs(20, seed=3)):
        wanted = shrunk(glyph.strokes)
        for seed in (None, (1, number), (2, number)):
            found = strokes_of(render_glyph(glyph, size, seed))
            pixels = len(found) // len(wanted)
            assert tuple(row[::pixels] for row in found[::pixels]) == wanted and pixels in (3, 4, 6, 7, 8)


def test_names_and_strokes_are_their_own_and_the_right_side_mirrors_the_left() -> None:
    found = glyphs(64, seed=1)
    assert len({each.name for each in found}) == len({each.strokes for each in found}) == 64
    for one, other in itertools.combinations(found, 2):
        pairs = zip("".join(one.strokes), "".join(other.strokes), strict=True)
        assert sum(a != b for a, b in pairs) >= 3
    assert all(row == row[::-1] for each in found for row in each.strokes)


def test_a_seed_draws_the_same_and_another_one_others() -> None:
    assert glyphs(9, 2) == glyphs(9, 2) != glyphs(9, 3)
    one = glyphs(1)[0]
    assert np.array_equal(render_glyph(one, seed=4), render_glyph(one, seed=4))
    assert not np.array_equal(render_glyph(one, seed=4), render_glyph(one, seed=5))


def test_all_that_is_said_has_words_and_those_of_the_shapes_keep_their_numbers() -> None:
    tokenizer, before = word_tokenizer(GLYPH_WORDS), word_tokenizer()
    assert not set(GLYPH_WORDS) & set(WORDS)
    assert all(tokenizer.convert_tokens_to_ids(word) == before.convert_tokens_to_ids(word) for word in WORDS)
    for glyph in glyphs(64, 5):
        for text in (told(glyph), spelt(glyph), *itertools.chain(*known(glyph), *asked(glyph))):
            assert UNKNOWN not in tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"]), text


def test_what_is_asked_on_the_test_is_never_told_in_those_words() -> None:
    for glyph in glyphs(10):
        told_words = {question for question, _ in known(glyph)}
        assert not told_words & {question for question, _ in asked(glyph)}
        assert all(re.search(rf"\b{answer}\b", told(glyph)) for _, answer in asked(glyph))


@pytest.mark.parametrize("count", [0, 65])
def test_more_glyphs_than_names_are_refused(count: int) -> None:
    with pytest.raises(CalibrationError, match="give a number from 1 to 64"):
        glyphs(count)
