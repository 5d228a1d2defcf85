"""Comparison of planners: their series, the plans that reach the target, and the measurements of these."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from torch import LongTensor

from lamella.data import ImageText, Text
from lamella.errors import BudgetError, MethodError
from lamella.evaluate import Budget, Fidelity, FidelityTest, Ratio, StepTimes, bench
from lamella.evaluate.confidence import CONFIDENCE
from lamella.files import Work
from lamella.plan import Plan, PlanSeries
from lamella.planners import Planner, Race, first_reaching, planned_on
from lamella.progress import track
from lamella.runtime import apply
from lamella.stack import Stack

TOLERANCE = 0.98  # fraction of the target that counts as reached: two runs of one model differ by about 2 %
MARGIN = 1.03  # factor by which a search exceeds the target, since measurements deviate from the cost model
ATTEMPTS = 4
STEPS = 16  # decoding steps in a round of a timing loop
CURVE_POINTS = 6
CURVE_SECONDS = 45.0  # time limit for the fidelity of a series at points other than the chosen one


@dataclass(frozen=True)
class Job:
    """The common inputs of all steps of a compression.

    Attributes:
        stack: the original.
        calibration: data for planning.
        test: data for evaluation, token ids [sequences, time] or images with text.
        times: step times of the original.
        speedup: the decode speed-up to reach.
        minutes: time limit of each search; None sets no limit.
        seed: random seed.
        work: the folder of the searches' journals.
    """

    stack: Stack
    calibration: Text | ImageText
    test: LongTensor | ImageText
    times: StepTimes
    speedup: float
    minutes: float | None
    seed: int
    work: Work


@dataclass
class Contender:
    """A series of plans, and the plan that was chosen from it.

    Attributes:
        name: slug of the planner.
        label: title of the planner.
        series: the plans.
        baseline: whether the planner exists for comparison.
        seconds: duration of planning.
        point: index of the chosen plan.
        speedup: its measured decode speed-up.
        points: measurements along the series, for evidence.
    """

    name: str
    label: str
    series: PlanSeries
    baseline: bool = False
    seconds: float = 0.0
    point: int = 0
    speedup: Ratio | None = None
    points: list[dict[str, Any]] = field(default_factory=list)

    @property
    def plan(self) -> Plan:
        """The chosen plan."""
        return self.series[self.point]

    @property
    def chosen(self) -> dict[str, Any]:
        """The measurements of the chosen plan."""
        return next(point for point in self.points if point["chosen"])

    def reaches(self, speedup: float) -> bool:
        """Return whether the chosen plan reaches a speed-up."""
        assert self.speedup is not None
        return reaches(self.speedup, speedup)

    def loss(self, speedup: float) -> tuple[bool, float]:
        """Return a sort key of the chosen plan, lower is better: reaching the target first, then KL divergence."""
        return not self.reaches(speedup), self.chosen["fidelity"]["kl"]["mean"]


def reaches(measured: Ratio, speedup: float) -> bool:
    """Return whether a measured speed-up reaches a target, within the variation between two runs of the same model.

    Args:
        measured: the measured speed-up.
        speedup: the target.
    """
    return measured.median >= TOLERANCE * speedup


def entrants(race: Race, stack: Stack, calibration: Text | ImageText) -> list[Planner]:
    """Return the planners of a race that can speed up a model.

    Args:
        race: the planners.
        stack: the model.
        calibration: data for planning.

    Raises:
        MethodError: for a named planner that cannot.
    """
    has_images = isinstance(calibration, ImageText)
    if race.is_open:
        fitting = [each for each in race.planners if each.method.takes(stack)]
        return [each for each in fitting if each.method.reads_images or not has_images]
    dense = next((each.slug for each in race.planners if each.method.dense), None)
    if dense is not None:
        raise MethodError(
            f"{dense} sets weights to zero, which dense kernels still compute, so it cannot reach a "
            f"speed-up: use `lamella plan {dense}` and `lamella apply`"
        )
    return list(race.planners)


def search(job: Job, planner: Planner) -> Contender:
    """Run one planner as far as the target requires, plus a margin for deviations of the measurement.

    Args:
        job: the inputs.
        planner: the planner.
    """
    budget = Budget(minutes=job.minutes, speedup=MARGIN * job.speedup)
    entry = planner.method
    options = entry.signature.fill(planner.options, budget, job.work.within("plans"), seed=job.seed)
    begin = time.perf_counter()
    series: PlanSeries = entry(job.stack, **planned_on(entry, job.calibration), **options)
    return Contender(entry.slug, entry.title, series, entry.baseline, time.perf_counter() - begin)


def check_reachable(stack: Stack, times: StepTimes, speedup: float) -> None:
    """Check a target against the decode speed-up with a single MLP sublayer left, the upper bound of all plans.

    Args:
        stack: the model.
        times: its step times.
        speedup: the target.

    Raises:
        BudgetError: for a target above it.
    """
    ceiling = times.speedup_without(stack.positions[:-1], len(stack))
    if speedup > ceiling:
        raise BudgetError(
            f"a speed-up of {speedup:g} cannot be reached on {stack.name}: {ceiling:.2f} is reached with a single "
            "sublayer, since the head and the loop remain; ask for less"
        )


def choose(job: Job, candidates: list[Contender]) -> None:
    """Pick each series' smallest cut by the cost model, then measure it, and move on if the target is missed.

    Args:
        job: the inputs.
        candidates: the series; their chosen points are updated.

    Raises:
        BudgetError: if the only candidate cannot reach the target even in the cost model.
    """
    for candidate in candidates:
        try:
            candidate.point = first_reaching(candidate.series, job.times, job.speedup)
        except BudgetError:
            if len(candidates) == 1:
                raise
            candidate.point = len(candidate.series) - 1
    pending = candidates
    for left in reversed(range(ATTEMPTS)):
        views = {candidate.name: apply(job.stack, candidate.plan) for candidate in pending}
        timings = bench({"original": job.stack.model} | views, tokens=STEPS)
        for candidate in pending:
            candidate.speedup = timings[candidate.name][0].decode_speedup
        missing = [candidate for candidate in pending if not candidate.reaches(job.speedup)] if left else []
        pending = [candidate for candidate in missing if _go_on(job, candidate)]  # the new points are measured next
        if not pending:
            return


def _go_on(job: Job, candidate: Contender) -> bool:
    """Move to the smallest cut whose prediction compensates for the deviation of the measurement, if there is one."""
    assert candidate.speedup is not None
    required = job.times.speedup(candidate.plan) * job.speedup / candidate.speedup.median
    try:
        point = first_reaching(candidate.series, job.times, required)
    except BudgetError:
        return False
    moved = point != candidate.point
    candidate.point = point
    return moved


def measure_curves(job: Job, candidates: list[Contender]) -> None:
    """Measure fidelity and speed along every series: at the chosen point, and at a few before it as time permits.

    Args:
        job: the inputs.
        candidates: the series; their points are added.
    """
    fidelity, confidence = FidelityTest(job.stack, job.test), confidence_of_each(len(candidates))
    for candidate in track(candidates, "fidelity against speed"):
        series, end = candidate.series, time.monotonic() + CURVE_SECONDS
        indices = [candidate.point, *(index for index in _spread(candidate) if index != candidate.point)]
        fidelities: dict[int, Fidelity] = {}
        for index in track(indices, "fidelity along the series"):
            if fidelities and time.monotonic() > end:
                break
            fidelities[index] = fidelity.of(apply(job.stack, series[index]))
        others = {str(index): apply(job.stack, series[index]) for index in fidelities if index != candidate.point}
        timings = bench({"original": job.stack.model} | others, tokens=STEPS, rounds=3) if others else {}
        for index in sorted(fidelities, key=lambda index: series[index].removed):
            plan, chosen = series[index], index == candidate.point
            speedup = candidate.speedup if chosen else timings[str(index)][0].decode_speedup
            candidate.points.append(
                {
                    "point": index,
                    "sublayers_removed": plan.removed,
                    "predicted_speedup": job.times.speedup(plan),
                    "measured_speedup": vars(speedup),
                    "fidelity": fidelities[index].as_dict(confidence),
                    "chosen": chosen,
                    "pareto": False,
                }
            )
    points = [point for candidate in candidates for point in candidate.points]
    for point in points:
        point["pareto"] = not any(_beats(other, point) for other in points)


def confidence_of_each(candidates: int) -> float:
    """Return the confidence of the bounds of each candidate, with which those of the chosen one have the usual one.

    The test chooses among the planners, so its bounds must hold for all of them at once (Bonferroni's inequality).

    Args:
        candidates: number of planners.
    """
    return 1 - (1 - CONFIDENCE) / candidates


def _spread(candidate: Contender) -> list[int]:
    """Return a few points of the series, evenly spaced from the unchanged model to the chosen plan."""
    size = candidate.plan.removed
    smaller = [index for index, plan in enumerate(candidate.series) if plan.removed <= size]
    smaller.sort(key=lambda index: candidate.series[index].removed)
    count = min(CURVE_POINTS, len(smaller))
    spread = [smaller[round(k * (len(smaller) - 1) / max(count - 1, 1))] for k in range(count)]
    return list(dict.fromkeys([*spread, candidate.point]))


def _beats(other: dict[str, Any], point: dict[str, Any]) -> bool:
    """Return whether ``other`` is both faster and closer to the original."""
    faster = other["measured_speedup"]["median"] - point["measured_speedup"]["median"]
    closer = point["fidelity"]["kl"]["mean"] - other["fidelity"]["kl"]["mean"]
    return faster >= 0 and closer >= 0 and (faster > 0 or closer > 0)
