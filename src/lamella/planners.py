"""Planning methods by name with their options, as commands take them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lamella.data import ImageText, Sample
from lamella.data.samples import blocks
from lamella.errors import BudgetError, MethodError
from lamella.evaluate import Budget, StepTimes, cost, step_times
from lamella.measure import Tokens, sequences
from lamella.plan import PlanSeries
from lamella.registry import Method, get_method, methods
from lamella.stack import Stack

PLANS = "PlanSeries"  # result type of planning methods
DEFAULT = "portfolio"
GOALS = ("speedup", "share", "parameters", "size", "memory", "sparsity", "loss")  # a budget has at most one of these


@dataclass(frozen=True)
class Planner:
    """A planning method with options that differ from its defaults.

    Attributes:
        slug: slug of the method.
        options: options by name, as the method declares them.

    Raises:
        MethodError: for an unknown method or option, a value out of its bounds, or a method that returns no plans.
    """

    slug: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        entry = self.method
        if entry.is_own:
            raise MethodError(f"{self.slug} is a command by itself: run `lamella {self.slug}`")
        if entry.result != PLANS:
            raise MethodError(
                f"{self.slug} returns a {entry.result}, not plans; `lamella methods` lists the planning methods"
            )
        unknown = sorted(set(self.options) - set(entry.options))
        if unknown:
            known = ", ".join(entry.options) or "none"
            raise MethodError(f"{self.slug} has no option '{unknown[0]}'; its options are: {known}")
        entry.signature.collect(self.slug, self.options)

    @property
    def method(self) -> Method:
        """The declaration of the method."""
        return get_method(self.slug)


@dataclass(frozen=True)
class Race:
    """The planners that a command tries, of which it keeps the best.

    Attributes:
        planners: the planners with their options.
        is_default: whether no planner was named.
        is_open: whether planners that do not work on the model are skipped; otherwise they are refused.
    """

    planners: tuple[Planner, ...]
    is_default: bool = False
    is_open: bool = False

    @classmethod
    def of(cls, value: Any, options: Mapping[str, Mapping[str, Any]] | None = None) -> Race:
        """Parse the value of an option.

        Args:
            value: ``auto``, the default planner; ``all``; slugs separated by commas; or planners.
            options: options of planners, by slug.

        Raises:
            MethodError: for an unknown method, or options of a method that is not in the race.
        """
        if isinstance(value, Race):
            return value
        if not isinstance(value, str):
            return cls((value,) if isinstance(value, Planner) else tuple(value))
        options = options or {}
        every = [slug for slug, entry in methods().items() if entry.result == PLANS and not entry.dense]
        match value:
            case "all":
                slugs = [slug for slug in every if slug in options or not get_method(slug).slow]
            case "auto":
                slugs = [DEFAULT]
            case _:
                slugs = [each.strip() for each in value.split(",")]
        foreign = next((slug for slug in options if slug not in slugs), None)
        if foreign is not None:
            raise MethodError(f"there are options for {foreign}, which is not among the planners: add it to --method")
        planners = tuple(Planner(slug, options.get(slug, {})) for slug in slugs)
        return cls(planners, is_default=value == "auto", is_open=value == "all")

    @classmethod
    def check(cls, value: Any) -> None:
        """Check the value of an option.

        Args:
            value: see :meth:`of`.
        """
        cls.of(value)


def planner(slug: str, **options: Any) -> Planner:
    """Return a planning method with its options; see :class:`Planner`.

    Args:
        slug: slug of the method.
        options: options by name.
    """
    return Planner(slug, options)


def planned_on(entry: Method, calibration: Tokens | None) -> dict[str, Any]:
    """Return the inputs of a planning method in addition to the model.

    Args:
        entry: the method.
        calibration: token ids [sequences, time], or images with text.

    Raises:
        MethodError: for images if it plans on text, or None if it needs calibration data.
    """
    if not entry.text and not entry.samples:
        return {}
    if calibration is None:
        raise MethodError(f"{entry.slug} needs calibration tokens [sequences, time]: make them with lamella.windows")
    if isinstance(calibration, ImageText) and not entry.reads_images:
        raise MethodError(f"{entry.slug} plans on text, not on images: give a text")
    return {entry.samples: continuations(calibration)} if entry.samples else {entry.text: calibration}


def continuations(calibration: Tokens) -> list[Sample]:
    """Cut sequences into samples: the first quarter of each is the prompt, the rest its answer; padding is removed.

    Args:
        calibration: token ids [sequences, time], with an optional mask.
    """
    rows = []
    for row in sequences(calibration):
        ids = row["input_ids"][0]
        rows.append(ids[row["attention_mask"][0].bool()] if "attention_mask" in row else ids)
    return [sample for ids in rows for sample in blocks(ids[None].cpu(), max(len(ids) // 4, 1))]


def first_reaching(series: PlanSeries, times: StepTimes, speedup: float) -> int:
    """Return the index of the smallest cut of a series whose predicted decode speed-up reaches a target.

    Args:
        series: the plans.
        times: step times of the model.
        speedup: the target, as a factor.

    Raises:
        BudgetError: if no plan reaches it; the message gives the highest speed-up.
    """
    predicted = [times.speedup(plan) for plan in series]
    reaching = [index for index, value in enumerate(predicted) if value >= speedup]
    if not reaching:
        name = series.provenance.get("method", "this series")
        raise BudgetError(
            f"a speed-up of {speedup:g} cannot be reached by {name}: {max(predicted):.2f} is the highest it can"
        )
    return min(reaching, key=lambda index: series[index].removed)


def pick(series: PlanSeries, budget: Budget, stack: Stack) -> int:
    """Pick the plan of a series that fits a budget: the smallest cut that reaches its goal, else the last plan.

    For a share of the sublayers and for a loss, which are limits, it is the largest cut within the limit.

    Args:
        series: the plans.
        budget: the goal.
        stack: the model.

    Returns:
        The index of the plan.

    Raises:
        BudgetError: if no plan reaches the goal, or there are several goals.
        PlanError: for a share of the sublayers, if the plans change weights only.
    """
    goal = goal_of(budget)
    if goal is None:
        return len(series) - 1
    if budget.speedup is not None:
        return first_reaching(series, step_times(stack), budget.speedup)
    if budget.share is not None:
        digest = series.at_ratio(budget.share).digest
        return next(number for number, plan in enumerate(series) if plan.digest == digest)
    if budget.loss is not None:
        fitting = [number for number, point in enumerate(series.points) if _score(point.scores) <= budget.loss]
        return _first(fitting[::-1], series, f"a loss of {budget.loss:g}")
    if budget.sparsity is not None:
        masked = budget.sparsity * cost(stack).parameters
        fitting = [number for number, plan in enumerate(series) if plan.masked >= masked]
        return _first(fitting, series, f"a sparsity of {budget.sparsity:g}")
    fitting = [number for number, plan in enumerate(series) if budget.fits(stack, plan)]
    return _first(fitting, series, f"{goal} {getattr(budget, goal):g}")


def goal_of(budget: Budget) -> str | None:
    """Return the name of a budget's goal, if it has one.

    Args:
        budget: the budget.

    Raises:
        BudgetError: if there are several.
    """
    goals = [name for name in GOALS if getattr(budget, name) is not None]
    if len(goals) > 1:
        raise BudgetError(f"{goals[0]} and {goals[1]} both pick a plan of the series: give one of them")
    return goals[0] if goals else None


def _score(scores: Mapping[str, float]) -> float:
    """Return the first score of a plan, by which its planner decides; infinite if there is none."""
    return next(iter(scores.values()), math.inf)


def _first(indices: Sequence[int], series: PlanSeries, goal: str) -> int:
    """Return the first of some plans.

    Raises:
        BudgetError: if there is none.
    """
    if not indices:
        raise BudgetError(f"{goal} cannot be reached by {series.provenance.get('method', 'this series')}: ask for less")
    return indices[0]
