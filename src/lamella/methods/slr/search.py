"""Measure a model with each range of layers restored, and choose one (sections 3.2 and 3.3)."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lamella.errors import MethodError
from lamella.methods.slr.answers import EncodedQuestions, answer
from lamella.methods.slr.intervals import Interval, answer_restored, intervals
from lamella.methods.slr.pair import check_pair
from lamella.stack import Stack

EMPTY: Interval = (0, 0)  # nothing is restored
ROUNDING = 1e-6  # of D, for the same model computed in a different order


@dataclass(frozen=True)
class MixedModel:
    """One model between post and pre, with its scores.

    Attributes:
        what: the restored interval [i, j), or alpha of a soup.
        quality: Q, the mean over questions.
        diversity: D, the mean over questions.
    """

    what: Interval | float
    quality: float
    diversity: float

    @property
    def size(self) -> float:
        """The distance from post: the number of restored layers, or alpha."""
        return self.what[1] - self.what[0] if isinstance(self.what, tuple) else self.what


@dataclass(frozen=True)
class SearchResult:
    """The result of a search.

    Attributes:
        post: the post-trained model, as the empty interval.
        points: all measured intervals, in order.
        chosen: the interval selected by the rule; the empty one if nothing is more diverse than post.
        dropped: prompts to which post gives too few valid answers, so that their diversity would be noise.
        questions: the remaining questions.
        min_quality: the floor, as a fraction of Q(post).
    """

    post: MixedModel
    points: tuple[MixedModel, ...]
    chosen: MixedModel
    dropped: tuple[str, ...]
    questions: EncodedQuestions
    min_quality: float

    def feasible(self, point: MixedModel) -> bool:
        """Return whether a model is above the floor."""
        return point.quality >= self.min_quality * self.post.quality


def choose(points: Iterable[MixedModel], post: MixedModel, min_quality: float = 0.9) -> MixedModel:
    """Apply the rule: the largest D with Q >= 0.9 Q(post), the smallest change among equals; post if none is better.

    Args:
        points: the candidates.
        post: the post-trained model.
        min_quality: the floor, as a fraction of Q(post).
    """
    best = most_diverse(points, min_quality * post.quality)
    return post if best is None or best.diversity <= post.diversity + ROUNDING else best


def most_diverse(points: Iterable[MixedModel], floor: float) -> MixedModel | None:
    """Return the point of largest D above a floor of Q, the smallest change among equals.

    Args:
        points: the candidates.
        floor: the minimum of Q.
    """
    feasible = [point for point in points if point.quality >= floor]
    return max(feasible, key=lambda point: (point.diversity, -point.size), default=None)


def answerable(
    stack: Stack, questions: EncodedQuestions, min_validity: float = 0.2
) -> tuple[EncodedQuestions, list[str]]:
    """Return the questions that a model gives valid answers to, and the prompts of the others.

    Args:
        stack: the model.
        questions: the questions.
        min_validity: the minimum validity of a question.

    Raises:
        MethodError: if none remain.
    """
    quality = answer(stack, questions).quality
    remaining = [x for x, q in enumerate(quality.tolist()) if q >= min_validity]
    if not remaining:
        raise MethodError(
            f"{stack.name} gives every question less than {min_validity:g} of its mass on valid answers (at most "
            f"{float(quality.max()):.3g}): start its answer with prefill, use other questions, or lower min_validity"
        )
    return questions.select(remaining), [
        questions.questions[x].prompt for x in range(len(questions)) if x not in remaining
    ]


def measure(stack: Stack, questions: EncodedQuestions, what: Interval | float = EMPTY) -> MixedModel:
    """Measure Q and D of one model.

    Args:
        stack: the model.
        questions: the questions.
        what: its interval or alpha.
    """
    found = answer(stack, questions)
    return MixedModel(what, float(found.quality.mean()), float(found.diversity.mean()))


def search(
    stack: Stack,
    base: Stack,
    questions: EncodedQuestions,
    *,
    min_quality: float = 0.9,
    min_validity: float = 0.2,
    stride: int = 1,
    journal: Path | None = None,
) -> SearchResult:
    """Measure every interval and choose one (sections 3.2 and 3.3).

    Args:
        stack: the post-trained model; it is not changed.
        base: the pre-trained model; it is not changed.
        questions: questions with one-token answers.
        min_quality: the floor, as a fraction of Q(post).
        min_validity: questions below this validity under post are skipped.
        stride: above 1, intervals whose ends are multiples of it are measured first, then those around the best one.
        journal: a file from which an interrupted search resumes.

    Raises:
        ArchitectureError, PlanError: if layers of one model cannot replace those of the other.
        MethodError: for a stride larger than the number of layers, or questions that post cannot answer.
    """
    if not stack.architecture.causal:
        raise MethodError(f"slr works on decoders; {stack.name} is a {stack.architecture.name}")
    layers = len(stack)
    if stride > layers:
        raise MethodError(f"stride {stride}: give a whole number of layers, from 1 to {layers}")
    check_pair(stack, base)
    questions, dropped = answerable(stack, questions, min_validity)
    post = measure(stack, questions)
    points = measure_restored(stack, base, questions, intervals(layers, stride), journal)
    if stride > 1:
        best, known = most_diverse(points, min_quality * post.quality), {point.what for point in points}
        neighbours = [] if best is None else [each for each in _around(best.what, layers, stride) if each not in known]
        points += measure_restored(
            stack, base, questions, neighbours, None if journal is None else journal.with_suffix(".fine")
        )
    points = sorted(points, key=lambda point: point.what)
    found = SearchResult(post, tuple(points), choose(points, post, min_quality), tuple(dropped), questions, min_quality)
    whole = next(point for point in points if point.what == (0, layers))
    if found.feasible(whole):
        warnings.warn(
            f"restoring all {layers} layers keeps Q at {whole.quality:.3g} of {post.quality:.3g}, so the floor "
            "excludes "
            "nothing: raise min_quality, or use questions that the base answers worse",
            stacklevel=2,
        )
    return found


def measure_restored(
    stack: Stack, base: Stack, questions: EncodedQuestions, requested: Iterable[Interval], journal: Path | None = None
) -> list[MixedModel]:
    """Measure Q and D with each interval restored; see :func:`lamella.methods.slr.intervals.answer_restored`.

    Args:
        stack: the post-trained model.
        base: the pre-trained model.
        questions: the questions.
        requested: the intervals.
        journal: a file from which an interrupted search resumes.
    """
    return [
        MixedModel(each, *means) for each, means in answer_restored(stack, base, questions, requested, journal).items()
    ]


def _around(best: Any, layers: int, stride: int) -> list[Interval]:
    """Return the intervals whose ends are both less than a stride away."""
    starts, stops = (range(end - stride + 1, end + stride) for end in best)
    return [(i, j) for i in starts for j in stops if 0 <= i < j <= layers]


def as_row(point: MixedModel) -> dict[str, Any]:
    """Return a point as a row of the evidence."""
    location = {"interval": list(point.what)} if isinstance(point.what, tuple) else {"share": point.what}
    return location | {"quality": point.quality, "diversity": point.diversity}
