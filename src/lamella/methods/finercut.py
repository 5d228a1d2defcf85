"""FinerCut: greedily remove the attention and MLP sublayers whose removal changes the model's output least.

Zhang et al., "FinerCut: Finer-grained Interpretable Layer Pruning for Large Language Models", arXiv 2405.18218.

    h = [A0] [M0] [A1] [M1] ... [A29] [M29] -> logits Z0          every sublayer is a separate candidate
    repeat:  d(s) = D(Z0, logits without removed + s)  for every s     Z0 always comes from the original model
             remove the s with the smallest d(s)

Every prefix of the removal order is valid, so one run serves every budget. Sublayers of the first layers are protected
initially (``exclude_front``) and become candidates later.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice, takewhile
from math import inf
from typing import Annotated, Literal

from annotated_types import Ge, Lt

from lamella.data import ImageText, Text
from lamella.errors import MethodError
from lamella.evaluate import Budget
from lamella.files import Work
from lamella.measure import DistanceName, OutputDistance, describe
from lamella.plan import ModelReference, PlanSeries, Point
from lamella.registry import method
from lamella.search import Removal, Removals, greedy, lazy_greedy, one_shot, swap, take
from lamella.stack import Group, Level, Position, Stack, groups_at, sites_of

REMOVE = 0.25  # default fraction of all sublayers to remove, used without a budget


@method("finercut", paper="2405.18218", purpose="prune")
def finercut(
    stack: Stack,
    calibration: Text | ImageText,
    *,
    distance: DistanceName = "jsd",
    level: Level = "sublayer",
    exclude_front: Annotated[float, Ge(0), Lt(1)] = 0.4,
    strategy: Literal["greedy", "lazy", "one_shot"] = "greedy",
    stop_when: float | None = None,
    largest: bool = False,
    refine: bool = False,
    budget: Budget = Budget(),
    work: Work = Work(),
) -> PlanSeries:
    """Greedily remove attention and MLP sublayers whose removal changes the model's output least.

    Args:
        stack: the opened model.
        calibration: text, or token ids [sequences, time] with an optional attention mask, or images with text; the
            paper uses 10 sequences of 256 tokens each.
        distance: ``jsd``, ``jsd_repo`` (as the authors' code computes it), ``kl``, ``angular``, ``norm`` or
            ``perplexity``.
        level: candidates are all sublayers (``sublayer``), only ``attn``, only ``mlp``, or whole layers (``block``).
        exclude_front: x of the paper: the first int(L x) + 1 layers are protected until int(2 L x) + 1 sublayers have
            been removed.
        strategy: ``greedy`` measures all candidates at every step; ``lazy`` only the candidates that were good before,
            which is faster and sometimes gives another result; ``one_shot`` measures once and removes in ascending
            order.
        stop_when: stop before the distance exceeds this value; if None, only the budget ends the search.
        largest: remove the most important candidates first, as a sanity check (only with ``one_shot``).
        refine: an extension of Lamella: at the end compare with removing whole layers, take the better set, and swap
            sublayers while that lowers the distance; the last plan of the series is then not a prefix of an order.
        budget: how much to remove; a quarter of all sublayers by default.
        work: folder from which an interrupted ``greedy`` run resumes; the other strategies start over.

    Returns:
        The plan series, starting with the unchanged model, each plan with its distance on the calibration text.

    Raises:
        MethodError: for values out of range, or an ``exclude_front`` that protects all layers.
    """
    groups = groups_at(level, stack.positions)
    if largest and strategy != "one_shot":
        raise MethodError("largest is a sanity check of the one_shot strategy: choose strategy one_shot")
    count = len(stack.positions)
    size = len(groups[0])
    protected = int(len(stack) * exclude_front) + 1  # the paper's n_ex, in layers
    free = [group for group in groups if group[0].layer >= protected]
    protected_groups = [group for group in groups if group[0].layer < protected]
    release_after = (int(count * exclude_front) + 1) // size
    if not free:
        raise MethodError(
            f"exclude_front {exclude_front} protects all {len(stack)} layers: give a smaller fraction, such as 0.4"
        )

    most = min(int(budget.most(REMOVE) * count + 1e-9), count - 1) // size  # one sublayer must remain
    first = 0 if most > release_after else protected
    measure, clock = OutputDistance(stack, calibration, distance, first=first), budget.clock()
    model = ModelReference.of(stack)
    settings = {"distance": distance, "level": level, "exclude_front": exclude_front}
    # Only greedy resumes from the removed sublayers alone; lazy depends on all its measurements, and both are quick.
    header = {"model": model.model_dump(), "calibration": describe(calibration), **settings}
    log = Removals(work.journal("finercut") if strategy == "greedy" else None, header)
    if strategy == "one_shot":
        steps = _ranked(free, measure, largest)
    else:
        search = greedy if strategy == "greedy" else lazy_greedy
        # Late sublayers cost least to measure and usually least to remove, so they set a tight bound early.
        guess: dict[Group, float] = {group: -index for index, group in enumerate(groups)}
        done = log.done[:most]
        steps = search(
            free,
            measure.cost,
            done=done,
            held=protected_groups,
            release_after=release_after,
            guess=guess,
            out_of_time=clock,
        )

    if stop_when is not None:
        steps = takewhile(lambda step: step.cost <= stop_when, steps)
    order = take(steps, log, most, budget.enough(stack), "finercut: removing sublayers")
    scores: list[dict[str, float]] = [
        {str(distance): 0.0 if distance != "perplexity" else measure.of(())},
        *({str(distance): step.cost} for step in order),
    ]
    series = PlanSeries.of_removals(model, [step.candidate for step in order], scores)
    if refine and order and not clock():
        gone = frozenset(position for step in order for position in step.candidate)
        chosen, cost = _refined(gone, order[-1].cost, measure, groups_at("block", stack.positions)[protected:])
        series.points[-1] = Point(drop=sites_of(chosen, stack.positions), scores={distance: cost})
    return series


def _ranked(candidates: list[Group], measure: OutputDistance, largest: bool) -> Iterator[Removal[Group]]:
    """Measure every candidate alone, then remove in that order and measure the distance of each prefix."""
    removed: list[Position] = []
    for group, _ in one_shot(candidates, measure.cost, largest):
        removed += group
        yield Removal(group, measure.of(removed), 0)


def _refined(
    chosen: frozenset[Position], cost: float, measure: OutputDistance, blocks: list[Group]
) -> tuple[frozenset[Position], float]:
    """Return the better of this set and an equally large set of whole layers, after swaps that lower the distance."""
    single: list[Group] = [(position,) for block in blocks for position in block]
    layers, rest = divmod(len(chosen), len(blocks[0]))
    by_layer = [step.candidate for step in islice(greedy(blocks, measure.cost), layers)]
    for _ in range(rest):
        left = [each for each in single if not any(each[0] in block for block in by_layer)]
        by_layer.append(min(left, key=lambda each: measure.cost(by_layer, each, inf).value))
    whole = frozenset(position for group in by_layer for position in group)
    whole_cost = measure.of(whole)
    if whole_cost < cost:
        chosen, cost = whole, whole_cost
    groups, cost = swap([(position,) for position in sorted(chosen)], single, measure.cost, cost)
    return frozenset(position for group in groups for position in group), cost
