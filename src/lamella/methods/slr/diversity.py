"""Diversity from a user's perspective: the number of different correct answers in repeated samples.

Always consider it together with the fraction of correct answers: noise is diverse, too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lamella.errors import CalibrationError
from lamella.methods.slr.answers import ChoiceQuestion
from lamella.progress import track
from lamella.zoo.opening import chat_inputs


@dataclass(frozen=True)
class QuestionDiversity:
    """The sampled answers to one question.

    Attributes:
        question: the prompt.
        distinct: the number of different correct answers.
        valid: the fraction of correct answers.
        counts: how often each was given.
    """

    question: str
    distinct: int
    valid: float
    counts: dict[str, int]


@dataclass(frozen=True)
class Diversity:
    """The results over all questions.

    Attributes:
        distinct: mean number of different correct answers per question.
        valid: fraction of correct answers.
        samples: samples per question.
        varieties: the results of each question.
    """

    distinct: float
    valid: float
    samples: int
    varieties: tuple[QuestionDiversity, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the results as JSON values."""
        return {"distinct": self.distinct, "valid": self.valid, "samples": self.samples,
                "questions": [vars(each) for each in self.varieties]}  # fmt: skip


def diversity(
    model: Any,
    tokenizer: Any,
    questions: Sequence[ChoiceQuestion],
    *,
    samples: int = 32,
    tokens: int = 8,
    temperature: float = 1.0,
    min_p: float = 0.1,
    seed: int = 0,
) -> Diversity:
    """Sample answers to each question, and count the different correct ones.

    The sampler is the paper's (arXiv 2602.06665), regardless of the checkpoint's defaults.

    Args:
        model: a model or a view.
        tokenizer: its tokenizer; prompts use its chat template if there is one.
        questions: questions with all correct answers, of any number of words. The first one in a text counts.
        samples: samples per question.
        tokens: maximum number of new tokens per answer.
        temperature: sampling temperature.
        min_p: minimum probability relative to the most likely token.
        seed: random seed; each question has its own.

    Raises:
        CalibrationError: if there are no questions.
    """
    if not questions or samples < 1:
        raise CalibrationError(f"{len(questions)} questions and {samples} samples: give at least 1 of each")
    device = next(model.parameters()).device
    varieties = []
    for number, question in enumerate(track(questions, "sampled answers")):
        inputs = chat_inputs(tokenizer, [{"role": "user", "content": question.prompt}], device)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed + number)
            generated = model.generate(
                **inputs, do_sample=True, num_return_sequences=samples, max_new_tokens=tokens, temperature=temperature,
                min_p=min_p, top_k=0, top_p=1.0, repetition_penalty=1.0, pad_token_id=_pad_token(tokenizer),
            )  # fmt: skip
        start = inputs["input_ids"].shape[1]
        answers = [first_answer(text, question.answers) for text in _texts(tokenizer, generated[:, start:])]
        counts = {each: answers.count(each) for each in sorted({each for each in answers if each is not None})}
        varieties.append(QuestionDiversity(question.prompt, len(counts), sum(counts.values()) / samples, counts))
    total = len(varieties)
    return Diversity(
        sum(each.distinct for each in varieties) / total,
        sum(each.valid for each in varieties) / total,
        samples,
        tuple(varieties),
    )


def first_answer(text: str, answers: Sequence[str]) -> str | None:
    """Return the first correct answer in a text, ignoring case and plural; the longest if several start together.

    Args:
        text: the text.
        answers: the correct answers.
    """
    found = []
    for answer in answers:
        if match := re.search(rf"\b{re.escape(answer.lower())}(?:e?s)?\b", text.lower()):
            found.append((match.start(), -len(answer), answer))
    return min(found)[2] if found else None


def _pad_token(tokenizer: Any) -> int:
    return next((each for each in (tokenizer.pad_token_id, tokenizer.eos_token_id) if each is not None), 0)


def _texts(tokenizer: Any, rows: torch.Tensor) -> list[str]:
    return [tokenizer.decode(row, skip_special_tokens=True) for row in rows.tolist()]
