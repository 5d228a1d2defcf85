"""FinerCut: cut attention and MLP sublayers one by one, whichever changes the model's output least.

Zhang et al., "FinerCut: Finer-grained Interpretable Layer Pruning for Large Language Models", arXiv 2405.18218.

    h = [A0] [M0] [A1] [M1] ... [A29] [M29] -> logits Z0          every sublayer is a candidate of its own
    repeat:  d(s) = D(Z0, logits without removed + s)  for every s     Z0 is always the original's output
             remove the s with the smallest d(s)

The removal order is valid at every length: one run serves every budget. Sublayers of the first layers are protected at
first (``exclude_front``) and become candidates later.
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

REMOVE = 0.25  # of all sublayers, where no budget is given


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
    """Greedily remove attention and MLP sublayers, measured by the change of the model's output.

    Args:
        stack: the opened model.
        calibration: text, or token ids [sequences, time], alone or with an attention mask, or images with text;
            the paper: 10 x 256.
        distance: ``jsd``, ``jsd_repo`` (as the authors' code computes it), ``kl``, ``angular``, ``norm`` or
            ``perplexity``.
        level: what a candidate is: every ``sublayer``, only ``attn``, only ``mlp``, or whole layers (``block``).
        exclude_front: x of the paper: the first int(L x) + 1 layers stay until int(2 L x) + 1 sublayers are gone.
        strategy: ``greedy`` measures all candidates at every step; ``lazy`` only those that looked good before, faster
            and sometimes different; ``one_shot`` measures once and takes the smallest.
        stop_when: stop before the distance passes this.
        largest: remove the most important first, as a sanity check (with ``one_shot``).
        refine: our extension: at the end compare with removing whole layers, take the better set, and exchange
            sublayers while that lowers the distance; the last plan of the series is then not a prefix of an order.
        budget: how far to go; a quarter of all sublayers when left out.
        work: where an interrupted ``greedy`` run goes on from; the other strategies start over.

    Returns:
        The series of plans, from the whole model on, each with its distance on the calibration text.

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
    held = [group for group in groups if group[0].layer < protected]
    release_after = (int(count * exclude_front) + 1) // size
    if not free:
        raise MethodError(f"exclude_front {exclude_front} protects all {len(stack)} layers: give a smaller share")

    most = min(int(budget.most(REMOVE) * count + 1e-9), count - 1) // size  # one must stay
    first = 0 if most > release_after else protected
    measure, clock = OutputDistance(stack, calibration, distance, first=first), budget.clock()
    model = ModelReference.of(stack)
    asked = {"distance": distance, "level": level, "exclude_front": exclude_front}
    # Only greedy goes on from what is removed; what lazy asks next depends on all that it asked, and both are quick.
    header = {"model": model.model_dump(), "calibration": describe(calibration), **asked}
    log = Removals(work.journal("finercut") if strategy == "greedy" else None, header)
    if strategy == "one_shot":
        steps = _ranked(free, measure, largest)
    else:
        search = greedy if strategy == "greedy" else lazy_greedy
        # Late ones cost least to measure and mostly least to remove, so they set a tight bound early.
        guess: dict[Group, float] = {group: -place for place, group in enumerate(groups)}
        done = log.done[:most]
        steps = search(
            free, measure.cost, done=done, held=held, release_after=release_after, guess=guess, out_of_time=clock
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
    """One-shot: every candidate measured alone, then removed in that order, each prefix with its own distance."""
    removed: list[Position] = []
    for group, _ in one_shot(candidates, measure.cost, largest):
        removed += group
        yield Removal(group, measure.of(removed), 0)


def _refined(
    chosen: frozenset[Position], cost: float, measure: OutputDistance, blocks: list[Group]
) -> tuple[frozenset[Position], float]:
    """The better of this set and of as many sublayers in whole layers, then exchanged one by one while that helps."""
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
