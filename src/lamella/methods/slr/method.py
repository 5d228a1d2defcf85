"""SLR, Selective Layer Restoration: pre-trained weights back in one range of layers, and diversity with them.

Zhang, Wang and Soh, "Not All Layers Need Tuning: Selective Layer Restoration Recovers Diversity", arXiv 2602.06665.

    theta(R)_l = theta_l^pre  for l in R = [i, j),  theta_l^post elsewhere; embedding, final norm and head stay post

    proxy      Constrained Random Character: Q(R) mass on valid answers, D(R) entropy among them, one token each
    search     every contiguous range of whole layers
    rule       of those with Q(R) >= 0.9 Q(post), the largest D(R)

Nothing is trained, and the result costs what the post-trained model costs. The floor is a promise about the proxy
alone: look at the task that matters afterwards.
"""

from __future__ import annotations

import random
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lamella.errors import MethodError
from lamella.measure.answers import Asked, answer
from lamella.methods.slr.intervals import Interval, answer_restored, intervals
from lamella.plan import ModelReference, Plan, apply_tensors, parameters_at, restore_edit
from lamella.plan.pair import check_pair
from lamella.progress import track
from lamella.registry import method
from lamella.stack import Stack

EMPTY: Interval = (0, 0)  # nothing is restored
ROUNDING = 1e-6  # of D: the same model computed in another order


@dataclass(frozen=True)
class Point:
    """One model between post and pre, and what it answers.

    Attributes:
        what: the interval [i, j) that is restored, or the share alpha of a soup.
        quality, diversity: Q and D, means over questions.
    """

    what: Interval | float
    quality: float
    diversity: float

    @property
    def size(self) -> float:
        """How far it is from post: restored layers, or the share."""
        return self.what[1] - self.what[0] if isinstance(self.what, tuple) else self.what


@dataclass(frozen=True)
class Search:
    """What a search has measured.

    Attributes:
        post: the post-trained model, as the empty interval.
        points: all intervals that were measured, in their order.
        chosen: the one that the rule takes; the empty one where nothing is more diverse than post.
        dropped: questions that post gives too few valid answers to, so that their diversity would be noise.
        asked: those that are left.
        min_quality: the floor, as a share of Q(post).
    """

    post: Point
    points: tuple[Point, ...]
    chosen: Point
    dropped: tuple[str, ...]
    asked: Asked
    min_quality: float

    def feasible(self, point: Point) -> bool:
        """Whether a model keeps the floor."""
        return point.quality >= self.min_quality * self.post.quality


def choose(points: Iterable[Point], post: Point, min_quality: float = 0.9) -> Point:
    """The rule: the largest D where Q >= 0.9 Q(post), the smallest change among equals; post where none is better."""
    best = most_diverse(points, min_quality * post.quality)
    return post if best is None or best.diversity <= post.diversity + ROUNDING else best


def most_diverse(points: Iterable[Point], floor: float) -> Point | None:
    """The point of largest D that keeps a floor of Q, the smallest change among equals."""
    feasible = [point for point in points if point.quality >= floor]
    return max(feasible, key=lambda point: (point.diversity, -point.size), default=None)


def answerable(stack: Stack, asked: Asked, min_validity: float = 0.2) -> tuple[Asked, list[str]]:
    """The questions that a model gives valid answers to, and the prompts of the others.

    Raises:
        MethodError: when none is left.
    """
    quality = answer(stack, asked).quality
    kept = [x for x, q in enumerate(quality.tolist()) if q >= min_validity]
    if not kept:
        raise MethodError(
            f"{stack.name} gives every question less than {min_validity:g} of its mass on valid answers (at most "
            f"{float(quality.max()):.3g}): open its answer with prefill, ask other questions, or lower min_validity"
        )
    return asked.some(kept), [asked.questions[x].prompt for x in range(len(asked)) if x not in kept]


def measure(stack: Stack, asked: Asked, what: Interval | float = EMPTY) -> Point:
    """Q and D of one model."""
    found = answer(stack, asked)
    return Point(what, float(found.quality.mean()), float(found.diversity.mean()))


