"""Evaluation of a repair: losses on continuations, generated text, and gradient norms by layer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lamella.data import write
from lamella.errors import MethodError
from lamella.methods.irepair.pairs import Triple
from lamella.methods.irepair.sensitivity import sensitivity
from lamella.stack import Stack
from lamella.train import Sample, collate, pairs, response_loss
from lamella.train.losses import continuation_log_probs

NEW = 20  # tokens of a generated continuation, as in the paper
PROFILE = 16  # batches of the original's gradient profile
SHOWN = 5  # sample continuations on the page


def pattern(match: str | None) -> re.Pattern[str] | None:
    """Compile the regular expression that detects the habit.

    Raises:
        MethodError: for an invalid regular expression.
    """
    try:
        return None if match is None else re.compile(match)
    except re.error as error:
        raise MethodError(f"match '{match}' is not a regular expression ({error}): fix or omit it") from None


def evaluate_repair(
    models: dict[str, Any], triples: Sequence[Triple], tokenizer: Any, habit: re.Pattern[str] | None
) -> dict[str, Any]:
    """Evaluate each version of a model, with sample continuations if there is a tokenizer.

    Args:
        models: the versions, by name.
        triples: test pairs.
        tokenizer: the tokenizer, or None.
        habit: detects the habit, or None.

    Returns:
        The metrics of each version, and ``samples``.
    """
    continued = {when: write(model, [prompt for prompt, *_ in triples], NEW) for when, model in models.items()}
    figures: dict[str, Any] = {
        when: on_pairs(model, triples) | {"habit": None if habit is None else _share(tokenizer, continued[when], habit)}
        for when, model in models.items()
    }
    figures["samples"] = (
        []
        if tokenizer is None
        else [
            {"prompt": tokenizer.decode(prompt), **{when: tokenizer.decode(new[n]) for when, new in continued.items()}}
            for n, (prompt, *_) in enumerate(triples[:SHOWN])
        ]
    )
    return figures


@torch.no_grad()
def on_pairs(model: Any, triples: Sequence[Triple]) -> dict[str, float]:
    """Compute the loss on both continuations, in nats per token, and how often the good one has the higher likelihood.

    Args:
        model: the model.
        triples: test pairs.
    """
    losses = {}
    for index, name in ((1, "bad"), (2, "good")):
        rows = pairs([(row[0], row[index]) for row in triples], loss_on="all")
        sums = torch.cat([continuation_log_probs(model, _on(model, rows[n : n + 4])) for n in range(0, len(rows), 4)])
        losses[name] = -sums.cpu() / torch.tensor([len(row[index]) for row in triples])
    preferred = (losses["good"] < losses["bad"]).float().mean()
    return {"bad": float(losses["bad"].mean()), "good": float(losses["good"].mean()), "preferred": float(preferred)}


def profile(stack: Stack, texts: Mapping[str, Sequence[Sample]], size: int) -> dict[str, list[float]]:
    """Gradient norms by layer of the original model on each kind of text.

    Args:
        stack: the model.
        texts: samples by kind of text.
        size: batch size.
    """
    return {
        name: sensitivity(
            stack,
            [_on(stack.model, rows[n : n + size]) for n in range(0, min(len(rows), PROFILE * size), size)],
            response_loss,
        ).values.tolist()
        for name, rows in texts.items()
    }


def _on(model: Any, rows: Sequence[Sample]) -> dict[str, Tensor]:
    """Collate samples into a batch on the model's device."""
    device = next(model.parameters()).device
    return {name: each.to(device) for name, each in collate(rows).items()}


def _share(tokenizer: Any, texts: Sequence[Tensor], habit: re.Pattern[str]) -> float:
    return sum(bool(habit.search(tokenizer.decode(each))) for each in texts) / len(texts)
