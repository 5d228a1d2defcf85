"""Passages: nothing is lost, none is too long, and none is cut where it need not be."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamella.methods.wrap import passages
from lamella.zoo import open_tokenizer

NANO_LLAMA = Path(__file__).parents[2] / "models" / "nano-llama"
TEXT = st.text(alphabet=st.sampled_from("ab .!?\n\t\"'\u2028\u00e9\U0001f600"), max_size=400)


def letters(text: str) -> int:
    """A stand-in for a tokenizer, by which a text has as many tokens as bytes."""
    return len(text.encode())


@given(text=TEXT, longest=st.integers(4, 60))
def test_passages_one_after_the_other_are_the_document(text: str, longest: int) -> None:
    found = passages(text, letters, longest)
    assert "".join(found) == text
    assert all(0 < letters(each) <= longest for each in found)
    assert all(letters(a + b) > longest for a, b in pairwise(found))


@given(text=st.text(max_size=600))
def test_no_passage_has_more_tokens_than_allowed_by_a_real_tokenizer(text: str) -> None:
    tokenizer = open_tokenizer(NANO_LLAMA)
    found = passages(text, lambda each: len(tokenizer(each, add_special_tokens=False)["input_ids"]), 30)
    assert "".join(found) == text
    assert all(len(tokenizer(each, add_special_tokens=False)["input_ids"]) <= 30 for each in found)


@pytest.mark.parametrize(
    ("text", "longest", "expected"),
    [
        ("One two.\n\nThree four.", 12, ["One two.\n\n", "Three four."]),
        ("One two. Three four! Five?", 14, ["One two. ", "Three four! ", "Five?"]),
        ("One two. Three four! Five?", 21, ["One two. Three four! ", "Five?"]),
        ("a long word list", 7, ["a long ", "word ", "list"]),
        ("", 5, []),
    ],
)
def test_texts_are_cut_between_paragraphs_else_sentences_else_words(
    text: str, longest: int, expected: list[str]
) -> None:
    assert passages(text, letters, longest) == expected
