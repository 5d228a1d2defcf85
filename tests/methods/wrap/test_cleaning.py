"""Cleaning: what is said beside a rephrase goes, what is none is dropped for its reason."""

from __future__ import annotations

import pytest

from lamella.errors import MethodError
from lamella.methods.wrap import Evaluations, Filters, clean_rephrase, drop_reason, open_styles
from lamella.methods.wrap.cleaning import copied_fraction, repeated_fraction, words_of

PASSAGE = "The heron stands in the shallow water for an hour and waits until a fish swims past its feet at last."
MEDIUM, QA = open_styles(("medium", "qa"))
NONE = Evaluations([], 13)


@pytest.mark.parametrize(
    ("output", "finished", "expected"),
    [
        ("Sure, here is a paraphrase of the text:\n\nHerons wait.", True, "Herons wait."),
        ("Certainly! Here's the rewritten passage: Herons wait.", True, "Herons wait."),
        ("**Paraphrased text:**\nHerons wait.", True, "Herons wait."),
        ("Sure enough, the heron came. It waited.", True, "Sure enough, the heron came. It waited."),
        ("Here is where herons wait.", True, "Here is where herons wait."),
        ("Here are the rules: guests leave at ten.", True, "Here are the rules: guests leave at ten."),
        ("Sure, this means one thing: they wait.", True, "Sure, this means one thing: they wait."),
        ("Here are three questions:\n\nHerons wait.", True, "Herons wait."),
        ("Here's a simpler version in plain words: Herons wait.", True, "Herons wait."),
        ("Herons wait.\n\nNote: I kept all facts.", True, "Herons wait."),
        ("Herons wait.\n\nLet me know if you need more!\n\nI hope this helps.", True, "Herons wait."),
        ('"Herons wait."', True, "Herons wait."),
        ('"Wait," she said. "Now."', True, '"Wait," she said. "Now."'),
        ("Herons wait. They stand in the wa", False, "Herons wait."),
        ("Herons stand in the wa", False, ""),
        ("Herons wait. They stand", True, "Herons wait. They stand"),
    ],
)
def test_what_stands_around_a_rephrase_goes(output: str, finished: bool, expected: str) -> None:
    assert clean_rephrase(output, finished) == expected


GOOD = "A wading bird remained motionless in low water during sixty minutes, hoping for prey to pass beside its legs."


@pytest.mark.parametrize(
    ("output", "style", "ratio", "reason"),
    [
        (GOOD, MEDIUM, 1.0, None),
        ("  ", MEDIUM, 0.0, "empty"),
        ("I'm sorry, but I can't rephrase this.", MEDIUM, 0.5, "refusal"),
        ("As an AI language model, I do not.", MEDIUM, 0.5, "refusal"),
        ("Sure! I'm sorry, but I cannot do that with this text.", MEDIUM, 0.5, "refusal"),
        ("Here is the text:", MEDIUM, 0.0, "unfinished"),
        (GOOD, MEDIUM, 2.6, "length"),
        (GOOD, MEDIUM, 0.2, "length"),
        (GOOD, QA, 1.0, "format"),
        (f"Question: What stood there?\nAnswer: {GOOD}", QA, 2.9, None),
        ("the heron waits and " * 9, MEDIUM, 1.0, "repetition"),
        (PASSAGE, MEDIUM, 1.0, "copy"),
        (
            f"{PASSAGE} Indeed.",
            MEDIUM,
            1.0,
            None if copied_fraction(words_of(f"{PASSAGE} Indeed."), words_of(PASSAGE), 8) <= 0.9 else "copy",
        ),
    ],
)
def test_what_is_no_rephrase_is_dropped_for_its_reason(
    output: str, style: object, ratio: float, reason: str | None
) -> None:
    assert drop_reason(clean_rephrase(output, True), output, PASSAGE, style, ratio, Filters(), NONE) == reason


def test_shares_of_word_rows_are_those_counted_by_hand() -> None:
    assert repeated_fraction(["a", "b", "c", "d", "a", "b", "c", "d"], 4) == pytest.approx(
        1 / 5
    )  # one of five comes again
    assert repeated_fraction([], 4) == 0 and repeated_fraction(["a", "b"], 4) == 0
    assert copied_fraction(["a", "b", "c", "d", "x"], ["z", "a", "b", "c", "d"], 4) == pytest.approx(1 / 2)
    assert copied_fraction(["b", "c"], ["a", "b", "c", "d"], 8) == 1.0  # shorter than eight words: all of it


def test_texts_of_evaluation_sets_are_found_whatever_stands_around_them() -> None:
    question = "How many apples does Anna have when she buys three bags of eight apples each and eats two?"
    judged = Evaluations([question, "A short one, too.", "See also:", ""], 13)
    assert judged.overlaps(words_of(f"It went on. {question.upper()} And so on."))
    assert judged.overlaps(words_of("it is a SHORT one too I think"))
    assert judged.short == 1 and not judged.overlaps(words_of("see also the herons"))
    assert Evaluations(["See also:"], 2).overlaps(words_of("see also the herons"))
    assert not judged.overlaps(words_of(" ".join(question.split()[:12]))) and not judged.overlaps(words_of(PASSAGE))
    style, output = MEDIUM, f"{GOOD} {question}"
    assert drop_reason(output, output, PASSAGE, style, 1.5, Filters(), judged) == "evaluation"


@pytest.mark.parametrize(
    ("styles", "output"),
    [
        (("fancy",), "unknown style 'fancy'; use easy, medium, hard, qa"),
        (("qa", "qa"), "each once"),
    ],
)
def test_styles_that_are_none_are_refused(styles: tuple[str, ...], output: str) -> None:
    with pytest.raises(MethodError, match=output):
        open_styles(styles)


def test_a_style_of_one_s_own_is_a_file_with_a_place_for_the_passage(tmp_path) -> None:
    file = tmp_path / "legal.txt"
    file.write_text("Say it as a lawyer would:\n{passage}")
    (style,) = open_styles((str(file),))
    assert (
        style.name == "legal"
        and style.messages("X {passage}")[1]["content"] == "Say it as a lawyer would:\nX {passage}"
    )
    for name, output in (("qa", "'qa' of another style"), ("real", "'real' of the real text")):
        again = tmp_path / f"{name}.txt"
        again.write_text("Say it again:\n{passage}")
        with pytest.raises(MethodError, match=output):
            open_styles(("qa", str(again)))
    file.write_text("Say it as a lawyer would.")
    with pytest.raises(MethodError, match="does not contain the placeholder of the passage"):
        open_styles((str(file),))
