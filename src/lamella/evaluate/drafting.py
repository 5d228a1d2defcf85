"""What a draft gains on a prompt: predicted from its parts, and measured beside decoding without it."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from lamella.data import load_text
from lamella.data.sources import benchmark_rows
from lamella.errors import DownloadError
from lamella.evaluate.speed import clock
from lamella.runtime import Draft, generate_counted
from lamella.runtime.drafting import TOKENS, Passes
from lamella.zoo import chat_inputs

TIE = 1e-5  # difference of two logits, relative to the larger one, that rounding explains in 32 bits
LEAST = 32  # generated tokens, since the pass over the prompt gives the first ones and is not counted
CONTEXT, ROUNDS = 64, 5  # tokens before a timed pass, and how often it is timed
PASSAGE = 1200  # maximum characters of a text to rewrite


@dataclass(frozen=True)
class DraftGain:
    """What a draft gains on a prompt, under greedy decoding.

    Attributes:
        accepted: share of the proposed tokens that were kept.
        per_pass: mean number of tokens that a pass gave.
        verifying: mean time of a pass, in plain steps.
        drafting: mean time of a draft, in plain steps; 0 for prompt lookup.
        predicted: the speed-up of decoding that follows from these.
        measured: the measured speed-up, which also has the time between the passes.
        equal: whether all tokens are those of decoding without the draft.
        tied: whether the first difference is between two tokens of the same logit, within the precision of the weights.
    """

    accepted: float
    per_pass: float
    verifying: float
    drafting: float
    predicted: float
    measured: float
    equal: bool
    tied: bool

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any, draft: Draft, prompt: Tensor, tokens: int) -> DraftGain:
        """Continue a prompt greedily with and without a draft.

        Args:
            model: a model or a view.
            draft: what proposes tokens.
            prompt: token ids [1, time]; what does not fit the contexts of both models is cut at its beginning.
            tokens: number of generated tokens; at least 32 are generated.
        """
        tokens = max(tokens, LEAST)
        prompt = prompt[:, -max(1, _longest(model, draft.model) - tokens - TOKENS - 1) :]
        plain, steps = _greedy(model, prompt, tokens)
        step = steps.seconds / steps.passes
        found, passes = _greedy(model, prompt, tokens, **draft.settings)
        verifying, drafting = passes.verifying / passes.passes / step, 0.0
        if draft.model is not None:
            own = _greedy(draft.model, prompt, tokens)[1]
            drafting = passes.proposed / passes.passes * own.seconds / own.passes / step
        differing = (plain != found).nonzero()
        return cls(
            passes.accepted,
            passes.tokens / passes.passes,
            verifying,
            drafting,
            passes.tokens / passes.passes / (verifying + drafting),
            step / (passes.seconds / passes.tokens),
            equal=not len(differing),
            tied=bool(len(differing)) and is_tie(model, plain, found, int(differing[0, 1])),
        )


def _longest(*models: Any) -> int:
    """Return the maximum number of tokens that all models read; None stands for no model."""
    known = (getattr(each.config, "max_position_embeddings", None) for each in models if each is not None)
    return min(filter(None, known), default=sys.maxsize)


def _greedy(model: Any, prompt: Tensor, tokens: int, **settings: Any) -> tuple[Tensor, Passes]:
    """Return a prompt with its greedy continuation [1, time + tokens], and its passes."""
    padding = model.generation_config.pad_token_id or 0
    length = {"min_new_tokens": tokens, "max_new_tokens": tokens}
    return generate_counted(model, prompt, do_sample=False, pad_token_id=padding, **length, **settings)


def is_tie(model: Any, one: Tensor, other: Tensor, index: int) -> bool:
    """Return whether the tokens of two continuations at one position have the same logit, within rounding.

    Args:
        model: a model or a view.
        one: token ids [1, time].
        other: token ids [1, time], equal before the position.
        index: the position.
    """
    logits = model(one[:, :index]).logits[0, -1].float()
    first, second = logits[one[0, index]], logits[other[0, index]]
    precision = max(4 * torch.finfo(model.dtype).eps, TIE)
    return bool((first - second).abs() <= precision * logits.abs().max())


@torch.no_grad()
def pass_costs(model: Any, most: int) -> list[float]:
    """Return the time of a pass over 1, 2, ... tokens behind a context, in passes over one token.

    Args:
        model: a model.
        most: maximum number of proposed tokens; the longest pass has one token more.
    """
    before = max(1, min(CONTEXT, _longest(model) - most - 1))
    ids = torch.arange(before + most + 1, device=model.device)[None] % model.config.get_text_config().vocab_size
    context = model(ids[:, :before], use_cache=True).cache
    fastest = [math.inf] * (most + 1)
    for _ in range(ROUNDS):  # in turns, so that a change of the machine's speed affects all of them
        for width in range(most + 1):
            cache = copy.deepcopy(context)
            begin = clock(model.device)
            model(ids[:, before : before + width + 1], cache=cache, use_cache=True)
            fastest[width] = min(fastest[width], clock(model.device) - begin)
    return [each / fastest[0] for each in fastest]


def predicted_gain(accepted: float, step: float, passes: Sequence[float]) -> tuple[int, float]:
    """Return the number of proposed tokens with the highest predicted speed-up, and this speed-up.

    Args:
        accepted: probability that a proposed token is accepted.
        step: time of a step of the draft, in steps of the target.
        passes: time of a pass over 1, 2, ... tokens, in steps of the target; see :func:`pass_costs`.
    """
    gains = {
        tokens: sum(accepted**n for n in range(tokens + 1)) / (tokens * step + passes[tokens])
        for tokens in range(1, len(passes))
    }
    best = max(gains, key=gains.__getitem__)
    return best, gains[best]


def drafted_prompts(tokenizer: Any, count: int) -> dict[str, list[Tensor]]:
    """Return prompts of four kinds of text, on which a draft gains differently.

    The more an answer repeats its prompt, the more prompt lookup gains: hardly anything in a chat, much in rewriting.

    Args:
        tokenizer: the tokenizer of the model.
        count: number of prompts of each kind.

    Returns:
        Token ids [1, time] by kind; without the kinds whose text is not installed.
    """
    found: dict[str, list[Tensor]] = {}
    for kind, questions in _questions().items():
        with suppress(DownloadError):
            turns = [[{"role": "user", "content": question}] for question in islice(questions, count)]
            found[kind] = [chat_inputs(tokenizer, turn, torch.device("cpu"))["input_ids"] for turn in turns]
    return found


def _questions() -> dict[str, Iterator[str]]:
    documents = load_text("general", "test").documents  # type: ignore[attr-defined]
    return {
        "chat": (each["question"] for each in documents if isinstance(each, dict)),
        "gsm8k": (row["question"] for row in benchmark_rows("gsm8k")),
        "humaneval": (f"Complete this function:\n\n{row['prompt']}" for row in benchmark_rows("humaneval")),
        "rewriting": (
            f"Correct the spelling of this text, and repeat it otherwise unchanged:\n\n{each[:PASSAGE]}"
            for each in documents
            if isinstance(each, str)
        ),
    }
