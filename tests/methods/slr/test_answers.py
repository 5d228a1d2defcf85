"""Validity and diversity of one-token answers, against loops in float64 and against what is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lamella.errors import CalibrationError, NumericsError
from lamella.methods.slr.answers import ChoiceQuestion, EncodedQuestions, answer
from lamella.stack import Stack
from lamella.zoo.nano import NANO, nano

CAUSAL = [name for name in NANO if name != "vit"]
VOCABULARY = 128


def encoded_questions(count: int = 7, seed: int = 0) -> EncodedQuestions:
    """Prompts of many lengths, answers in one or two forms."""
    generator = torch.Generator().manual_seed(seed)
    questions = [ChoiceQuestion(f"question {x}", tuple("abcde"[: 2 + x % 4])) for x in range(count)]
    prompts = [torch.randint(3, VOCABULARY, (4 + 2 * x,), generator=generator).tolist() for x in range(count)]
    tokens = [[[10 + v, 40 + v] if v % 2 else [70 + v] for v in range(2 + x % 4)] for x in range(count)]
    return EncodedQuestions.of(questions, prompts, tokens)


def by_loop(logits: Tensor, questions: EncodedQuestions) -> tuple[list[float], list[float]]:
    quality, spread = [], []
    for x in range(len(questions)):
        p = logits[x].double().softmax(-1)
        each = [float(sum(p[t] for t in row if t >= 0)) for row in questions.tokens[x].tolist() if max(row) >= 0]
        q = sum(each)
        quality.append(q)
        spread.append(-sum(v / q * math.log(v / q) for v in each) / math.log(len(each)))
    return quality, spread


def test_q_and_d_are_those_of_a_loop_in_float64() -> None:
    questions = encoded_questions()
    logits = 3 * torch.randn(7, VOCABULARY, generator=torch.Generator().manual_seed(1))
    found = questions.scores(logits)
    quality, spread = by_loop(logits, questions)
    assert found.quality.tolist() == pytest.approx(quality, abs=1e-6)
    assert found.diversity.tolist() == pytest.approx(spread, abs=1e-6)
    assert all(0 <= value <= 1 for value in (*found.quality.tolist(), *found.diversity.tolist()))


def test_d_is_1_for_equal_and_0_for_single_answers() -> None:
    questions = encoded_questions()
    uniform = questions.scores(torch.zeros(7, VOCABULARY))
    tokens = (questions.tokens >= 0).flatten(1).sum(1)
    assert uniform.quality.tolist() == pytest.approx((tokens / VOCABULARY).tolist())
    one_form = EncodedQuestions.of([ChoiceQuestion("x", ("a", "b", "c"))], [[5, 6]], [[[1], [2], [3]]])
    assert float(one_form.scores(torch.zeros(1, VOCABULARY)).diversity) == pytest.approx(1, abs=1e-12)
    one_hot = torch.zeros(1, VOCABULARY)
    one_hot[0, 2] = 1e4
    found = one_form.scores(one_hot)
    assert (float(found.quality), float(found.diversity)) == (1.0, 0.0)


def test_mass_outside_the_set_counts_against_q_alone() -> None:
    questions = EncodedQuestions.of([ChoiceQuestion("x", ("a", "b"))], [[5, 6]], [[[1], [2]]])
    logits = torch.full((1, VOCABULARY), -1e4)
    logits[0, [1, 2, 50]] = torch.tensor([0.0, 0.0, math.log(2.0)])
    found = questions.scores(logits)
    assert float(found.quality) == pytest.approx(0.5) and float(found.diversity) == pytest.approx(1)


def test_half_precision_logits_go_through_a_log_softmax_in_float32() -> None:
    questions = encoded_questions()
    logits = torch.randn(7, VOCABULARY, generator=torch.Generator().manual_seed(2)).bfloat16()
    low, high = questions.scores(logits), questions.scores(logits.float())
    assert torch.equal(low.quality, high.quality) and torch.equal(low.diversity, high.diversity)


@pytest.mark.parametrize("name", CAUSAL)
def test_padding_and_the_company_in_a_batch_do_not_matter(name: str) -> None:
    stack, questions = Stack(nano(name)), encoded_questions()
    together = answer(stack, questions)
    alone = [answer(stack, EncodedQuestions.of(*unpadded(questions, x))) for x in range(len(questions))]
    for part in ("quality", "diversity"):
        theirs = torch.cat([getattr(each, part) for each in alone])
        torch.testing.assert_close(getattr(together, part), theirs, rtol=0, atol=1e-5)
    backwards = answer(stack, questions.select(range(len(questions) - 1, -1, -1)))
    torch.testing.assert_close(backwards.quality.flip(0), together.quality, rtol=0, atol=1e-5)


def unpadded(
    questions: EncodedQuestions, x: int
) -> tuple[list[ChoiceQuestion], list[list[int]], list[list[list[int]]]]:
    prompt = questions.input_ids[x][questions.attention_mask[x].bool()].tolist()
    tokens = [[t for t in row if t >= 0] for row in questions.tokens[x].tolist() if max(row) >= 0]
    return [questions.questions[x]], [prompt], [tokens]


def test_more_questions_than_fit_one_pass_are_answered_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    stack, questions = Stack(nano("llama")), encoded_questions()
    whole = answer(stack, questions)
    monkeypatch.setattr("lamella.methods.slr.answers.BATCH", 3)
    parts = answer(stack, questions)
    torch.testing.assert_close(parts.diversity, whole.diversity, rtol=0, atol=1e-5)


def test_questions_that_cannot_be_are_refused_in_one_line() -> None:
    fine = ChoiceQuestion("x", ("a", "b"))
    cases = {
        "at least 2 different answers": lambda: ChoiceQuestion("x", ("a",)),
        "none of them empty": lambda: ChoiceQuestion("x", ("a", "")),
        "give a prompt": lambda: ChoiceQuestion("  ", ("a", "b")),
        "no questions": lambda: EncodedQuestions.of([], [], []),
        "distinct tokens": lambda: EncodedQuestions.of([fine], [[1]], [[[5], [5]]]),
        "needs a prompt": lambda: EncodedQuestions.of([fine], [[]], [[[5], [6]]]),
        "no questions remain: give": lambda: encoded_questions().of_family("other"),
    }
    for message, call in cases.items():
        with pytest.raises(CalibrationError) as error:
            call()
        assert message in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(NumericsError, match="non-finite logits"):
        encoded_questions().scores(torch.full((7, VOCABULARY), math.nan))
