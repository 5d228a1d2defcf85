"""Measure what a model answers with each range of layers restored, and choose one (sections 3.2 and 3.3)."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lamella.errors import MethodError
from lamella.methods.slr.answers import Asked, answer
from lamella.methods.slr.intervals import Interval, answer_restored, intervals
from lamella.methods.slr.pair import check_pair
from lamella.stack import Stack

EMPTY: Interval = (0, 0)  # nothing is restored
ROUNDING = 1e-6  # of D: the same model computed in another order


@dataclass(frozen=True)
class Blend:
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
class Blends:
    """What a search has measured.

    Attributes:
        post: the post-trained model, as the empty interval.
        points: all intervals that were measured, in their order.
        chosen: the one that the rule takes; the empty one where nothing is more diverse than post.
        dropped: questions that post gives too few valid answers to, so that their diversity would be noise.
        asked: those that are left.
        min_quality: the floor, as a share of Q(post).
    """

    post: Blend
    points: tuple[Blend, ...]
    chosen: Blend
    dropped: tuple[str, ...]
    asked: Asked
    min_quality: float

    def feasible(self, point: Blend) -> bool:
        """Whether a model keeps the floor."""
        return point.quality >= self.min_quality * self.post.quality


def choose(points: Iterable[Blend], post: Blend, min_quality: float = 0.9) -> Blend:
    """The rule: the largest D where Q >= 0.9 Q(post), the smallest change among equals; post where none is better."""
    best = most_diverse(points, min_quality * post.quality)
    return post if best is None or best.diversity <= post.diversity + ROUNDING else best


def most_diverse(points: Iterable[Blend], floor: float) -> Blend | None:
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


def measure(stack: Stack, asked: Asked, what: Interval | float = EMPTY) -> Blend:
    """Q and D of one model."""
    found = answer(stack, asked)
    return Blend(what, float(found.quality.mean()), float(found.diversity.mean()))


def search(
    stack: Stack,
    base: Stack,
    asked: Asked,
    *,
    min_quality: float = 0.9,
    min_validity: float = 0.2,
    stride: int = 1,
    journal: Path | None = None,
) -> Blends:
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
        MethodError: for a stride of more than all layers, or questions that post cannot answer.
    """
    if not stack.architecture.causal:
        raise MethodError(f"slr works on decoders; {stack.name} is a {stack.architecture.name}")
    layers = len(stack)
    if stride > layers:
        raise MethodError(f"stride {stride}: give a whole number of layers, from 1 to {layers}")
    check_pair(stack, base)
    asked, dropped = answerable(stack, asked, min_validity)
    post = measure(stack, asked)
    points = restored(stack, base, asked, intervals(layers, stride), journal)
    if stride > 1:
        best, known = most_diverse(points, min_quality * post.quality), {point.what for point in points}
        near = [] if best is None else [each for each in _around(best.what, layers, stride) if each not in known]
        points += restored(stack, base, asked, near, None if journal is None else journal.with_suffix(".fine"))
    points = sorted(points, key=lambda point: point.what)
    found = Blends(post, tuple(points), choose(points, post, min_quality), tuple(dropped), asked, min_quality)
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
) -> list[Blend]:
    """Q and D with each of some intervals restored; see :func:`lamella.methods.slr.intervals.answer_restored`."""
    return [Blend(each, *means) for each, means in answer_restored(stack, base, asked, wanted, journal).items()]


def _around(best: Any, layers: int, stride: int) -> list[Interval]:
    """The intervals whose ends are both less than a stride away."""
    starts, stops = (range(end - stride + 1, end + stride) for end in best)
    return [(i, j) for i in starts for j in stops if 0 <= i < j <= layers]


def said(point: Blend) -> dict[str, Any]:
    """A point as evidence holds it."""
    place = {"interval": list(point.what)} if isinstance(point.what, tuple) else {"share": point.what}
    return place | {"quality": point.quality, "diversity": point.diversity}
