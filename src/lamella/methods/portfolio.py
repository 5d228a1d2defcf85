"""Portfolio: cut whole layers, from the best of several beginnings on, by exchanges, chosen on further text.

    beginnings   what the lazy greedy search by the output removes; the layers of least block influence (ShortGPT, arXiv
                 2403.03853); the run of layers that turns the stream least (Gromov et al., arXiv 2403.17887)
    exchange     from the one that changes the output least: a removed layer for another, while that changes it less
    choice       the least change among the likely ones of these, on further text that none was planned on

A greedy search cannot take back, and influence and angle look at the stream and not at the output: each is sometimes
the best beginning, and exchanges mend what none could see. What is won on a thousand tokens may be lost on others,
hence the choice. Our own, from published parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from itertools import product
from typing import Annotated

import numpy as np
from annotated_types import Ge

from lamella.data import ImageText, Text
from lamella.errors import CalibrationError
from lamella.evaluate import Budget
from lamella.measure import DistanceName, OutputDistance, angular_distance, block_influence, sequences
from lamella.plan import ModelReference, PlanSeries, Point
from lamella.progress import track
from lamella.registry import method
from lamella.search import Clock, Removals, lazy_greedy, take, window
from lamella.stack import Group, Position, Stack, groups_at, sites_of

REMOVE = 0.25  # of all layers, where no budget is given
LIKELY = 1.1  # how far above the best one's distance that of a cut may be to be chosen on further text
SLACK = 2.0  # how far above the cut's own distance that of one more layer is still followed to its end
Cut = frozenset[Group]


@method("portfolio", purpose="prune")
def portfolio(
    stack: Stack,
    calibration: Text | ImageText,
    *,
    distance: DistanceName = "jsd",
    refine: Annotated[int, Ge(0)] = 2,
    patience: Annotated[int, Ge(0)] = 6,
    validation: Annotated[int, Ge(0)] = 4,
    budget: Budget = Budget(),
) -> PlanSeries:
    """Remove whole layers: the best of several beginnings, improved by exchanges and chosen on further text.

    Args:
        stack: the opened model.
        calibration: text, or token ids [sequences, time], alone or with an attention mask; or images with text.
        distance: of the output, as in finercut: ``jsd``, ``kl``, ``angular``, ``norm`` or ``perplexity``.
        refine: how many of the largest cuts are more than what the greedy search removed.
        patience: how many exchanges may fail before a cut is taken as it is.
        validation: sequences of the same text to choose on, none of which was planned on. Where there are no more, as
            with token ids alone, and where no other cut comes near, the exchanges have the last word.
        budget: how far to go; a quarter of all layers when left out.

    Returns:
        The series of plans, each with its distance on the calibration text, and where there was a choice with the one
        by which it was made. A refined plan need not contain the one before.
    """
    layers = groups_at("block", stack.positions)
    most = min(int(budget.most(REMOVE) * len(layers) + 1e-9), len(layers) - 1)  # one layer must stay
    enough = budget.enough(stack)
    if enough is not None:  # in the cost model all layers are equal, so that how many must go is known
        most = next((n for n in range(1, most) if enough(frozenset(_positions(layers[:n])))), most)
    measure = OutputDistance(stack, calibration, distance)
    influence = block_influence(stack, calibration).values
    clock = budget.clock()
    guess = dict(zip(layers, influence.tolist(), strict=True))
    steps = lazy_greedy(layers, measure.cost, guess=guess, out_of_time=clock)
    order = take(steps, Removals(None, {}), most, enough, "portfolio: removing layers")
    whole = measure.of(()) if distance == "perplexity" else 0.0
    scores: list[dict[str, float]] = [{str(distance): whole}, *({str(distance): step.cost} for step in order)]
    series = PlanSeries.of_removals(ModelReference.of(stack), [step.candidate for step in order], scores)

    least = np.argsort(influence, kind="stable")
    angles = angular_distance(stack, calibration).values
    scout = OutputDistance(stack, sequences(calibration)[0], distance)
    exchanges = _Exchanges(layers, measure, scout, patience, clock)
    further = _further(calibration, validation)

    @cache
    def judge() -> OutputDistance:
        assert further is not None
        return OutputDistance(stack, further, distance)

    larger: Cut = frozenset()
    for size in track(range(len(order), max(0, len(order) - refine), -1), "portfolio: exchanging layers"):
        if clock() and size < len(order):  # the beginnings of the largest cut are compared in any case
            break
        start = window(len(layers), size, angles[:, size].__getitem__)
        costs: dict[Cut, float] = {frozenset(step.candidate for step in order[:size]): order[size - 1].cost}
        others = [frozenset(layers[layer] for layer in least[:size]), frozenset(layers[start : start + size])]
        for cut in [*others, *exchanges.smaller(larger)]:
            found = measure.within(_positions(cut), LIKELY * min(costs.values()))
            if found.exact:
                costs[cut] = found.value
        best = min(costs, key=costs.__getitem__)
        larger, cost = exchanges.improve(best, costs[best])
        costs[larger] = cost
        chosen, told = larger, {}
        likely = [cut for cut in sorted(costs, key=costs.__getitem__) if costs[cut] <= LIKELY * cost]
        if further is not None and len(likely) > 1:
            chosen, value = _chosen(likely, judge())
            told = {f"{distance} on further text": value}
        drop = sites_of(_positions(chosen), stack.positions)
        series.points[size] = Point(drop=drop, scores={distance: costs[chosen]} | told)
    return series


def _positions(cut: Iterable[Group]) -> list[Position]:
    return [position for layer in cut for position in layer]


def _further(calibration: Text | ImageText, sequences: int) -> Text | None:
    """Further sequences of the same text, where there are any."""
    try:
        return calibration.more(sequences) if isinstance(calibration, Text) and sequences else None
    except CalibrationError:
        return None


def _chosen(cuts: list[Cut], judge: OutputDistance) -> tuple[Cut, float]:
    """The cut of least distance, which is told too; of equals the first."""
    chosen, least = cuts[0], judge.of(_positions(cuts[0]))
    for cut in cuts[1:]:
        found = judge.within(_positions(cut), least)
        if found.exact and found.value < least:
            chosen, least = cut, found.value
    return chosen, least


class _Exchanges:
    """Exchanges of one removed layer for another.

    What to try first is estimated: by what restoring a layer brought and what removing one cost, when that was measured
    last, on the first sequence alone. That sequence also rejects most of what is tried.

    Args:
        layers: of the model.
        measure: the distance that is to be lowered.
        scout: the same on the first sequence.
        patience: how many may fail.
        clock: says when to try no more.
    """

    def __init__(
        self, layers: list[Group], measure: OutputDistance, scout: OutputDistance, patience: int, clock: Clock
    ) -> None:
        self._layers, self._measure, self._scout, self._patience = layers, measure, scout, patience
        self._clock = clock
        self._relief: dict[Group, float] = {}  # of restoring a layer
        self._increase: dict[Group, float] = {}  # of removing one

    def improve(self, cut: Cut, cost: float) -> tuple[Cut, float]:
        """Exchange layers as long as that lowers the distance of the cut, which is ``cost``."""
        while not self._clock() and (found := self._better(cut, cost)) is not None:
            cut, cost = found
        return cut, cost

    def smaller(self, cut: Cut) -> Iterator[Cut]:
        """The cut without the layer whose restoration brings most, if there is any."""
        known = sorted(cut & self._relief.keys())
        if known:
            yield cut - {max(known, key=lambda layer: self._relief[layer])}

    def _better(self, cut: Cut, cost: float) -> tuple[Cut, float] | None:
        """The first exchange found that lowers the distance; None where there is none, or the time is over."""
        for each in (self._measure, self._scout):
            each.keep(_positions(cut))
        own = self._scout.of(_positions(cut))
        self._estimate(cut, own)
        if self._clock():
            return None
        others = [layer for layer in self._layers if layer not in cut]
        pairs = sorted(product(cut, others), key=lambda p: (self._increase[p[1]] - self._relief[p[0]], p))
        for restored, removed in track(pairs[: self._patience], "portfolio: trying exchanges"):
            if self._clock():
                return None
            other = cut - {restored} | {removed}
            tried = self._scout.within(_positions(other), own)
            found = self._measure.within(_positions(other), cost) if tried.exact else tried
            if tried.exact and found.exact and found.value < cost:
                # The cut without both is where one was restored from, the cut with both where the other was removed to.
                self._relief[removed] = tried.value - (own - self._relief[restored])
                self._increase[restored] = own + self._increase[removed] - tried.value
                return other, found.value
        return None

    def _estimate(self, cut: Cut, own: float) -> None:
        """Measure what was never measured, as far as the time goes."""
        for layer in track(self._layers, "portfolio: estimating exchanges"):
            if self._clock():
                return
            if layer in cut and layer not in self._relief:
                self._relief[layer] = own - self._scout.of(_positions(cut - {layer}))
            if layer not in cut and layer not in self._increase:
                self._increase[layer] = self._scout.within(_positions(cut | {layer}), SLACK * own).value - own