def search(
    stack: Stack,
    base: Stack,
    asked: Asked,
    *,
    min_quality: float = 0.9,
    min_validity: float = 0.2,
    stride: int = 1,
    journal: Path | None = None,
) -> Search:
    """Measure every interval and choose one (sections 3.2 and 3.3).

    Args:
        stack, base: the post-trained and the pre-trained model; neither is changed.
        asked: questions with one-token answers.
        min_quality: the floor, as a share of Q(post).
        min_validity: questions below this validity under post are left out.
        stride: above 1, intervals whose ends are multiples of it come first, then those around the best one.
        journal: a file with which an interrupted search goes on.

    Raises:
        ArchitectureError, PlanError: when layers of one cannot stand in the other.
        MethodError: for a number out of range, or questions that post cannot answer.
    """
    if not stack.architecture.causal:
        raise MethodError(f"slr works on decoders; {stack.name} is a {stack.architecture.name}")
    for name, value in (("min_quality", min_quality), ("min_validity", min_validity)):
        if not 0 <= value <= 1:
            raise MethodError(f"{name}={value:g}: give a share, from 0 to 1")
    layers = len(stack)
    if not 1 <= stride <= layers:
        raise MethodError(f"stride={stride}: give a whole number of layers, from 1 to {layers}")
    check_pair(stack, base)
    asked, dropped = answerable(stack, asked, min_validity)
    post = measure(stack, asked)
    points = restored(stack, base, asked, intervals(layers, stride), journal)
    if stride > 1:
        best, known = most_diverse(points, min_quality * post.quality), {point.what for point in points}
        near = [] if best is None else [each for each in _around(best.what, layers, stride) if each not in known]
        points += restored(stack, base, asked, near, None if journal is None else journal.with_suffix(".fine"))
    points = sorted(points, key=lambda point: point.what)
    found = Search(post, tuple(points), choose(points, post, min_quality), tuple(dropped), asked, min_quality)
    whole = next(point for point in points if point.what == (0, layers))
    if found.feasible(whole):
        warnings.warn(
            f"restoring all {layers} layers keeps Q at {whole.quality:.3g} of {post.quality:.3g}, so the floor rules "
            "nothing out and the choice says little: raise min_quality, or ask what the base answers worse",
            stacklevel=2,
        )
    return found


def restored(
    stack: Stack, base: Stack, asked: Asked, wanted: Iterable[Interval], journal: Path | None = None
) -> list[Point]:
    """Q and D with each of some intervals restored; see :func:`lamella.methods.slr.intervals.answer_restored`."""
    return [Point(each, *means) for each, means in answer_restored(stack, base, asked, wanted, journal).items()]


def _around(best: Any, layers: int, stride: int) -> list[Interval]:
    """The intervals whose ends are both less than a stride away."""
    starts, stops = (range(end - stride + 1, end + stride) for end in best)
    return [(i, j) for i in starts for j in stops if 0 <= i < j <= layers]


def plan_of(stack: Stack, base: Stack, found: Search, folder: Path) -> Plan:
    """The plan that restores the chosen interval: whole layers, with their norms.

    Args:
        folder: for a side file, where ``base`` is no folder that can be named.
    """
    i, j = found.chosen.what  # type: ignore[misc]
    edits = [restore_edit(stack, base, [f"layers.{layer}" for layer in range(i, j)], folder)] if i < j else []
    return Plan(
        model=ModelReference.of(stack),
        weights=edits,
        provenance={
            "method": "slr",
            "interval": [i, j],
            "base": base.name,
            "q": found.chosen.quality,
            "d": found.chosen.diversity,
            "q_post": found.post.quality,
            "d_post": found.post.diversity,
            "min_quality": found.min_quality,
            "questions": len(found.asked),
            "dropped": list(found.dropped),
            "table": [[*point.what, point.quality, point.diversity] for point in found.points],  # type: ignore[misc]
        },
    )


