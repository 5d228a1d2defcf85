"""Effects of skipping layers, and the depth that an answer needs: steps 3 to 6 and 9 of the paper."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lamella.errors import CalibrationError, MethodError
from lamella.measure import Scores, Tokens, describe
from lamella.methods.depth_efficiency.contributions import RecordedRun, layer_contribution, run_once, runs
from lamella.methods.depth_efficiency.profile import CHUNK, PARTS, TINY, TokenMean, log_probabilities
from lamella.stack import Stack

MARGIN = 4  # number of last tokens without a split point
SCOPES = ("current", "future")


# Effects of skipping: steps 3 to 5.


@dataclass(frozen=True)
class SkipEffect:
    """Changes caused by skipping each layer, or one sublayer of it.

    Attributes:
        scope: ``current``: skipped for all tokens. ``future``: skipped for tokens before a split point and measured
            after it.
        part: ``layer``, ``attn`` or ``mlp``.
        later: change of the contribution of later layers, relative to its norm, ``("skipped", "layer")``: mean over
            tokens, and ``max``; 0 for earlier layers.
        output: L2 distance between the output probabilities, ``("skipped",)``: mean and ``max``.
    """

    scope: str
    part: str
    later: dict[str, Scores]
    output: dict[str, Scores]

    @property
    def importance(self) -> np.ndarray:
        """The mean change of all later layers caused by each layer, where single changes are clipped at 1."""
        changes = np.minimum(np.nan_to_num(self.later["max"].values), 1)
        layers = len(changes)
        return np.array([changes[layer, layer + 1 :].sum() / max(layers - 1 - layer, 1) for layer in range(layers)])

    def effective_depth(self, quantile: float = 0.9) -> int:
        """Return how many layers, counted from the first, account for this fraction of the total importance.

        The paper argues with the curves; this number is an addition of Lamella.
        """
        sums = np.cumsum(self.importance)
        return int(np.searchsorted(sums, quantile * sums[-1] * (1 - 1e-12))) + 1 if sums[-1] > 0 else 0

    def as_dict(self) -> dict[str, Any]:
        """Return the scores as JSON values."""
        parts = {f"{name}_{how}": scores.as_dict() for name in ("later", "output") for how, scores in
                 getattr(self, name).items()}  # fmt: skip
        return {"scope": self.scope, "part": self.part, "effective_depth": self.effective_depth()} | parts


def skip_effect(
    stack: Stack,
    tokens: Tokens,
    *,
    part: Literal["layer", "attn", "mlp"] = "layer",
    scope: Literal["current", "future"] = "future",
    modality: str | None = None,
    splits: int = 4,
    stride: int = 8,
    front: int = 1,
    seed: int = 0,
) -> SkipEffect:
    """Skip each layer in turn and propagate the change through all later layers.

    If only the attention is skipped, the MLP's output is that of the unchanged run, so that only one of both is
    removed.

    Args:
        stack: the model.
        tokens: token ids [sequences, time], optionally with an attention mask.
        part: what is skipped: the ``layer``, or its ``attn`` or ``mlp``.
        scope: for which tokens; see :class:`SkipEffect`.
        modality: with ``scope="current"``, skip only for ``text`` or ``image`` tokens, measured at the text.
        splits: number of split points per sequence, at random multiples of ``stride``.
        stride: see ``splits``.
        front: number of tokens at the front of each sequence that keep every layer and are not measured.
        seed: random seed of the split points.

    Raises:
        CalibrationError: if a sequence is too short for a split point.
        MethodError: for an unknown part, scope or modality.
    """
    if modality is not None and scope != "current":
        raise MethodError(f"modality {modality} needs scope current, not {scope}")
    for name, inputs, known in (("part", part, PARTS), ("scope", scope, SCOPES)):
        if inputs not in known:
            raise MethodError(f"{name} {inputs}: choose one of {', '.join(known)}")
    layers, generator = len(stack), random.Random(seed)
    later, output = TokenMean(layers, layers), TokenMean(layers)
    for run in runs(stack, tokens, f"effect of skipping, {scope}"):
        points: Sequence[int | None] = [None]
        if scope == "future":
            points = split_points(run.time, splits, stride, front, generator)
        for point in points:
            _skip_each(stack, run, part, point, front, later, output, modality)
    about = {"tokens": describe(tokens), "front": front, "seed": seed}
    about |= {} if scope == "current" else {"splits": splits, "stride": stride}
    return SkipEffect(
        scope,
        part,
        later.scores(f"relative change of later contributions, {scope}", ("skipped", "layer"), about),
        output.scores(f"distance of output probabilities, {scope}", ("skipped",), about),
    )


def split_points(time: int, count: int, stride: int, front: int, generator: random.Random) -> list[int]:
    """Choose random multiples of the stride, after the front and not among the last tokens.

    Args:
        time: length of the sequence.
        count: maximum number of points.
        stride: the stride.
        front: number of tokens at the front.
        generator: random generator.

    Raises:
        CalibrationError: if there is none.
    """
    candidates = [point for point in range(stride, time - MARGIN, stride) if point > front]
    if not candidates:
        raise CalibrationError(
            f"a sequence of {time} tokens has no split point: give at least {max(stride, front + 1) + MARGIN + 1}"
        )
    generator.shuffle(candidates)
    return candidates[:count]


@torch.no_grad()
def _skip_each(
    stack: Stack,
    run: RecordedRun,
    part: str,
    point: int | None,
    front: int,
    later: TokenMean,
    output: TokenMean,
    modality: str | None = None,
) -> None:
    """Skip every layer in turn, before one split point, for all tokens, or for those of one modality."""
    lost: Any = slice(front, point)
    measured: Any = slice(front if point is None else point, None)
    if modality is not None:
        lost, measured = run.token_mask(front, modality), run.token_mask(front, stack.architecture.modality)
    c = run.c
    y = [log_probabilities(stack, some).exp() for some in run.h[-1, measured].split(CHUNK)]
    for skipped in range(len(stack)):
        later.add((skipped, slice(0, skipped)), torch.zeros(skipped, run.h[-1, measured].shape[0]))
        # The layer's input is unchanged, so its contribution is known, also at the tokens that keep it.
        before = run.h[skipped]
        without = {"layer": before, "attn": before + run.mlp[skipped], "mlp": before + run.attn[skipped]}[part]
        h = run.h[skipped + 1].clone()
        h[lost] = without[lost]
        now = h - before
        later.add((skipped, skipped), _relative(now[measured], c[skipped, measured]))
        for layer in range(skipped + 1, len(stack)):
            h, now = layer_contribution(stack, layer, h, run.context)
            later.add((skipped, layer), _relative(now[measured], c[layer, measured]))
        # In the same chunks as y, so that equal values give a distance of exactly 0.
        for some, theirs in zip(h[measured].split(CHUNK), y, strict=True):
            output.add(skipped, (log_probabilities(stack, some).exp() - theirs).norm(dim=-1))


def _relative(now: Tensor, clean: Tensor) -> Tensor:
    """Return the distance of a contribution from the unchanged one, relative to the norm of the latter [tokens]."""
    return (now - clean).float().norm(dim=-1) / clean.float().norm(dim=-1).clamp(min=TINY)


# Direct effects: step 6.


@torch.no_grad()
def local_effect(
    stack: Stack, tokens: Tokens, *, splits: int = 4, stride: int = 8, front: int = 1, seed: int = 0
) -> dict[str, Scores]:
    """Measure direct effects: later layers get the unchanged residual stream without a layer's contribution.

    Nothing propagates. The contribution is removed before a split point, and the effect is measured after it.

    Args:
        stack: the model.
        tokens: token ids [sequences, time], optionally with an attention mask.
        splits: number of split points per sequence, at random multiples of ``stride``.
        stride: see ``splits``.
        front: number of tokens at the front of each sequence that are unchanged and not measured.
        seed: random seed of the split points.

    Returns:
        ``mean`` and ``max`` over tokens of the relative change, ``("skipped", "layer")`` [layers, layers]; NaN if the
        layer is not later.
    """
    layers, generator, found = len(stack), random.Random(seed), TokenMean(len(stack), len(stack))
    for run in runs(stack, tokens, "direct effect"):
        c = run.c
        for point in split_points(run.time, splits, stride, front, generator):
            for skipped in range(layers):
                for layer in range(skipped + 1, layers):
                    h = run.h[layer].clone()
                    h[front:point] -= c[skipped, front:point]
                    _, now = layer_contribution(stack, layer, h, run.context)
                    found.add((skipped, layer), _relative(now[point:], c[layer, point:]))
    about = {"tokens": describe(tokens), "front": front, "seed": seed, "splits": splits, "stride": stride}
    return found.scores("relative change of later contributions, direct", ("skipped", "layer"), about)


# Depth of an answer: step 9.


@dataclass(frozen=True)
class DepthScore:
    """Mean index of the layers on which an answer depends, weighted by their effect.

    Attributes:
        later: weighted by the effect on later layers.
        output: weighted by the effect on the output.
    """

    later: float
    output: float


def depth_score(
    stack: Stack, ids: Tensor, answer: int, *, points: int = 4, stride: int = 4, front: int = 1
) -> DepthScore:
    """Measure the depth that the answer of one example needs from computation at earlier tokens.

    Args:
        stack: the model.
        ids: prompt and answer [time].
        answer: first measured position: that of the answer's first token, or one before to include the prediction of
            the first token.
        points: maximum number of split points in the answer, every ``stride`` tokens, including the first.
        stride: see ``points``.
        front: number of tokens at the front that are unchanged and not measured.

    Raises:
        CalibrationError: if ``answer`` is outside the sequence or in its front.
    """
    if not front < answer < len(ids):
        raise CalibrationError(f"answer {answer}: give a position after the first {front} of the {len(ids)} tokens")
    later, output = TokenMean(len(stack), len(stack)), TokenMean(len(stack))
    run = run_once(stack, ids.to(stack.device))
    behind = range(answer + stride, min(len(ids) - MARGIN, answer + points * stride), stride)
    for point in (answer, *behind):
        _skip_each(stack, run, "layer", point, front, later, output)
    effect = SkipEffect("future", "layer", later.scores("", ("skipped", "layer"), {}),
                        output.scores("", ("skipped",), {}))  # fmt: skip
    return DepthScore(_centre(effect.importance), _centre(effect.output["max"].values))


def _centre(weights: np.ndarray) -> float:
    total = weights.sum()
    return float(np.arange(len(weights)) @ weights / total) if total > 0 else float("nan")
