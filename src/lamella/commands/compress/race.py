"""Comparison of routes: a form of the weights, and a series of plans of which one reaches the target in that form."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass, field
from typing import Any

from torch import LongTensor

from lamella import formatting
from lamella.commands.compress.forms import Form, Runtime, without
from lamella.commands.compress.goal import Goal
from lamella.commands.compress.routes import beats
from lamella.data import ImageText, Text
from lamella.errors import BudgetError, MethodError
from lamella.evaluate import Budget, Fidelity, FidelityTest, Ratio
from lamella.evaluate.confidence import CONFIDENCE
from lamella.files import Finished, Work
from lamella.measure import describe
from lamella.needs import now
from lamella.plan import ModelReference, Plan, PlanSeries
from lamella.planners import Planner, Race, first_reaching, planned_on
from lamella.progress import track
from lamella.stack import Position, Stack

MARGIN = 1.03  # factor by which a search exceeds the target, since measurements deviate from the cost model
ATTEMPTS = 4
WHOLE = "quantize"  # the method of the route that cuts nothing
CURVE_POINTS = 6
CURVE_SECONDS = 14.0  # time limit for the fidelity of a series at points other than the chosen one


@dataclass(frozen=True)
class Job:
    """The common inputs of all steps of a compression.

    Attributes:
        stack: the original.
        calibration: data for planning.
        test: data for evaluation, token ids [sequences, time] or images with text.
        goal: the goal.
        seed: random seed.
        work: the folder of the searches' journals.
        runtime: the program that runs the routes.
        original: the form of the original's weights in it, to which speeds are relative.
    """

    stack: Stack
    calibration: Text | ImageText
    test: LongTensor | ImageText
    goal: Goal
    seed: int
    work: Work
    runtime: Runtime
    original: Form


@dataclass
class Contender:
    """A route: a form of the weights and a series of plans, and the plan that was chosen from it.

    Attributes:
        method: slug of the planner; :data:`WHOLE` if nothing is cut.
        label: title of the planner.
        series: the plans.
        form: the form of the weights.
        baseline: whether the planner exists for comparison.
        is_curve: whether its smaller plans are measured as well.
        seconds: duration of planning.
        point: index of the chosen plan.
        speedup: its measured decode speed-up.
        weights: bytes of its weights.
        points: measurements along the series, for evidence.
    """

    method: str
    label: str
    series: PlanSeries
    form: Form
    baseline: bool = False
    is_curve: bool = True
    seconds: float = 0.0
    point: int = 0
    speedup: Ratio | None = None
    weights: int = 0
    points: list[dict[str, Any]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The planner and the form of the weights, such as ``portfolio + int8``."""
        cut = [] if self.is_whole else [self.method]
        return " + ".join([*cut, *filter(None, [self.form.name])])

    @property
    def is_whole(self) -> bool:
        """Whether the chosen plan leaves the model as it is."""
        return self.method == WHOLE

    @property
    def plan(self) -> Plan:
        """The chosen plan."""
        return self.series[self.point]

    @property
    def chosen(self) -> dict[str, Any]:
        """The measurements of the chosen plan."""
        return next(point for point in self.points if point["chosen"])

    @property
    def kl(self) -> float:
        """KL divergence of the chosen plan from the original, nats; infinite if it has not been measured."""
        return next((point["fidelity"]["kl"]["mean"] for point in self.points if point["chosen"]), math.inf)

    def reaches(self, goal: Goal) -> bool:
        """Return whether the chosen plan reaches a goal."""
        assert self.speedup is not None
        return goal.is_reached(self.speedup, self.weights, self.weights + self.form.cache(self.plan), self.kl)

    def rank(self, goal: Goal) -> tuple[bool, float]:
        """Return a sort key, lower is better: KL divergence if the goal is reached; else, and for a loss, speed."""
        assert self.speedup is not None
        is_reached = self.reaches(goal)
        return not is_reached, self.kl if is_reached and goal.name != "loss" else -self.speedup.median


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


