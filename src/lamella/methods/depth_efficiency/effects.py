"""Who misses a layer, who reads it, and how deep an answer needs the model: steps 3 to 6 and 9 of the paper."""

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
from lamella.methods.depth_efficiency.contributions import Recorded, added, run_once, runs
from lamella.methods.depth_efficiency.profile import CHUNK, PARTS, TINY, Mean, log_probabilities
from lamella.stack import Stack

MARGIN = 4  # no split point among the last tokens
SCOPES = ("current", "future")


# Who misses it: steps 3 to 5.


@dataclass(frozen=True)
class SkipEffect:
    """What leaving out each layer, or one sublayer of it, changes.

    Attributes:
        scope: ``current``: left out for all tokens. ``future``: for those before a split point, measured behind it.
        part: ``layer``, ``attn`` or ``mlp``.
        later: how much the contribution of a later layer changes, relative to its norm, ``("skipped", "layer")``: the
            mean over tokens, and the ``max``; 0 for earlier layers.
        output: the L2 distance between the output probabilities, ``("skipped",)``: mean and ``max``.
    """

    scope: str
    part: str
    later: dict[str, Scores]
    output: dict[str, Scores]

    @property
    def importance(self) -> np.ndarray:
        """How much each layer matters to all later ones: the mean of their changes, none counting more than 1."""
        changes = np.minimum(np.nan_to_num(self.later["max"].values), 1)
        layers = len(changes)
        return np.array([changes[layer, layer + 1 :].sum() / max(layers - 1 - layer, 1) for layer in range(layers)])

    def effective_depth(self, quantile: float = 0.9) -> int:
        """How many layers, from the first on, hold that share of what all layers do for later ones.

        The paper argues with the curves; the number is Lamella's.
        """
        sums = np.cumsum(self.importance)
        return int(np.searchsorted(sums, quantile * sums[-1] * (1 - 1e-12))) + 1 if sums[-1] > 0 else 0

    def as_dict(self) -> dict[str, Any]:
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
    """Leave out each layer in turn and let the change propagate.

    Without its attention a layer still adds what its MLP made in the unchanged run, so that only one of both is gone.

    Args:
        tokens: token ids [sequences, time], or them with an attention mask.
        part: what is left out.
        scope: for which tokens; see :class:`SkipEffect`.
        modality: of these, for the ``text`` or the ``image`` tokens alone, measured at the text; with ``current``.
        splits: how many split points of each sequence, drawn from the multiples of ``stride``.
        front: tokens at the front of each sequence that keep every layer and do not count.
        seed: draws the split points.

    Raises:
        CalibrationError: when a sequence is too short for a split point.
        MethodError: for an unknown part, scope or modality.
    """
    if modality is not None and scope != "current":
        raise MethodError(f"modality {modality} goes with scope current, not {scope}")
    for name, given, known in (("part", part, PARTS), ("scope", scope, SCOPES)):
        if given not in known:
            raise MethodError(f"{name} {given}: choose one of {', '.join(known)}")
    layers, drawn = len(stack), random.Random(seed)
    later, output = Mean(layers, layers), Mean(layers)
    for run in runs(stack, tokens, f"effect of skipping, {scope}"):
        points: Sequence[int | None] = [None]
        if scope == "future":
            points = split_points(run.time, splits, stride, front, drawn)
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


def split_points(time: int, count: int, stride: int, front: int, drawn: random.Random) -> list[int]:
    """Some multiples of the stride, behind the front and not among the last tokens.

    Raises:
        CalibrationError: when there is none.
    """
    candidates = [point for point in range(stride, time - MARGIN, stride) if point > front]
    if not candidates:
        raise CalibrationError(
            f"a sequence of {time} tokens has no split point: give {max(stride, front + 1) + MARGIN + 1} or more"
        )
    drawn.shuffle(candidates)
    return candidates[:count]