@method("slr", paper="2602.06665", purpose="repair", verb="restore", brief={"min_validity": 0.0, "min_quality": 0.0})
def slr(
    stack: Stack,
    base: Stack,
    questions: Asked,
    *,
    min_quality: float = 0.9,
    min_validity: float = 0.2,
    stride: int = 1,
    journal: Path | None = None,
    out: Path | None = None,
) -> Plan:
    """Put pre-trained layers back into a post-trained model where they bring most diversity for little validity.

    Args:
        stack: the post-trained model.
        base: the model that it was trained from.
        questions: with one-token answers, as :func:`lamella.data.ask` makes them.
        min_quality: the floor of Q, as a share of that of the post-trained model.
        min_validity: questions whose valid answers have less mass under the post-trained model are left out.
        stride: above 1, a coarse search first and a fine one around its best.
        journal: a file with which an interrupted search goes on.
        out: a folder for the restored tensors, where the base is no safetensors folder; a temporary one when left out.

    Returns:
        The plan, with the table of all intervals in its provenance; without weights where nothing is more diverse than
        the post-trained model.

    Raises:
        ArchitectureError, PlanError: when layers of one cannot stand in the other, field by field, tensor by tensor.
        MethodError: for a number out of range, or questions that the model does not answer.
    """
    found = search(
        stack, base, questions, min_quality=min_quality, min_validity=min_validity, stride=stride, journal=journal
    )
    folder = Path(tempfile.mkdtemp(prefix="lamella-slr-")) if out is None else Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MethodError(
            f"{folder}: tensors cannot be written there ({error.strerror}): give another folder"
        ) from None
    return plan_of(stack, base, found, folder)


# What to compare with, under the same rule.


def mixable(stack: Stack, base: Stack) -> bool:
    """Whether all tensors of two models have the same shapes, those outside the layers too."""
    ours, theirs = ({name: each.shape for name, each in s.model.named_parameters()} for s in (stack, base))
    return all(theirs.get(name) == shape for name, shape in ours.items())


@torch.no_grad()
def mixed(stack: Stack, base: Stack, share: float, *, blocks_only: bool = False) -> Stack:
    """theta(alpha) = (1 - alpha) theta^post + alpha theta^pre, exact at both ends; neither model is changed.

    Args:
        share: alpha.
        blocks_only: leave embedding, final norm and head as they are in post, as a restoration does.
    """

    def mix(ours: Tensor, theirs: Tensor) -> Tensor:
        return torch.lerp(ours.detach().float(), theirs.detach().to(ours.device).float(), share).to(ours.dtype)

    sites = [f"layers.{layer}" for layer in range(len(stack))] + ([] if blocks_only else ["embed", "norm", "head"])
    names = parameters_at(stack, sites)
    tensors = {name: mix(stack.model.get_parameter(name), base.model.get_parameter(name)) for name in names}
    return Stack(apply_tensors(stack.model, tensors), name=f"{stack.name}, {share:g} of {base.name}")


def soup(stack: Stack, base: Stack, asked: Asked, *, n: int = 21, blocks_only: bool = False) -> list[Point]:
    """Q and D of n mixtures, from post to pre; :func:`choose` takes one of them.

    Raises:
        MethodError: for fewer than 2, or models that cannot be mixed.
    """
    if n < 2:
        raise MethodError(f"a soup of n={n}: give at least 2")
    check_pair(stack, base)
    if not blocks_only and not mixable(stack, base):
        raise MethodError(f"{stack.name} and {base.name} differ outside the layers: mix the blocks only")
    shares = [k / (n - 1) for k in range(n)]
    return [
        measure(mixed(stack, base, share, blocks_only=blocks_only), asked, share) for share in track(shares, "soup")
    ]


def random_intervals(layers: int, length: int, *, draws: int = 10, seed: int = 0) -> list[Interval]:
    """Intervals of one length, drawn with replacement."""
    drawn = random.Random(seed)
    starts = [drawn.randrange(layers - length + 1) for _ in range(draws)]
    return [(start, start + length) for start in starts]


def placed(layers: int, length: int) -> dict[str, Interval]:
    """The first, the middle and the last interval of one length."""
    middle = (layers - length) // 2
    return {"early": (0, length), "middle": (middle, middle + length), "late": (layers - length, layers)}


def with_norms_of(stack: Stack, base: Stack) -> Stack:
    """An ablation: the base with the norms (and biases) of post, so that a restoration puts back matrices alone."""
    ours: Sequence[str] = [name for name in parameters_at(stack, [f"layers.{k}" for k in range(len(stack))])]
    vectors = {name: p for name in ours if (p := stack.model.get_parameter(name)).ndim == 1}
    return Stack(apply_tensors(base.model, vectors), name=f"{base.name} with norms of {stack.name}")
