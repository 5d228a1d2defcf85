"""Glyphs: each can be told from every other one by its pixels, wherever it stands, and all that is said has words."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest

from lamella.errors import CalibrationError
from lamella.methods.kore.glyphs import (
    FAMILIAR,
    GLYPH_WORDS,
    NEW,
    description_of,
    glyphs,
    held_out_questions,
    known_questions,
    render_glyph,
)
from lamella.zoo.worlds import SIZE, WORDS, word_tokenizer
from lamella.zoo.worlds.words import UNKNOWN


def strokes_of(image: np.ndarray) -> set[tuple[str, ...]]:
    """The strokes in all cells of a picture in which there are any, from its pixels alone."""
    fine, mask = len(image) // SIZE, np.ptp(image.astype(int), axis=2) > 60
    side = 4 * fine
    cells = mask.reshape(8, side, 8, side).transpose(0, 2, 1, 3).reshape(64, side, side)
    return {tuple("".join("#" if each else "." for each in row[::fine]) for row in cell[::fine])
            for cell in cells if cell.any()}  # fmt: skip


@pytest.mark.parametrize("size", [32, 64])
def test_the_strokes_can_be_read_from_any_rendering(size: int) -> None:
    for number, glyph in enumerate(glyphs(20, seed=3)):
        for seed in (None, (1, number), (2, number)):
            assert strokes_of(render_glyph(glyph, size, seed)) == {glyph.strokes}


def test_names_and_strokes_are_their_own() -> None:
    found = glyphs(64, seed=1)
    assert len({each.name for each in found}) == len({each.strokes for each in found}) == 64
    for one, other in itertools.combinations(found, 2):
        pairs = zip("".join(one.strokes), "".join(other.strokes), strict=True)
        assert sum(a != b for a, b in pairs) >= 4


def test_familiar_names_are_other_names_of_the_same_syllables() -> None:
    familiar, new = ({each.name for each in glyphs(count, 1, names)} for count, names in ((192, FAMILIAR), (64, NEW)))
    assert len(familiar) == 192 and len(new) == 64 and not familiar & new
    assert {word for name in familiar for word in name.split()} == {word for name in new for word in name.split()}


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
        for text in (description_of(glyph), *itertools.chain(*known_questions(glyph), *held_out_questions(glyph))):
            assert UNKNOWN not in tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"]), text


def test_what_is_asked_on_the_test_is_never_told_in_those_words() -> None:
    for glyph in glyphs(10):
        told_words = {question for question, _ in known_questions(glyph)}
        assert not told_words & {question for question, _ in held_out_questions(glyph)}
        assert all(re.search(rf"\b{answer}\b", description_of(glyph)) for _, answer in held_out_questions(glyph))


@pytest.mark.parametrize("count", [0, 65])
def test_more_glyphs_than_names_are_refused(count: int) -> None:
    with pytest.raises(CalibrationError, match="give a number from 1 to 64"):
        glyphs(count)