def search(job: Job, planner: Planner, form: Form, minutes: float | None) -> Contender:
    """Run one planner as far as the target requires, plus a margin for deviations of the measurement.

    A resumed run goes on with the plans of a search that had ended, so that a healing of one of them resumes as well.

    Args:
        job: the inputs.
        planner: the planner.
        form: the form of the weights in which its plans run.
        minutes: time limit of the search; None sets no limit.
    """
    budget = Budget(minutes=minutes, **_goal(job, form))
    entry = planner.method
    work = job.work.within(f"plans-{form.name}" if form.name else "plans")
    options = entry.signature.fill(planner.options, budget, work, seed=job.seed)
    inputs = {
        "model": ModelReference.of(job.stack).model_dump(),
        "calibration": describe(job.calibration),
        "goal": [job.goal.name, job.goal.value, job.goal.program, form.name],
        "options": {name: str(value) for name, value in planner.options.items()},
        "minutes": minutes,
        "seed": job.seed,
    }
    file = work.directory(entry.slug) / "series.json"

    def plan() -> float:
        begin = now()
        series: PlanSeries = entry(job.stack, **planned_on(entry, job.calibration), **options)
        seconds = now() - begin
        series.write(file)
        return seconds

    seconds = Finished(work.journal(f"{entry.slug}-ended"), inputs).once("seconds", plan)
    return Contender(entry.slug, entry.title, PlanSeries.read(file), form, baseline=entry.baseline, seconds=seconds)


def _goal(job: Job, form: Form) -> dict[str, Any]:
    """Return the goal of a search, as fields of its budget; a loss limits the choice from its series only."""
    goal, layers = job.goal, len(job.stack)
    if goal.name == "loss":
        return {}
    if form.program == "torch" and not form.name:  # what the planners' own cost model describes
        return {goal.name: MARGIN * goal.value if goal.name == "speedup" else goal.value}

    def enough(gone: frozenset[Position]) -> bool:
        if goal.name == "speedup":
            return form.times.speedup_without(gone, layers) >= form.remaining(MARGIN * goal.value)
        cache = form.cache(without(job.stack, gone)) if goal.name == "memory" else 0
        return form.weights(gone) + cache <= 1e6 * goal.value

    return {"until": enough}


def quantised_alone(stack: Stack, form: Form) -> Contender:
    """Return the route that changes the form of the weights and cuts nothing.

    Args:
        stack: the model.
        form: the form.
    """
    whole = PlanSeries.of_removals(ModelReference.of(stack), [], [{}])
    label = f"weights in {form.name}, nothing removed"
    return Contender(WHOLE, label, whole, form, speedup=form.speedup, weights=form.weights())


def check_reachable(job: Job, form: Form) -> None:
    """Check a goal against the model with a single MLP sublayer left, the bound of all plans.

    Args:
        job: the inputs.
        form: the form of the weights.

    Raises:
        BudgetError: for a goal beyond it.
    """
    gone, goal = frozenset(job.stack.positions[:-1]), job.goal
    ceiling = form.speedup.median * form.times.speedup_without(gone, len(job.stack))
    weights = form.weights(gone)
    floor = weights + (form.cache(without(job.stack, gone)) if goal.name == "memory" else 0)
    limits = {
        "speedup": (goal.value <= ceiling, f"{ceiling:.2f}"),
        "size": (floor <= 1e6 * goal.value, formatting.size(floor)),
        "memory": (floor <= 1e6 * goal.value, formatting.size(floor)),
    }
    is_possible, limit = limits.get(goal.name, (True, ""))
    if not is_possible:
        raise BudgetError(
            f"{goal.text} cannot be reached on {job.stack.name}: {limit} is reached with a single sublayer, since the "
            "head and the loop remain; ask for less, or remove tokens from its vocabulary first (lamella vocab)"
        )


def choose(job: Job, candidates: list[Contender]) -> None:
    """Pick each series' smallest cut that reaches the goal, measure it, and move on if a speed-up is missed.

    Args:
        job: the inputs.
        candidates: the routes; their chosen points are updated.

    Raises:
        BudgetError: if the only candidate cannot reach the goal even in the cost model.
    """
    for candidate in candidates:
        try:
            candidate.point = _first(job, candidate)
        except BudgetError:
            if len(candidates) == 1:
                raise
            candidate.point = len(candidate.series) - 1
    pending = [candidate for candidate in candidates if candidate.speedup is None]
    for left in reversed(range(ATTEMPTS)):
        timings = _timed(job, {each.name: (each.form, each.plan) for each in pending})
        for candidate in pending:
            candidate.speedup = timings[candidate.name]
            candidate.weights = candidate.form.bytes(job.stack, candidate.plan)
        if job.goal.name != "speedup" or not left:  # what else there is does not vary from run to run
            return
        missing = [each for each in pending if each.speedup is not None and each.speedup.median < job.goal.value]
        pending = [candidate for candidate in missing if _go_on(job, candidate)]  # the new points are measured next
        if not pending:
            return


