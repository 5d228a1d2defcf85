"""Portfolio: remove whole layers; refine the best of several starting sets by exchanges and validate on held-out text.

    starting sets   the removals of the lazy greedy search by the output distance; the layers of lowest block influence
                    (ShortGPT, arXiv 2403.03853); the run of layers with the smallest angular distance (Gromov et al.,
                    arXiv 2403.17887)
    exchange        starting from the set that changes the output least, restore one layer and remove another, as long
                    as the output distance falls
    choice          among the sets that come close to the best, the one with the least output distance on held-out
                    text, on which nothing was planned; for a model that will be healed, the one that is closest to the
                    original after a refit in closed form

A greedy search cannot undo a removal, and block influence and angular distance look at the residual stream and not at
the output: each is sometimes the best starting set, and exchanges fix errors that all of them make. A gain on a
thousand calibration tokens may not generalise, hence the choice on held-out text. What a cut loses before healing says
little about what it loses afterwards; a refit, which takes seconds, says more. The combination is Lamella's own; its
parts are published.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import product
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge

from lamella.data import ImageText, Text
from lamella.errors import CalibrationError, MethodError
from lamella.evaluate import Budget, FidelityTest
from lamella.measure import DistanceName, OutputDistance, angular_distance, block_influence, sequences
from lamella.plan import ModelReference, Plan, PlanSeries, Point
from lamella.progress import track
from lamella.registry import method
from lamella.search import Clock, Removals, lazy_greedy, take, window
from lamella.stack import Group, Position, Stack, groups_at, sites_of
from lamella.train import refit as refit_weights

REMOVE = 0.25  # fraction of all layers, if no budget is given
CLOSE = 1.1  # a cut up to this factor above the least distance takes part in the choice on held-out text
SLACK = 2.0  # the distance of one more removal is measured exactly up to this factor above that of the cut
FITTED = 8  # sequences for a refit
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
    greedy: bool = True,
    refit: bool = False,
    budget: Budget = Budget(),
) -> PlanSeries:
    """Remove whole layers: the best of several starting sets, improved by exchanges and validated on held-out text.

    Args:
        stack: the opened model.
        calibration: text, or token ids [sequences, time], alone or with an attention mask; or images with text.
        distance: distance between outputs, as in finercut: ``jsd``, ``kl``, ``angular``, ``norm`` or ``perplexity``.
        refine: number of plan sizes, counted down from the largest, that are refined by exchanges; smaller plans are
            those of the greedy search.
        patience: number of failed exchanges after which a set of removed layers is final.
        validation: number of held-out sequences from the same text on which the final choice is made. Without them, as
            with token ids alone, and where no other set comes close, the result of the exchanges is taken.
        greedy: also start from a greedy search, which takes most of the time. Otherwise smaller plans remove the layers
            of lowest block influence, and are not measured.
        refit: for a model that will be healed: choose the set of layers without which the model is closest to the
            original after its linear layers are corrected in closed form, which takes at least two sequences. Without
            effect where they cannot be corrected, as with a norm behind each sublayer.
        budget: how many layers to remove; defaults to a quarter of all layers.

    Returns:
        The series of plans, each with its distance on the calibration text and, where there was a choice, its distance
        on the held-out text. A refined plan need not contain the next smaller one.
    """
    layers = groups_at("block", stack.positions)
    most = min(int(budget.most(REMOVE) * len(layers) + 1e-9), len(layers) - 1)  # one layer must stay
    enough = budget.enough(stack)
    if enough is not None:  # all layers cost the same in the cost model, so the number to remove is known in advance
        most = next((n for n in range(1, most) if enough(frozenset(_positions(layers[:n])))), most)
    measure = OutputDistance(stack, calibration, distance)
    influence = block_influence(stack, calibration).values
    clock = budget.clock()
    guess = dict(zip(layers, influence.tolist(), strict=True))
    whole = measure.of(()) if distance == "perplexity" else 0.0
    scores: list[dict[str, float]] = [{str(distance): whole}]
    least = np.argsort(influence, kind="stable")
    if greedy:
        steps = lazy_greedy(layers, measure.cost, guess=guess, out_of_time=clock)
        found = take(steps, Removals(None, {}), most, enough, "portfolio: removing layers")
        order, scores = [step.candidate for step in found], scores + [{str(distance): step.cost} for step in found]
    else:
        order = [layers[layer] for layer in least[:most]]
        scores += [{} for _ in order]
    series = PlanSeries.of_removals(ModelReference.of(stack), order, scores)

    angles = angular_distance(stack, calibration).values
    scout = OutputDistance(stack, sequences(calibration)[0], distance)
    exchanges = _Exchanges(layers, measure, scout, patience, clock)
    held_out = _held_out(calibration, validation)

    @cache
    def judge() -> OutputDistance:
        assert held_out is not None
        return OutputDistance(stack, held_out, distance)

    @cache
    def fidelity() -> FidelityTest:
        judged = calibration if held_out is None else held_out
        return FidelityTest(stack, judged.tokens if isinstance(judged, Text) else judged)

    larger: Cut = frozenset()
    for size in track(range(len(order), max(0, len(order) - refine), -1), "portfolio: exchanging layers"):
        if clock() and size < len(order):  # the starting sets of the largest cut are compared in any case
            break
        start = window(len(layers), size, angles[:, size].__getitem__)
        costs: dict[Cut, float] = {frozenset(order[:size]): scores[size][distance]} if greedy else {}
        others = [frozenset(layers[layer] for layer in least[:size]), frozenset(layers[start : start + size])]
        factor = SLACK if refit else CLOSE
        for cut in [*others, *exchanges.smaller(larger)]:
            distance_of_cut = measure.within(_positions(cut), factor * min(costs.values(), default=math.inf))
            if distance_of_cut.exact:
                costs[cut] = distance_of_cut.value
        best = min(costs, key=costs.__getitem__)
        larger, cost = exchanges.improve(best, costs[best])
        costs[larger] = cost
        chosen, validated = larger, {}
        close = [cut for cut in sorted(costs, key=costs.__getitem__) if costs[cut] <= factor * cost]
        has_choice = refit and len(close) > 1 and len(sequences(calibration)) > 1
        refitted = _chosen_after_refit(stack, close, calibration, fidelity()) if has_choice else None
        if refitted is not None:
            chosen, value = refitted
            validated = {"kl after a refit": value}
        elif held_out is not None and len(close) > 1:
            chosen, value = _chosen(close, judge())
            validated = {f"{distance} on held-out text": value}
        drop = sites_of(_positions(chosen), stack.positions)
        series.points[size] = Point(drop=drop, scores={distance: costs[chosen]} | validated)
    return series


def _positions(cut: Iterable[Group]) -> list[Position]:
    return [position for layer in cut for position in layer]


def _held_out(calibration: Text | ImageText, sequences: int) -> Text | None:
    """Return held-out sequences of the same text, or None if there are none."""
    try:
        return calibration.more(sequences) if isinstance(calibration, Text) and sequences else None
    except CalibrationError:
        return None


def _chosen(cuts: list[Cut], judge: OutputDistance) -> tuple[Cut, float]:
    """Return the set of least distance with that distance; the first one in case of a tie."""
    chosen, least = cuts[0], judge.of(_positions(cuts[0]))
    for cut in cuts[1:]:
        found = judge.within(_positions(cut), least)
        if found.exact and found.value < least:
            chosen, least = cut, found.value
    return chosen, least


def _chosen_after_refit(
    stack: Stack, cuts: list[Cut], calibration: Text | ImageText, judge: FidelityTest
) -> tuple[Cut, float] | None:
    """Return the set that is closest to the original after a refit, with its KL divergence in nats.

    None if no set can be refitted, as in a model with a norm behind its sublayers.
    """
    fitted: Any = calibration
    if isinstance(calibration, Text):
        count, length = calibration.tokens.shape
        fitted = calibration.cut(min(FITTED, count), length)

    def after_refit(cut: Cut) -> float:
        plan = Plan(model=ModelReference.of(stack), drop=sites_of(_positions(cut), stack.positions))
        try:
            return judge.of(refit_weights(stack, plan, fitted).view).kl.mean
        except MethodError:
            return math.inf

    found = {cut: after_refit(cut) for cut in track(cuts, "portfolio: refitting")}
    best = min(found, key=found.__getitem__)
    return (best, found[best]) if found[best] < math.inf else None


class _Exchanges:
    """Exchange one removed layer for another, in the order of estimated gain.

    The gain is estimated on the first calibration sequence alone: by how much restoring a layer lowered the distance
    and removing one raised it when that was last measured. The same sequence also rejects most of the exchanges tried.

    Args:
        layers: all layers of the model.
        measure: the distance to lower.
        scout: the same distance on the first sequence.
        patience: number of failed exchanges after which to stop.
        clock: returns True once the time is over.
    """

    def __init__(
        self, layers: list[Group], measure: OutputDistance, scout: OutputDistance, patience: int, clock: Clock
    ) -> None:
        self._layers, self._measure, self._scout, self._patience = layers, measure, scout, patience
        self._clock = clock
        self._relief: dict[Group, float] = {}  # by how much restoring a layer lowers the distance
        self._increase: dict[Group, float] = {}  # by how much removing a layer raises the distance

    def improve(self, cut: Cut, cost: float) -> tuple[Cut, float]:
        """Exchange layers as long as that lowers the distance of the cut, which is ``cost`` at first."""
        while not self._clock() and (found := self._better(cut, cost)) is not None:
            cut, cost = found
        return cut, cost

    def smaller(self, cut: Cut) -> Iterator[Cut]:
        """Yield the cut without the layer whose restoration lowers the distance most, if one was measured."""
        known = sorted(cut & self._relief.keys())
        if known:
            yield cut - {max(known, key=lambda layer: self._relief[layer])}

    def _better(self, cut: Cut, cost: float) -> tuple[Cut, float] | None:
        """Return the first exchange that lowers the distance; None if there is none or the time is over."""
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
                # Both estimates compare `other` with its neighbours: the cut with `restored` and `removed` both present
                # in the model, and the cut with both removed.
                self._relief[removed] = tried.value - (own - self._relief[restored])
                self._increase[restored] = own + self._increase[removed] - tried.value
                return other, found.value
        return None

    def _estimate(self, cut: Cut, own: float) -> None:
        """Measure the gain of the layers that have not been measured yet, as far as the time allows."""
        for layer in track(self._layers, "portfolio: estimating exchanges"):
            if self._clock():
                return
            if layer in cut and layer not in self._relief:
                self._relief[layer] = own - self._scout.of(_positions(cut - {layer}))
            if layer not in cut and layer not in self._increase:
                self._increase[layer] = self._scout.within(_positions(cut | {layer}), SLACK * own).value - own
