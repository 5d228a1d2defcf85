"""Diversity as a user sees it: how many different right answers a model gives when it is asked again and again.

Always read it beside the share of answers that are right: noise is diverse too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lamella.errors import CalibrationError
from lamella.methods.slr.answers import Question
from lamella.progress import track
from lamella.zoo.opening import chat_inputs


@dataclass(frozen=True)
class Variety:
    """What a model answered to one question.

    Attributes:
        question: the prompt.
        distinct: how many different right answers there were.
        valid: the share of answers that were right.
        counts: how often each was given.
    """

    question: str
    distinct: int
    valid: float
    counts: dict[str, int]


@dataclass(frozen=True)
class Diversity:
    """Over all questions.

    Attributes:
        distinct: different right answers to a question, on average.
        valid: share of answers that were right.
        samples: answers to each question.
        varieties: question by question.
    """

    distinct: float
    valid: float
    samples: int
    varieties: tuple[Variety, ...]

    def as_dict(self) -> dict[str, Any]:
        return {"distinct": self.distinct, "valid": self.valid, "samples": self.samples,
                "questions": [vars(each) for each in self.varieties]}  # fmt: skip


def diversity(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    samples: int = 32,
    tokens: int = 8,
    temperature: float = 1.0,
    min_p: float = 0.1,
    seed: int = 0,
) -> Diversity:
    """Sample many answers to each question, and count the different right ones.

    The sampler is the paper's (arXiv 2602.06665), whatever the checkpoint's own defaults are.

    Args:
        model: a model or a view.
        tokenizer: its tokenizer; prompts go through its chat template where there is one.
        questions: with every right answer, of any number of words. An answer counts as the one that it names first.
        samples: answers to each.
        tokens: the most new tokens of an answer.
        temperature, min_p: of the sampler.
        seed: of the samples; each question has draws of its own.

    Raises:
        CalibrationError: when there is nothing to ask.
    """
    if not questions or samples < 1:
        raise CalibrationError(f"{len(questions)} questions and {samples} samples: give at least 1 of each")
    device = next(model.parameters()).device
    varieties = []
    for number, question in enumerate(track(questions, "sampled answers")):
        inputs = chat_inputs(tokenizer, [{"role": "user", "content": question.prompt}], device)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed + number)
            written = model.generate(
                **inputs, do_sample=True, num_return_sequences=samples, max_new_tokens=tokens, temperature=temperature,
                min_p=min_p, top_k=0, top_p=1.0, repetition_penalty=1.0, pad_token_id=_filler(tokenizer),
            )  # fmt: skip
        start = inputs["input_ids"].shape[1]
        named = [first_named(text, question.answers) for text in _texts(tokenizer, written[:, start:])]
        counts = {each: named.count(each) for each in sorted({each for each in named if each is not None})}
        varieties.append(Variety(question.prompt, len(counts), sum(counts.values()) / samples, counts))
    total = len(varieties)
    return Diversity(
        sum(each.distinct for each in varieties) / total,
        sum(each.valid for each in varieties) / total,
        samples,
        tuple(varieties),
    )


def first_named(text: str, answers: Sequence[str]) -> str | None:
    """The right answer that a text names first, in any case and number; the longest where several begin together."""
    found = []
    for answer in answers:
        if match := re.search(rf"\b{re.escape(answer.lower())}(?:e?s)?\b", text.lower()):
            found.append((match.start(), -len(answer), answer))
    return min(found)[2] if found else None


def _filler(tokenizer: Any) -> int:
    return next((each for each in (tokenizer.pad_token_id, tokenizer.eos_token_id) if each is not None), 0)


def _texts(tokenizer: Any, rows: torch.Tensor) -> list[str]:
    return [tokenizer.decode(row, skip_special_tokens=True) for row in rows.tolist()]
