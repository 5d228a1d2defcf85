"""SkipPipe: train over slow links, where every microbatch takes its own path through the stages and leaves some out.

Blagoev, Chen and Ersoy, "SkipPipe: Partial and Reordered Pipelining Framework for Training LLMs in Heterogeneous
Networks", arXiv 2502.19913.

    stages of layers     0        1        2        3        4        5       each on some nodes, far from each other
    microbatch a         o--------o-----------------o--------o                 a third is skipped
    microbatch b         o-----------------o--------x--------x                 and neighbours may change places
                         ^ embedding, head and loss; gradients come back the same way

    plan     which node is in which stage (allocation.py), the path of each microbatch (route.py, planner.py), and what
             an iteration takes (simulate.py)
    train    along those paths, one process for each node (executor.py), or all of them in one (recipe.py)
    omit     what the model loses without stages, those that training has left out and others
    itself   the plans that leave out the stages which are missed least

Embedding, norm and head belong to stage 0, which is never left out. A stage's gradient is the mean over the
microbatches that have visited it (ours; with visits equally often it is the authors').
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Annotated, Any

from annotated_types import Ge, Le, Lt, MinLen

from lamella import provenance
from lamella.data import Text
from lamella.errors import MethodError
from lamella.methods.skippipe.allocation import Evolution, allocate, even
from lamella.methods.skippipe.baselines import full, unweighted
from lamella.methods.skippipe.network import Network
from lamella.methods.skippipe.paths import Limits
from lamella.methods.skippipe.planner import Limit
from lamella.methods.skippipe.schedule import Schedule, scheduled, visits
from lamella.methods.skippipe.simulate import iteration, simulate
from lamella.methods.skippipe.stages import Order, layers_of, left_out, losses, omissions, spans
from lamella.plan import ModelReference, PlanSeries, Point
from lamella.registry import command, method
from lamella.results import Study
from lamella.stack import Stack

MOST = 8  # stages whose sets are all measured


@method("skippipe", paper="2502.19913", purpose="heal")
def skippipe(stack: Stack, calibration: Text, *, stages: Annotated[int, Ge(2), Le(MOST)] | None = None) -> PlanSeries:
    """Leave out whole stages of layers, of every number those without which the text is predicted best.

    Best after ``skippipe train``, which makes a model that can do without them.

    Args:
        stack: the model; it is not changed.
        calibration: text, or token ids [sequences, time].
        stages: of how many the model is made; the authors' 6 when left out. The first is never left out.

    Returns:
        The series from the whole model to the first stage and one more, with the loss of each in nats per token.

    Raises:
        MethodError: for stages that do not fit the model.
    """
    parts = spans(stack, stages)
    whole = tuple(range(len(parts)))
    orders = [whole, *(order for count in range(1, max(2, len(parts) - 1)) for order in omissions(len(parts), count))]
    loss = dict(zip(orders, losses(stack, calibration, parts, orders), strict=True))
    points, removed = [Point(scores={"loss": loss[whole]})], 0
    for count in range(1, max(2, len(parts) - 1)):
        best = min(omissions(len(parts), count), key=lambda order: loss[order])
        gone = layers_of(parts, left_out(len(parts), best))
        if len(gone) > removed:  # stages may differ in length
            points.append(Point(drop=[f"layers.{layer}" for layer in gone], scores={"loss": loss[best]}))
            removed = len(gone)
    return PlanSeries(model=ModelReference.of(stack), points=points)


@command(
    "skippipe", "plan", on="any", brief={"stages": 2, "skip": 0.0, "microbatches": 2, "trials": 20, "population": 6}
)
def plan(
    network: Network,
    *,
    stages: Annotated[int, Ge(1)] = 6,
    sizes: Annotated[tuple[Annotated[int, Ge(1)], ...], MinLen(1)] | None = None,
    skip: Annotated[float, Ge(0), Lt(1)] = 1 / 3,
    microbatches: Annotated[int, Ge(1)] = 6,
    swaps: Annotated[int, Ge(0)] = 2,
    jump: Annotated[int, Ge(1)] = 4,
    evolution: Evolution = Evolution(),  # noqa: B008, frozen
    limit: Limit = Limit(),  # noqa: B008, frozen
    seed: int = 0,
) -> Schedule:
    """Plan which node holds which stage, and the path of every microbatch, over the links of a network.

    Args:
        network: nodes, and the links between their regions.
        stages: of the model; the authors' 6.
        sizes: nodes of each stage, separated by commas; all alike when left out, with what is left over in the first.
        skip: the share of stages that a microbatch leaves out; the authors' third.
        microbatches: of an iteration, for every node of the first stage; the authors' 6.
        swaps: how often a path may go back to the stage before the one that it has come to; the authors' 2.
        jump: how many stages a step may go ahead at most; the authors' 4.
        evolution: of the search for stages.
        limit: of the search for paths. What has been found by then is returned.
        seed: of what is drawn.

    Returns:
        The schedule, with what an iteration takes in the full pipeline, with paths by chance, with paths that only
        share the load, and with its own, as the simulator says.

    Raises:
        MethodError: for a network that lacks a link or memory, sizes that do not fit it, or paths that do not exist.
    """
    sizes = even(len(network), stages) if sizes is None else sizes
    if len(sizes) != stages:
        raise MethodError(f"sizes of {len(sizes)} stages are given, and stages {stages}")
    limits = Limits(length=max(1, stages - round(skip * stages)), swaps=swaps, total=swaps, jump=jump)
    assignment = allocate(network, sizes, evolution, seed)
    count = microbatches * sizes[0]
    made, planned = scheduled(network, assignment, count, limits, limit=limit)
    light, _ = scheduled(network, assignment, count, limits, limit=limit, avoids="load")
    chance, _ = scheduled(
        network, assignment, count, limits, limit=limit, avoids="load", costs=unweighted(network, seed)
    )
    chains = full(network, assignment, count)
    predicted = {
        "full": iteration(simulate(network, chains, count)),
        "by chance": chance.seconds,
        "load alone": light.seconds,
        "planned": made.seconds,
    }
    made.findings = {
        "nodes": [
            {"node": node, "region": network.nodes[node].region, "stage": stage, "memory": network.nodes[node].memory}
            for stage, nodes in enumerate(assignment.stages)
            for node in nodes
        ],
        "paths": [
            {"nodes": list(path), "stages": list(order)} for path, order in zip(made.paths, made.orders, strict=False)
        ],
        "visits": [visits(made.orders)[stage] for stage in range(stages)],
        "microbatches": count,
        "predicted": predicted,
        "bound": planned.bound,
        "plans looked at": planned.expansions,
        "stopped by the limit": planned.stopped,
        "collisions": planned.collisions,
        "gantt": [list(each) for each in made.served],
    }
    if planned.stopped:
        made.notes = ["The search for paths ended with its limit: more time may find better ones."]
    return made


@command("skippipe", "omit", brief={"pipeline": None})
def omit(
    stack: Stack,
    calibration: Text,
    pipeline: Schedule | None = None,
    *,
    stages: Annotated[int, Ge(2), Le(MOST)] | None = None,
    most: Annotated[int, Ge(1)] = 3,
) -> Study:
    """Measure what a model loses without stages: every set of up to some, neighbours swapped, and the first one gone.

    Args:
        stack: the model.
        calibration: text to measure on, or token ids [sequences, time].
        pipeline: the schedule along which it was trained: sets that its paths leave out are told apart from others.
        stages: without a schedule, of how many the model is made; the authors' 6 when left out.
        most: how many stages are left out at most.

    Returns:
        The loss of ``full`` depth and of every set in nats per token, by number of stages that are ``omitted``, of
        neighbours ``swapped``, and ``without the first``.

    Raises:
        MethodError: for stages that do not fit the model.
    """
    parts = spans(stack, len(pipeline.assignment) if pipeline is not None else stages)
    count = len(parts)
    if count > MOST:
        raise MethodError(f"the schedule has {count} stages: every set of them is measured, so give at most {MOST}")
    whole = tuple(range(count))
    less = [order for gone in range(1, min(most, count - 1) + 1) for order in omissions(count, gone)]
    swapped = [_swapped(whole, stage) for stage in range(1, count - 1)]
    orders: list[Order] = [whole, *less, *swapped, whole[1:]]
    loss = dict(zip(orders, losses(stack, calibration, parts, orders), strict=True))
    trained = set() if pipeline is None else {left_out(count, order) for order in pipeline.orders}
    sets = [
        {"without": list(gone := left_out(count, order)), "loss": loss[order]}
        | ({} if pipeline is None else {"trained": gone in trained})
        for order in less
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


def _swapped(whole: Order, stage: int) -> Order:
    """Neighbours in the wrong order."""
    return (*whole[:stage], whole[stage + 1], whole[stage], *whole[stage + 2 :])


def _means(sets: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean, best and worst of the sets of each size; and of those that training has left out, where it is known."""
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