@torch.no_grad()
def _skip_each(
    stack: Stack,
    run: Recorded,
    part: str,
    point: int | None,
    front: int,
    later: Mean,
    output: Mean,
    modality: str | None = None,
) -> None:
    """Leave out every layer in turn, before one split point, for all tokens, or for those of one modality."""
    lost: Any = slice(front, point)
    measured: Any = slice(front if point is None else point, None)
    if modality is not None:
        lost, measured = run.which(front, modality), run.which(front, stack.architecture.modality)
    c = run.c
    y = [log_probabilities(stack, some).exp() for some in run.h[-1, measured].split(CHUNK)]
    for skipped in range(len(stack)):
        later.add((skipped, slice(0, skipped)), torch.zeros(skipped, run.h[-1, measured].shape[0]))
        # Its input is unchanged, so what the layer adds is known, at the tokens that keep it too.
        before = run.h[skipped]
        without = {"layer": before, "attn": before + run.mlp[skipped], "mlp": before + run.attn[skipped]}[part]
        h = run.h[skipped + 1].clone()
        h[lost] = without[lost]
        now = h - before
        later.add((skipped, skipped), _relative(now[measured], c[skipped, measured]))
        for layer in range(skipped + 1, len(stack)):
            h, now = added(stack, layer, h, run.context)
            later.add((skipped, layer), _relative(now[measured], c[layer, measured]))
        # In the same pieces as y, so that what is the same gives a distance of 0 to the bit.
        for some, theirs in zip(h[measured].split(CHUNK), y, strict=True):
            output.add(skipped, (log_probabilities(stack, some).exp() - theirs).norm(dim=-1))


def _relative(now: Tensor, clean: Tensor) -> Tensor:
    """How far a contribution is from the clean one, over the norm of that [tokens]."""
    return (now - clean).float().norm(dim=-1) / clean.float().norm(dim=-1).clamp(min=TINY)


# Who reads it: step 6.


@torch.no_grad()
def local_effect(
    stack: Stack, tokens: Tokens, *, splits: int = 4, stride: int = 8, front: int = 1, seed: int = 0
) -> dict[str, Scores]:
    """Who reads a layer directly: later layers are given the unchanged stream without its contribution.

    Nothing propagates. The contribution is taken away before a split point, and measured behind it.

    Returns:
        ``mean`` and ``max`` over tokens of the relative change, ``("skipped", "layer")`` [layers, layers]; NaN where a
        layer does not come later.
    """
    layers, drawn, found = len(stack), random.Random(seed), Mean(len(stack), len(stack))
    for run in runs(stack, tokens, "direct effect"):
        c = run.c
        for point in split_points(run.time, splits, stride, front, drawn):
            for skipped in range(layers):
                for layer in range(skipped + 1, layers):
                    h = run.h[layer].clone()
                    h[front:point] -= c[skipped, front:point]
                    _, now = added(stack, layer, h, run.context)
                    found.add((skipped, layer), _relative(now[point:], c[layer, point:]))
    about = {"tokens": describe(tokens), "front": front, "seed": seed, "splits": splits, "stride": stride}
    return found.scores("relative change of later contributions, direct", ("skipped", "layer"), about)


# How deep an answer needs the model: step 9.


@dataclass(frozen=True)
class DepthScore:
    """Where the layers lie on which an answer rests, as mean layer numbers weighted by their effect.

    Attributes:
        later: by their effect on later layers.
        output: by their effect on the output.
    """

    later: float
    output: float


def depth_score(
    stack: Stack, ids: Tensor, answer: int, *, points: int = 4, stride: int = 4, front: int = 1
) -> DepthScore:
    """The depth that the answer of one example needs: what tokens before it compute, and it uses.

    Args:
        ids: prompt and answer [time].
        answer: the position from which on is measured: that of the answer's first token, or, for the answer itself
            instead of what follows it, one before.
        points: at most so many split points in the answer, every ``stride`` tokens; the first always counts.

    Raises:
        CalibrationError: when ``answer`` lies outside the sequence or its front.
    """
    if not front < answer < len(ids):
        raise CalibrationError(f"answer {answer}: give a position behind {front} of the {len(ids)} tokens")
    later, output = Mean(len(stack), len(stack)), Mean(len(stack))
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
