"""Planners side by side: their series, the points that reach the target, and what was measured there."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from torch import LongTensor

from lamella.data import ImageText, Text
from lamella.errors import BudgetError, MethodError
from lamella.evaluate import Budget, Fidelity, FidelityTest, Ratio, StepTimes, bench
from lamella.files import Work
from lamella.plan import Plan, PlanSeries
from lamella.planners import Planner, Race, first_reaching, planned_on
from lamella.progress import track
from lamella.runtime import apply
from lamella.stack import Stack

TOLERANCE = 0.98  # of the target: what counts as reached, since two runs of one model differ by about as much
MARGIN = 1.03  # how far past the target a search goes, in case the measurement disagrees with the cost model
ATTEMPTS = 4
STEPS = 16  # of decoding in a round of a timing loop
CURVE_POINTS = 6
CURVE_SECONDS = 45.0  # for the fidelity of a series at other points than the chosen one


@dataclass(frozen=True)
class Job:
    """What every step of a compression needs to know.

    Attributes:
        stack: the original.
        calibration: what to plan on.
        test: what to measure on, token ids [sequences, time] or images with text.
        times: where the time of one decoding step of the original goes.
        speedup: the decode speed-up to reach.
        minutes: for which each search may compare; None sets no limit.
        seed: of all random draws.
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
    """A series of plans, and the point of it that reaches the target.

    Attributes:
        name, label: the slug of the planner, and its title.
        baseline: whether the planner is there to compare with.
        seconds: how long planning took.
        point: the index of the chosen plan.
        speedup: the decode speed-up that was measured for it.
        points: what was measured along the series, as evidence holds it.
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
        return self.series[self.point]

    @property
    def chosen(self) -> dict[str, Any]:
        """What was measured at the chosen point."""
        return next(point for point in self.points if point["chosen"])

    def reaches(self, speedup: float) -> bool:
        assert self.speedup is not None
        return reaches(self.speedup, speedup)

    def loss(self, speedup: float) -> tuple[bool, float]:
        """How good the chosen plan is, the least being the best: reaching the target first, then KL."""
        return not self.reaches(speedup), self.chosen["fidelity"]["kl"]["mean"]


def reaches(measured: Ratio, speedup: float) -> bool:
    """Whether a measured speed-up is the one that is wanted, but for what two runs of one model differ by."""
    return measured.median >= TOLERANCE * speedup


def entrants(race: Race, stack: Stack, calibration: Text | ImageText) -> list[Planner]:
    """The planners of a race that can plan for a model with less work.

    Raises:
        MethodError: for a planner that was named and cannot.
    """
    shows = isinstance(calibration, ImageText)
    if race.is_open:
        fitting = [each for each in race.planners if each.method.takes(stack)]
        return [each for each in fitting if each.method.reads_images or not shows]
    dense = next((each.slug for each in race.planners if each.method.dense), None)
    if dense is not None:
        raise MethodError(
            f"{dense} sets weights to zero, which dense kernels compute with all the same, so it cannot reach a "
            f"speed-up: use `lamella plan {dense}` and `lamella apply`"
        )
    return list(race.planners)


def search(job: Job, planner: Planner) -> Contender:
    """Run one planner as far as the target needs, and a little further in case the measurement disagrees."""
    budget = Budget(minutes=job.minutes, speedup=MARGIN * job.speedup)
    entry = planner.method
    options = entry.signature.fill(planner.options, budget, job.work.within("plans"), seed=job.seed)
    begin = time.perf_counter()
    series: PlanSeries = entry(job.stack, **planned_on(entry, job.calibration), **options)
    return Contender(entry.slug, entry.title, series, entry.baseline, time.perf_counter() - begin)


def check_reachable(stack: Stack, times: StepTimes, speedup: float) -> None:
    """Check a target against the decode speed-up with a single MLP sublayer left: more than any plan can bring.

    Raises:
        BudgetError: for a target above it.
    """
    ceiling = times.speedup_without(stack.positions[:-1], len(stack))
    if speedup > ceiling:
        raise BudgetError(
            f"a speed-up of {speedup:g} cannot be reached on {stack.name}: {ceiling:.2f} is left with a single "
            "sublayer, since the head and the loop stay; ask for less"
        )


def choose(job: Job, candidates: list[Contender]) -> None:
    """Pick each series' smallest cut by the cost model, then measure, and go on where the target was missed.

    Raises:
        BudgetError: when the only candidate cannot reach the target even in the cost model.
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
        pending = [candidate for candidate in missing if _go_on(job, candidate)]  # what it moves to is measured next
        if not pending:
            return


def _go_on(job: Job, candidate: Contender) -> bool:
    """Move to the smallest cut whose prediction makes up for what the measurement lacked, if there is one."""
    assert candidate.speedup is not None
    wanted = job.times.speedup(candidate.plan) * job.speedup / candidate.speedup.median
    try:
        point = first_reaching(candidate.series, job.times, wanted)
    except BudgetError:
        return False
    moved = point != candidate.point
    candidate.point = point
    return moved


def measure_curves(job: Job, candidates: list[Contender]) -> None:
    """Fidelity and measured speed along every series: at the chosen point, and at a few before it as time goes."""
    fidelity = FidelityTest(job.stack, job.test)
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
                    "fidelity": fidelities[index].as_dict(),
                    "chosen": chosen,
                    "pareto": False,
                }
            )
    points = [point for candidate in candidates for point in candidate.points]
    for point in points:
        point["pareto"] = not any(_beats(other, point) for other in points)


def _spread(candidate: Contender) -> list[int]:
    """A few points of the series, evenly spaced from the whole model to the chosen plan."""
    size = candidate.plan.removed
    smaller = [index for index, plan in enumerate(candidate.series) if plan.removed <= size]
    smaller.sort(key=lambda index: candidate.series[index].removed)
    count = min(CURVE_POINTS, len(smaller))
    spread = [smaller[round(k * (len(smaller) - 1) / max(count - 1, 1))] for k in range(count)]
    return list(dict.fromkeys([*spread, candidate.point]))


def _beats(other: dict[str, Any], point: dict[str, Any]) -> bool:
    """Whether ``other`` is faster and closer to the original."""
    faster = other["measured_speedup"]["median"] - point["measured_speedup"]["median"]
    closer = point["fidelity"]["kl"]["mean"] - other["fidelity"]["kl"]["mean"]
    return faster >= 0 and closer >= 0 and (faster > 0 or closer > 0)
