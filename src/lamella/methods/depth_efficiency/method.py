"""Do language models use their depth efficiently? (Csordas, Manning and Potts, 2025, arXiv 2505.13898)

A layer adds its *contribution* to the stream, c = a + m, from its attention and its MLP:

    h_0 ──(+ c_0)── h_1 ──(+ c_1)── ··· ── h_L ── norm ── head ── y

Three questions are asked of it. How large is what it adds, and which way does it point (:func:`depth_profile`)? Who
misses it: how do the contributions of later layers, and the output, change when it is left out, for all tokens, or for
those before some position with everything measured behind it, so that only what *other tokens* use later counts
(:func:`skip_effect`)? And who reads it directly, when nothing propagates (:func:`local_effect`)?

The first token takes no part: it holds the attention sink, a stream so large that it would decide every mean, and
whose loss would destroy every other token.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, kl_div

from lamella.errors import CalibrationError, MethodError
from lamella.measure import Scores, Tokens, describe
from lamella.measure.contributions import Run, added, run_once, runs
from lamella.registry import method
from lamella.stack import Stack

TINY = 1e-6  # norms below it count as this
CHUNK = 64  # positions whose logits are in memory at once
MARGIN = 4  # no split point among the last tokens
PARTS = ("layer", "attn", "mlp")
SCOPES = ("current", "future")


class Mean:
    """The mean over all tokens, and the greatest one, of values that come in pieces."""

    def __init__(self, *shape: int) -> None:
        self.total, self.count, self.most = np.zeros(shape), np.zeros(shape), np.full(shape, -np.inf)

    def add(self, place: Any, values: Tensor) -> None:
        """Add the values of some tokens [..., tokens] at a place [...]."""
        values = values.double().cpu()
        if values.shape[-1]:
            self.total[place] += values.sum(-1).numpy()
            self.count[place] += values.shape[-1]
            self.most[place] = np.maximum(self.most[place], values.amax(-1).numpy())

    def scores(self, name: str, dims: tuple[str, ...], about: dict[str, Any]) -> dict[str, Scores]:
        """Both, NaN where no token came."""
        with np.errstate(invalid="ignore"):
            mean = self.total / self.count
        most = np.where(self.count > 0, self.most, np.nan)
        return {"mean": Scores(name, dims, mean, about), "max": Scores(f"{name}, greatest", dims, most, about)}


# How large, and which way: steps 1, 2 and 7 of the paper.


def depth_profile(stack: Stack, tokens: Tokens, *, front: int = 1) -> dict[str, Scores]:
    """What each layer adds to the stream, and what the head would say of the stream before each layer.

    Args:
        tokens: token ids [sequences, time], or them with an attention mask.
        front: tokens at the front of each sequence that are left out.

    Returns:
        ``norm_attn``, ``norm_mlp`` [layers] and ``norm_stream`` [layers + 1]: L2 norms. ``ratio_attn``, ``ratio_mlp``,
        ``ratio_layer``: those of what is added over the stream that it was made from [layers], and their greatest with
        ``_max`` behind the name. ``cosine_attn``, ``cosine_mlp``, ``cosine_layer``: between both (negative where a
        layer erases, about 0 where it writes something new), ``cosine_through``: between a layer's input and output
        [layers]. ``lens_kl`` [layers + 1]: KL(y || what the head says of the stream there) in nats; ``lens_top5``: the
        share of their five likeliest tokens that are the same.
    """
    layers = len(stack)
    found = {name: Mean(layers) for name in ("norm_attn", "norm_mlp", "ratio_attn", "ratio_mlp", "ratio_layer")}
    found |= {f"cosine_{name}": Mean(layers) for name in ("attn", "mlp", "layer", "through")}
    found |= {name: Mean(layers + 1) for name in ("norm_stream", "lens_kl", "lens_top5")}
    for run in runs(stack, tokens, "depth profile"):
        h, a, m, c, middle = (part[:, front:].float() for part in (run.h, run.attn, run.mlp, run.c, run.middle))
        found["norm_stream"].add(..., h.norm(dim=-1))
        found["cosine_through"].add(..., cosine_similarity(h[1:], h[:-1], dim=-1))
        for name, wrote, read in (("attn", a, h[:-1]), ("mlp", m, middle), ("layer", c, h[:-1])):
            found[f"ratio_{name}"].add(..., wrote.norm(dim=-1) / read.norm(dim=-1).clamp(min=TINY))
            found[f"cosine_{name}"].add(..., cosine_similarity(wrote, read, dim=-1))
        found["norm_attn"].add(..., a.norm(dim=-1))
        found["norm_mlp"].add(..., m.norm(dim=-1))
        for kl, top5 in _lens(stack, run.h[:, front:]):
            found["lens_kl"].add(..., kl)
            found["lens_top5"].add(..., top5)
    about = {"tokens": describe(tokens), "front": front}
    scores = {}
    for name, each in found.items():
        dims = ("layer",) if len(each.total) == layers else ("point",)
        both = each.scores(name.replace("_", " "), dims, about)
        scores[name] = both["mean"]
        if name.startswith("ratio"):
            scores[f"{name}_max"] = both["max"]
    return scores


@torch.no_grad()
def _lens(stack: Stack, h: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """KL and overlap of the five likeliest tokens at every point [layers + 1, some tokens], piece by piece."""
    for part in h.split(CHUNK, dim=1):
        y = _log_probabilities(stack, part[-1])
        likeliest = y.topk(5).indices
        kls, overlaps = [], []
        for point in part:
            q = _log_probabilities(stack, point)
            kls.append(kl_div(q, y, reduction="none", log_target=True).sum(-1).clamp(min=0))
            same = q.topk(5).indices[:, :, None] == likeliest[:, None, :]
            overlaps.append(same.any(-1).float().mean(-1))
        yield torch.stack(kls), torch.stack(overlaps)


def _log_probabilities(stack: Stack, h: Tensor) -> Tensor:
    """What the head says of a stream [tokens, hidden]: float32 [tokens, vocabulary]."""
    return stack.head(h[None])[0].float().log_softmax(-1)


def refinement(lens_kl: np.ndarray) -> int:
    """The point from which the lens comes closer to the output with every layer: where refinement begins."""
    start = len(lens_kl) - 1
    while start > 0 and lens_kl[start - 1] > lens_kl[start]:
        start -= 1
    return start


def turning(cosine: np.ndarray) -> int | None:
    """The layer from which what layers add begins to point along the stream, not against it; None where it never does.

    Of several changes of sign from negative to positive, the one whose cosine is the smallest.
    """
    changes = [layer for layer in range(1, len(cosine)) if cosine[layer - 1] < 0 <= cosine[layer]]
    return min(changes, key=lambda layer: abs(cosine[layer]), default=None)


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
        splits: how many split points of each sequence, drawn from the multiples of ``stride``.
        front: tokens at the front of each sequence that keep every layer and do not count.
        seed: draws the split points.

    Raises:
        CalibrationError: when a sequence is too short for a split point.
        MethodError: for an unknown part or scope.
    """
    for name, given, known in (("part", part, PARTS), ("scope", scope, SCOPES)):
        if given not in known:
            raise MethodError(f"{name}={given}: choose one of {', '.join(known)}")
    layers, drawn = len(stack), random.Random(seed)
    later, output = Mean(layers, layers), Mean(layers)
    for run in runs(stack, tokens, f"effect of skipping, {scope}"):
        points: Sequence[int | None] = [None]
        if scope == "future":
            points = split_points(run.time, splits, stride, front, drawn)
        for point in points:
            _skip_each(stack, run, part, point, front, later, output)
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
def _skip_each(stack: Stack, run: Run, part: str, point: int | None, front: int, later: Mean, output: Mean) -> None:
    """Leave out every layer in turn, before one split point, or for all tokens."""
    measured = slice(front if point is None else point, None)
    c = run.c
    y = [_log_probabilities(stack, some).exp() for some in run.h[-1, measured].split(CHUNK)]
    for skipped in range(len(stack)):
        later.add((skipped, slice(0, skipped)), torch.zeros(skipped, run.h[-1, measured].shape[0]))
        # Its input is unchanged, so what the layer adds is known, at the tokens that keep it too.
        before = run.h[skipped]
        without = {"layer": before, "attn": before + run.mlp[skipped], "mlp": before + run.attn[skipped]}[part]
        h = run.h[skipped + 1].clone()
        h[front:point] = without[front:point]
        now = h - before
        later.add((skipped, skipped), _relative(now[measured], c[skipped, measured]))
        for layer in range(skipped + 1, len(stack)):
            h, now = added(stack, layer, h, run.context)
            later.add((skipped, layer), _relative(now[measured], c[layer, measured]))
        # In the same pieces as y, so that what is the same gives a distance of 0 to the bit.
        for some, theirs in zip(h[measured].split(CHUNK), y, strict=True):
            output.add(skipped, (_log_probabilities(stack, some).exp() - theirs).norm(dim=-1))


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
        raise CalibrationError(f"answer={answer}: give a position behind {front} of the {len(ids)} tokens")
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


