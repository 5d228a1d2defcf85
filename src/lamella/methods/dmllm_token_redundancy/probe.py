"""Information loss when image tokens are dropped, and its recovery, on one common trajectory.

    loss[s, l] = 1 - mean cos(h_full, h_pruned)     over answer tokens, after layer l in step s
    KL[s]      = mean KL(p_full || p_pruned)        over tokens that are still masked
    R          = 1 - KL[last quarter] / KL[s*]      recovery: 0 for none, 1 for complete

Before every step, the pruned model is given the tokens that the whole model has committed: otherwise it would commit
other tokens, and the two would differ by their inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from lamella.runtime import Denoising, Sampler
from lamella.stack import Stack, attend_with_weights, join, last_stack

RESAMPLES = 1000


@dataclass(frozen=True)
class Trajectory:
    """Record of one model's denoising, step by step.

    Attributes:
        tokens: input tokens of each step [rows, columns].
        states: hidden states of the answers after every layer [layers, rows, length, hidden], for each step.
        logits: log-probabilities of the answers [rows, length, vocabulary], for each step.
        request: the request at its end.
    """

    tokens: list[Tensor]
    states: list[Tensor]
    logits: list[Tensor]
    request: Denoising


def follow(
    model: Any, inputs: Mapping[str, Tensor], sampler: Sampler, forced: Sequence[Tensor] | None = None
) -> Trajectory:
    """Denoise, and record the hidden states of the answers after every layer.

    Args:
        model: a model that predicts masked tokens, or a view of one.
        inputs: inputs of its prompts, by name.
        sampler: a sampler with one block, so that every step predicts the whole answer.
        forced: input tokens of each step, in place of the model's own.
    """
    request = Denoising(model, sampler=sampler, **inputs)
    tokens, states, logits = [], [], []
    with _recording(model, request) as recorded:
        for step in range(request.steps):
            if forced is not None:
                request.tokens = forced[step].clone()
            tokens.append(request.tokens.clone())
            recorded.clear()
            request.advance()
            assert request.logits is not None
            states.append(torch.stack([recorded[layer] for layer in sorted(recorded)]))
            logits.append(request.logits.float().log_softmax(dim=-1))
    return Trajectory(tokens, states, logits, request)


@contextmanager
def _recording(model: Any, request: Denoising) -> Iterator[dict[int, Tensor]]:
    """Record the hidden states of the answers after every layer of the last pass that included them, by layer."""
    stack, recorded = last_stack(model), {}

    def note(layer: int) -> Any:
        def ends(module: Any, args: Any, out: Any) -> None:
            h = out if isinstance(out, Tensor) else out[0]
            if request.end > request.length:
                recorded[layer] = h[:, request.length - request.start :].detach()

        return ends

    hooks = [module.register_forward_hook(note(layer)) for layer, module in enumerate(stack.layers)]
    try:
        yield recorded
    finally:
        for hook in hooks:
            hook.remove()


def information_loss(full: Trajectory, pruned: Trajectory) -> tuple[Tensor, Tensor]:
    """Return loss [steps, layers], and the KL of each row in each step in nats [rows, steps].

    Args:
        full: trajectory of the whole model.
        pruned: trajectory of the pruned model on the same tokens.
    """
    loss = torch.stack(
        [1 - cosine_similarity(h, g, dim=-1).mean(dim=(1, 2)) for h, g in zip(full.states, pruned.states, strict=True)]
    )
    kl = []
    for p, q, tokens in zip(full.logits, pruned.logits, full.tokens, strict=True):
        masked = tokens[:, full.request.length :] == full.request.mask_token
        predicted = torch.isfinite(p)  # the mask token itself is never predicted
        each = torch.where(predicted, p.exp() * (p.masked_fill(~predicted, 0) - q.masked_fill(~predicted, 0)), 0.0).sum(
            dim=-1
        )
        kl.append((each * masked).sum(dim=1) / masked.sum(dim=1))
    return loss.double(), torch.stack(kl, dim=1).double()


def restoration(kl: Tensor, begins: int, seed: int = 0) -> tuple[float, float, float]:
    """Return R with its 95 % bootstrap interval over rows; NaN if nothing was lost.

    Args:
        kl: KL of each row in each step [rows, steps].
        begins: s*, the step of the first drop.
        seed: random seed of the bootstrap.

    >>> restoration(torch.tensor([[0.8, 0.4, 0.2, 0.1]]), 0)[0]
    0.875
    """
    values = kl.numpy()
    last = max(1, values.shape[1] // 4)

    def ratio(rows: np.ndarray) -> float:
        first = rows[:, begins].mean()
        return float(1 - rows[:, -last:].mean() / first) if first > 0 else float("nan")

    resamples = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    spread = [ratio(rows) for rows in values[resamples]] if len(values) > 1 else [ratio(values)]
    low, high = np.nanquantile(spread, (0.025, 0.975))
    return round(ratio(values), 12), float(low), float(high)


@torch.no_grad()
def attention_mass(stack: Stack, full: Trajectory, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the fraction of the answers' attention on the image [steps, layers], over rows with an image.

    Args:
        stack: the language model of the whole model.
        full: its trajectory; with a prefix cache the prompt attends only to itself here too.
        inputs: inputs of the prompts.
    """
    request, found = full.request, []
    for tokens in full.tokens:
        arguments = {"input_ids": tokens, "position_ids": request.positions, **request.prompt}
        if not request.real.all():
            arguments["attention_mask"] = request.real
        context = stack.context(arguments)
        image = context.modalities["image"]
        rows = image.any(dim=1)
        h: Any = context.h
        shares = []
        for layer in range(len(stack)):
            call = context.calls[layer] | {"attention_mask": _inputs_of(request, h)}
            attn, *others = stack.architecture.sublayers
            h, weights = attend_with_weights(attn, stack.layers[layer], h, call, causal=False)
            mass = (weights[:, :, request.length :] * image[:, None, None]).sum(dim=-1)
            shares.append(float(mass[rows].mean()))
            for sublayer in others:
                h = sublayer.run(stack.layers[layer], h, call)
            h = join(h)
        found.append(shares)
    return torch.tensor(found, dtype=torch.float64)


def _inputs_of(request: Denoising, h: Tensor) -> Tensor:
    """Return the additive attention mask [rows, 1, columns, columns]."""
    time = request.tokens.shape[1]
    seen = request.real[:, None].expand(-1, time, -1).clone()
    if request.cache is not None:
        seen[:, : request.length, request.length :] = False
    least = torch.finfo(torch.float32).min
    return torch.zeros(seen.shape, dtype=h.dtype).masked_fill(~seen, least)[:, None]