def _timed(job: Job, plans: dict[str, tuple[Form, Plan]], **limits: Any) -> dict[str, Ratio]:
    """Return the decode speed-ups of some plans over the original."""
    if not plans:
        return {}
    variants = {name: (form, job.stack, plan) for name, (form, plan) in plans.items()}
    timings = job.runtime.bench({"original": (job.original, job.stack, None), **variants}, **limits)
    return {name: timings[name][0].decode_speedup for name in plans}


def _first(job: Job, candidate: Contender) -> int:
    """Return the index of the smallest cut that reaches the goal; for a loss, of the largest one within it."""
    goal, series, form = job.goal, candidate.series, candidate.form
    if goal.name == "speedup":
        return _reaching(candidate, goal.value)
    order = sorted(range(len(series)), key=lambda index: series[index].removed)
    if goal.name == "loss":
        tokens = job.calibration.tokens if isinstance(job.calibration, Text) else job.calibration
        test = FidelityTest(job.stack, tokens)

        def exceeds(index: int) -> bool:
            return test.of(form.view(job.stack, series[index])).kl.mean > goal.value

        return order[max(bisect_left(order, True, key=exceeds) - 1, 0)]

    def is_small(index: int) -> bool:
        weights = form.bytes(job.stack, series[index])
        return weights + (form.cache(series[index]) if goal.name == "memory" else 0) <= 1e6 * goal.value

    at = bisect_left(order, True, key=is_small)
    if at == len(order):
        raise BudgetError(f"{goal.text} cannot be reached by {candidate.method}: ask for less")
    return order[at]


def _reaching(candidate: Contender, speedup: float) -> int:
    """Return the index of the smallest cut that reaches a speed-up in the candidate's form."""
    return first_reaching(candidate.series, candidate.form.times, candidate.form.remaining(speedup))


def _go_on(job: Job, candidate: Contender) -> bool:
    """Move to the smallest cut whose prediction compensates for the deviation of the measurement, if there is one."""
    assert candidate.speedup is not None
    required = candidate.form.predicted(candidate.plan) * job.goal.value / candidate.speedup.median
    try:
        point = _reaching(candidate, required)
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
        series, end = candidate.series, now() + CURVE_SECONDS
        smaller = _spread(candidate) if candidate.is_curve else []
        indices = [candidate.point, *(index for index in smaller if index != candidate.point)]
        fidelities: dict[int, Fidelity] = {}
        for index in track(indices, "fidelity along the series"):
            if fidelities and now() > end:
                break
            fidelities[index] = fidelity.of(candidate.form.view(job.stack, series[index]))
        others = {str(index): (candidate.form, series[index]) for index in fidelities if index != candidate.point}
        timings = _timed(job, others, rounds=3)
        for index in sorted(fidelities, key=lambda index: series[index].removed):
            plan, chosen = series[index], index == candidate.point
            speedup = candidate.speedup if chosen else timings[str(index)]
            candidate.points.append(
                {
                    "point": index,
                    "sublayers_removed": plan.removed,
                    "predicted_speedup": candidate.form.predicted(plan),
                    "measured_speedup": vars(speedup),
                    "fidelity": fidelities[index].as_dict(confidence),
                    "chosen": chosen,
                    "pareto": False,
                }
            )
    points = [point for candidate in candidates for point in candidate.points]
    for point in points:
        point["pareto"] = not any(beats(_place(other), _place(point)) for other in points)


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


def _place(point: dict[str, Any]) -> tuple[float, float]:
    """Return speed-up and KL divergence of a point of a curve."""
    return point["measured_speedup"]["median"], point["fidelity"]["kl"]["mean"]
