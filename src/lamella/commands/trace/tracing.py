"""Tracing: which layers ran for each token while a model answered a prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lamella.errors import CalibrationError, PlanError
from lamella.methods.void import lac_plan
from lamella.plan import Plan
from lamella.runtime import Denoising, Sampler, Trace, apply, traced, untraced
from lamella.stack import Stack

PHASES = ("first", "image", "prompt", "answer")
Grid = tuple[int, int]  # rows and columns


@torch.no_grad()
def trace_answer(
    stack: Stack,
    tokenizer: Any,
    inputs: Mapping[str, Tensor],
    plan: Plan | None = None,
    *,
    alpha: float = 0.8,
    tokens: int = 32,
    steps: int | None = None,
    grid: Grid | None = None,
) -> dict[str, Any]:
    """Answer one prompt greedily and record what ran for every token.

    Without a plan nothing is skipped, and the record is L2 Adaptive Computation: the layers that were active for a
    token (see :mod:`lamella.methods.void`). For a model that predicts masked tokens, the record is pass by pass.

    Args:
        stack: the opened model, or a view with a dynamic plan, which is traced if ``plan`` is None.
        tokenizer: its tokenizer.
        inputs: ``input_ids`` [1, time] and the other inputs of the model.
        plan: a dynamic plan.
        alpha: threshold of L2 Adaptive Computation.
        tokens: maximum number of new tokens; for a model that predicts masked tokens, their number.
        steps: denoising steps of such a model; one per token if None.
        grid: rows and columns of the image tokens of the prompt.

    Returns:
        ``tokens``, each with its ``text`` and ``phase``; ``usage``, the share of sublayers that ran in each phase (the
        first token, an attention sink, is a phase of its own); and with ``grid``, ``image_grid``: ``rows``, ``columns``
        and ``cells``, the positions of the image tokens.

        For a model that predicts the next token, also ``next`` of each token, the token that its forward pass
        predicted; ``attn`` and ``mlp`` [tokens, layers] bool; and ``notes`` by name [tokens, layers] if the policy gave
        reasons. For a model that predicts masked tokens, also ``step`` of each token, in which it was committed; and
        ``passes``, each with its ``step``, ``by_token``, the share of sublayers that ran for each token (None for one
        that is not in the pass), and ``by_layer``, the share of its tokens that a layer ran for.

    Raises:
        CalibrationError: for more than one prompt.
        PlanError: for a plan that is not dynamic, or no plan for a model that predicts masked tokens.
    """
    ids = inputs["input_ids"]
    if ids.shape[0] != 1:
        raise CalibrationError("a trace shows one prompt at a time: give a single one")
    denoises = stack.architecture.denoises
    view: Any = stack.model
    if plan is None and getattr(view, "lamella_policy", None) is not None:
        plan = view.lamella_plan
    elif plan is None and denoises:
        raise PlanError(f"{stack.name} predicts masked tokens: give the plan to trace")
    else:
        view = apply(stack, plan or lac_plan(stack, alpha=alpha, mode="trace"))
    record, image = traced(view), _image(stack, ids)
    found = (
        _denoised(view, record, tokenizer, inputs, image, Sampler(length=tokens, steps=steps))
        if denoises
        else _generated(view, record, tokenizer, inputs, image, tokens)
    )
    untraced(view)
    cells = image.nonzero()[0].tolist()
    shown = grid is not None and grid[0] * grid[1] == len(cells)
    policy = None if plan is None else plan.policy
    return {
        "model": {"name": stack.name, "layers": len(stack)},
        "policy": "l2 adaptive computation" if plan is None else policy.name if policy else "path",
        "params": {"alpha": alpha} if plan is None else policy.params if policy else {},
        **found,
        **({"image_grid": {"rows": grid[0], "columns": grid[1], "cells": cells}} if grid and shown else {}),
    }


def _image(stack: Stack, ids: Tensor) -> np.ndarray:
    """Return which tokens of a prompt stand for an image [time] bool."""
    name = stack.architecture.images
    token = -1 if not name else getattr(stack.model.config, name)
    return (ids[0] == token).cpu().numpy()


def _generated(
    view: Any, record: Trace, tokenizer: Any, inputs: Mapping[str, Tensor], image: np.ndarray, tokens: int
) -> dict[str, Any]:
    ids = view.generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id)[0]
    executed, prompt, notes = record.joined()
    ran, reasons = executed[0], {name: values[0] for name, values in notes.items()}
    if "active" in reasons:
        ran = np.repeat(reasons.pop("active").astype(bool)[..., None], 2, axis=-1)
    phases = _phases(prompt[0], image)
    phases[0] = "first"
    texts = [tokenizer.decode([token]) for token in ids.tolist()]
    return {
        "tokens": [
            {"text": text, "phase": str(phase), "next": following}
            for text, phase, following in zip(texts, phases, texts[1:], strict=False)
        ],
        "attn": ran[..., 0].tolist(),
        "mlp": ran[..., -1].tolist(),
        "notes": {name: _listed(values) for name, values in reasons.items()},
        "usage": _usage(ran.mean((1, 2)), phases),
    }


def _denoised(
    view: Any, record: Trace, tokenizer: Any, inputs: Mapping[str, Tensor], image: np.ndarray, sampler: Sampler
) -> dict[str, Any]:
    request = Denoising(view, sampler=sampler, **inputs)
    columns = request.tokens.shape[1]
    committed = np.full(columns, -1)
    steps: list[int] = []  # of the passes
    while not request.done:
        masked = (request.tokens == request.mask_token)[0].cpu().numpy()
        request.advance()
        committed[masked & (request.tokens != request.mask_token)[0].cpu().numpy()] = request.step - 1
        steps += [request.step - 1] * (len(request.passes) - len(steps))
    by_token = np.full((len(steps), columns), np.nan)
    for number, (start, end) in enumerate(request.passes):
        by_token[number, start:end] = record.ran[number][0].mean((1, 2))
    phases = _phases(np.arange(columns) < request.length, image)
    texts = [tokenizer.decode([token]) for token in request.tokens[0].tolist()]
    return {
        "tokens": [
            {"text": text, "phase": str(phase), "step": int(step) if step >= 0 else None}
            for text, phase, step in zip(texts, phases, committed, strict=True)
        ],
        "passes": [
            {"step": step, "by_token": each, "by_layer": ran[0].mean((0, 2)).tolist()}
            for step, each, ran in zip(steps, _listed(by_token), record.ran, strict=True)
        ],
        "usage": _usage(np.nanmean(by_token, axis=0), phases),
    }


def _phases(prompt: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Return the phase of each token [time]."""
    phases = np.where(prompt, "prompt", "answer")
    phases[: len(image)][image] = "image"
    return phases


def _usage(share: np.ndarray, phases: np.ndarray) -> dict[str, float]:
    """Return the mean share of sublayers that ran, by phase."""
    return {phase: float(np.nanmean(share[phases == phase])) for phase in PHASES if (phases == phase).any()}


def _listed(values: np.ndarray) -> list[list[float | None]]:
    return [[None if not np.isfinite(value) else round(float(value), 4) for value in row] for row in values]
