"""SkipPipe: train over slow links, where every microbatch takes its own path through the stages and skips some of them.

Blagoev, Chen and Ersoy, "SkipPipe: Partial and Reordered Pipelining Framework for Training LLMs in Heterogeneous
Networks", arXiv 2502.19913.

    stages of layers     0        1        2        3        4        5       each on some nodes, far from each other
    microbatch a         o--------o-----------------o--------o                 a third is skipped
    microbatch b         o-----------------o--------x--------x                 and neighbours may be swapped
                         ^ embedding, head and loss; gradients come back the same way

    plan     the stage of each node (allocation.py), the path of each microbatch (route.py, planner.py), and the time of
             an iteration (simulate.py)
    train    along those paths, with one process per node (executor.py), or all of them in one (recipe.py)
    omit     the loss of the model without stages, those that were skipped in training and others
    itself   plans that remove the stages with the smallest effect on the loss

Embedding, norm and head belong to stage 0, which is never skipped. A stage's gradient is the mean over the microbatches
that visited it (ours; with equally frequent visits it is the authors').
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Annotated, Any

from annotated_types import Ge, Le, Lt, MinLen

from lamella import provenance
from lamella.data import Text
from lamella.errors import MethodError
from lamella.methods.skippipe.allocation import AllocationSearch, allocate, even_sizes
from lamella.methods.skippipe.baselines import full_pipeline, random_costs
from lamella.methods.skippipe.network import PipelineNetwork
from lamella.methods.skippipe.paths import Limits
from lamella.methods.skippipe.planner import Limit
from lamella.methods.skippipe.schedule import PipelineSchedule, make_schedule, visits
from lamella.methods.skippipe.simulate import iteration, simulate
from lamella.methods.skippipe.stages import Order, layers_of, left_out, losses, omissions, spans
from lamella.plan import ModelReference, PlanSeries, Point
from lamella.registry import command, method
from lamella.results import Study
from lamella.stack import Stack

MOST = 8  # up to this number of stages, all subsets are measured


@method("skippipe", paper="2502.19913", purpose="heal")
def skippipe(stack: Stack, calibration: Text, *, stages: Annotated[int, Ge(2), Le(MOST)] | None = None) -> PlanSeries:
    """Remove whole stages of layers: for every number of stages, those without which the loss is lowest.

    Best after ``skippipe train``, which trains a model to tolerate missing stages.

    Args:
        stack: the model; it is not changed.
        calibration: text, or token ids `[sequences, time]`.
        stages: the number of stages that the layers are divided into; the authors' 6 if omitted. The first is always
            kept.

    Returns:
        The series from the whole model to the first stage and one more, with the loss of each plan in nats per token.

    Raises:
        MethodError: for a number of stages that does not fit the model.
    """
    parts = spans(stack, stages)
    whole = tuple(range(len(parts)))
    orders = [whole, *(order for count in range(1, max(2, len(parts) - 1)) for order in omissions(len(parts), count))]
    loss = dict(zip(orders, losses(stack, calibration, parts, orders), strict=True))
    points, removed = [Point(scores={"loss": loss[whole]})], 0
    for count in range(1, max(2, len(parts) - 1)):
        best = min(omissions(len(parts), count), key=lambda order: loss[order])
        omitted = layers_of(parts, left_out(len(parts), best))
        if len(omitted) > removed:  # stages may differ in length
            points.append(Point(drop=[f"layers.{layer}" for layer in omitted], scores={"loss": loss[best]}))
            removed = len(omitted)
    return PlanSeries(model=ModelReference.of(stack), points=points)


@command(
    "skippipe", "plan", on="any", brief={"stages": 2, "skip": 0.0, "microbatches": 2, "trials": 20, "population": 6}
)
def plan(
    network: PipelineNetwork,
    *,
    stages: Annotated[int, Ge(1)] = 6,
    sizes: Annotated[tuple[Annotated[int, Ge(1)], ...], MinLen(1)] | None = None,
    skip: Annotated[float, Ge(0), Lt(1)] = 1 / 3,
    microbatches: Annotated[int, Ge(1)] = 6,
    swaps: Annotated[int, Ge(0)] = 2,
    jump: Annotated[int, Ge(1)] = 4,
    evolution: AllocationSearch = AllocationSearch(),  # noqa: B008, frozen
    limit: Limit = Limit(),  # noqa: B008, frozen
    seed: int = 0,
) -> PipelineSchedule:
    """Plan which node holds which stage, and the path of every microbatch, over the links of a network.

    Args:
        network: nodes, and the links between their regions.
        stages: number of stages of the model; the authors use 6.
        sizes: nodes of each stage, separated by commas; if omitted, equal sizes with the remaining nodes in the first.
        skip: fraction of stages that a microbatch skips; the authors use a third.
        microbatches: microbatches per iteration and node of the first stage; the authors use 6.
        swaps: how often a path may go back to the stage before the furthest one that it has visited; the authors use 2.
        jump: by how many stages a step may advance at most; the authors use 4.
        evolution: settings of the genetic search that allocates nodes to stages.
        limit: limits of the search for paths. The best paths found by then are returned.
        seed: random seed.

    Returns:
        The schedule, with the simulated seconds of an iteration in the full pipeline, with random paths, with paths
        that only balance the load, and with the planned paths.

    Raises:
        MethodError: for a network that lacks a link or memory, sizes that do not fit it, or if no path exists.
    """
    sizes = even_sizes(len(network), stages) if sizes is None else sizes
    if len(sizes) != stages:
        raise MethodError(f"sizes has {len(sizes)} entries, but stages is {stages}: give one size per stage")
    limits = Limits(length=max(1, stages - round(skip * stages)), swaps=swaps, total=swaps, jump=jump)
    assignment = allocate(network, sizes, evolution, seed)
    count = microbatches * sizes[0]
    schedule, result = make_schedule(network, assignment, count, limits, limit=limit)
    balanced, _ = make_schedule(network, assignment, count, limits, limit=limit, avoids="load")
    randomised, _ = make_schedule(
        network, assignment, count, limits, limit=limit, avoids="load", costs=random_costs(network, seed)
    )
    chains = full_pipeline(network, assignment, count)
    predicted = {
        "full": iteration(simulate(network, chains, count)),
        "random": randomised.seconds,
        "load alone": balanced.seconds,
        "planned": schedule.seconds,
    }
    schedule.findings = {
        "nodes": [
            {"node": node, "region": network.nodes[node].region, "stage": stage, "memory": network.nodes[node].memory}
            for stage, nodes in enumerate(assignment.stages)
            for node in nodes
        ],
        "paths": [
            {"nodes": list(path), "stages": list(order)}
            for path, order in zip(schedule.paths, schedule.orders, strict=False)
        ],
        "visits": [visits(schedule.orders)[stage] for stage in range(stages)],
        "microbatches": count,
        "predicted": predicted,
        "bound": result.bound,
        "plans expanded": result.expansions,
        "stopped by the limit": result.stopped,
        "collisions": result.collisions,
        "gantt": [list(each) for each in schedule.timeline],
    }
    if result.stopped:
        schedule.notes = ["The search for paths stopped at its limit: more time may find better paths."]
    return schedule


@command("skippipe", "omit", brief={"pipeline": None})
def omit(
    stack: Stack,
    calibration: Text,
    pipeline: PipelineSchedule | None = None,
    *,
    stages: Annotated[int, Ge(2), Le(MOST)] | None = None,
    most: Annotated[int, Ge(1)] = 3,
) -> Study:
    """Measure the loss without stages: every subset up to a size, swapped neighbours, and without the first one.

    Args:
        stack: the model.
        calibration: text to measure on, or token ids `[sequences, time]`.
        pipeline: the schedule of its training; subsets that its paths skipped are reported separately from others.
        stages: without a schedule, the number of stages; the authors' 6 if omitted.
        most: maximum number of stages to remove.

    Returns:
        The loss at ``full`` depth and of every subset in nats per token, by number of ``omitted`` stages, of neighbours
        ``swapped``, and ``without the first``.

    Raises:
        MethodError: for a number of stages that does not fit the model.
    """
    parts = spans(stack, len(pipeline.assignment) if pipeline is not None else stages)
    count = len(parts)
    if count > MOST:
        raise MethodError(f"the schedule has {count} stages: every subset is measured, so at most {MOST} are supported")
    whole = tuple(range(count))
    reduced = [order for omitted in range(1, min(most, count - 1) + 1) for order in omissions(count, omitted)]
    swapped = [_swap_neighbours(whole, stage) for stage in range(1, count - 1)]
    orders: list[Order] = [whole, *reduced, *swapped, whole[1:]]
    loss = dict(zip(orders, losses(stack, calibration, parts, orders), strict=True))
    trained = set() if pipeline is None else {left_out(count, order) for order in pipeline.orders}
    sets = [
        {"without": list(omitted := left_out(count, order)), "loss": loss[order]}
        | ({} if pipeline is None else {"trained": omitted in trained})
        for order in reduced
    ]
    findings: dict[str, Any] = {
        "data": provenance.describe(calibration),
        "stages": [list(part) for part in parts],
        "full": loss[whole],
        "omitted": sets,
        "means": _means(sets),
        "swapped": [{"stages": [stage, stage + 1], "loss": loss[swapped[stage - 1]]} for stage in range(1, count - 1)],
        "without the first": loss[whole[1:]],
    }
    return Study(findings=findings)


def _swap_neighbours(whole: Order, stage: int) -> Order:
    """Return the order in which a stage and its successor are swapped."""
    return (*whole[:stage], whole[stage + 1], whole[stage], *whole[stage + 2 :])


def _means(sets: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return mean, best and worst loss per subset size, for all subsets and by whether training skipped them."""
    found = []
    for size in sorted({len(each["without"]) for each in sets}):
        for trained in (None, True, False):
            chosen = [
                each["loss"]
                for each in sets
                if len(each["without"]) == size and (trained is None or each.get("trained") is trained)
            ]
            if chosen:
                kind = {"trained": trained} if trained is not None else {}
                found.append({"omitted": size, "mean": fmean(chosen), "best": min(chosen), "worst": max(chosen)} | kind)
    return found