# All of it.


@dataclass(frozen=True)
class DepthStudy:
    """What :func:`depth_efficiency` returns; three estimates of where the use of depth changes come with it."""

    profile: dict[str, Scores]
    current: SkipEffect
    future: SkipEffect
    local: dict[str, Scores]

    @property
    def effective_depth(self) -> int:
        """In layers; see :meth:`SkipEffect.effective_depth`."""
        return self.future.effective_depth()

    @property
    def refinement(self) -> int:
        """The point from which layers only bring the output closer; see :func:`refinement`."""
        return refinement(self.profile["lens_kl"].values)

    @property
    def turning(self) -> int | None:
        """The layer from which layers amplify the stream; see :func:`turning`."""
        return turning(self.profile["cosine_layer"].values)

    def as_dict(self) -> dict[str, Any]:
        return {
            "effective_depth": self.effective_depth,
            "refinement": self.refinement,
            "turning": self.turning,
            "profile": {name: scores.as_dict() for name, scores in self.profile.items()},
            "skip_current": self.current.as_dict(),
            "skip_future": self.future.as_dict(),
            "direct": {how: scores.as_dict() for how, scores in self.local.items()},
        }


@method("depth-efficiency", paper="2505.13898", purpose="measure", verb="inspect")
def depth_efficiency(
    stack: Stack, calibration: Tokens, *, splits: int = 4, stride: int = 8, front: int = 1, seed: int = 0
) -> DepthStudy:
    """Study what each layer does for the stream, for later layers and tokens, and for the output.

    Args:
        stack: the model; it is not changed.
        calibration: token ids [sequences, time]; the paper takes 10 to 20 prompts.
        splits, stride: of the future scope; see :func:`skip_effect`.
        front: tokens at the front of each sequence that are left out everywhere.
        seed: draws the split points.

    Raises:
        CalibrationError: for no tokens, or sequences too short for a split point.
        NumericsError: for activations that are not finite, named by site.
    """
    return DepthStudy(
        depth_profile(stack, calibration, front=front),
        skip_effect(stack, calibration, scope="current", front=front, seed=seed),
        skip_effect(stack, calibration, splits=splits, stride=stride, front=front, seed=seed),
        local_effect(stack, calibration, splits=splits, stride=stride, front=front, seed=seed),
    )
