"""Which node belongs to which stage: a genetic search (after Yuan et al. 2022, "DT-FM", for stages of any sizes).

data        the slowest link inside a stage, whose nodes add up their gradients
pipeline    between two stages, the least that the slowest of their pairs can take (a bottleneck matching); the
            stages then stand in the order of the shortest closed tour from stage 0
cost        data + 2 * pipeline

A child takes stretches of the node-to-stage string from two parents, is repaired to the right sizes, and improved by
the best exchange of the node whose link is slowest. It replaces the worse parent unless it is worse than both.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

from lamella.errors import MethodError
from lamella.methods.skippipe.network import Network
from lamella.methods.skippipe.paths import Assignment
from lamella.progress import tracker

Genes = npt.NDArray[np.int64]  # the stage of each node
Costs = npt.NDArray[np.float64]
ENUMERATED = 8  # stages up to which all tours are tried at once


@dataclass(frozen=True)
class Evolution:
    """Settings of the search; the authors'.

    Attributes:
        population: allocations that live at once.
        trials: offspring, one after the other.
        points: of the crossover.
        evolve_seconds: at most; the best allocation by then is taken.
    """

    population: int = 200
    trials: int = 8000
    points: int = 5
    evolve_seconds: float = 60.0


def even(nodes: int, stages: int) -> tuple[int, ...]:
    """Sizes of stages: all alike, and what is left over in stage 0, where microbatches come from.

    >>> even(20, 6)
    (5, 3, 3, 3, 3, 3)
    """
    if not 1 <= stages <= nodes:
        raise MethodError(f"{stages} stages: {nodes} nodes can be 1 to {nodes} of them")
    each = nodes // stages
    return (nodes - each * (stages - 1), *[each] * (stages - 1))


def allocate(network: Network, sizes: Sequence[int], evolution: Evolution | None = None, seed: int = 0) -> Assignment:
    """Stages of these sizes.

    Raises:
        MethodError: when the sizes do not add up to the nodes.
    """
    settings = evolution or Evolution()
    if sum(sizes) != len(network) or min(sizes, default=0) < 1:
        raise MethodError(
            f"stages of {', '.join(map(str, sizes))} nodes: give sizes of at least 1 that add up to {len(network)}"
        )
    until = time.monotonic() + settings.evolve_seconds
    search = _Allocation(network, tuple(sizes))
    drawn = np.random.default_rng(seed)
    start = np.repeat(np.arange(len(sizes)), sizes)
    living = [drawn.permutation(start) for _ in range(settings.population)]
    costs = [search.cost(genes) for genes in living]
    with tracker("skippipe: nodes to stages", settings.trials) as count:
        for _ in range(settings.trials):
            if time.monotonic() > until:
                break
            one, other = drawn.choice(len(living), 2, replace=False)
            child = search.improved(crossed(living[one], living[other], sizes, settings.points, drawn))
            found = search.cost(child)
            worse = one if costs[one] >= costs[other] else other
            if found <= costs[worse]:
                living[worse], costs[worse] = child, found
            count()
    return search.ordered(living[int(np.argmin(costs))])


def crossed(one: Genes, other: Genes, sizes: Sequence[int], points: int, drawn: np.random.Generator) -> Genes:
    """A child of two, alternately from either, with nodes moved from stages that are too full to others."""
    cuts = np.sort(drawn.choice(len(one) + 1, min(points, len(one)), replace=False))
    takes = np.searchsorted(cuts, np.arange(len(one)), side="right") % 2 == 0
    child = np.where(takes, one, other)
    counts = np.bincount(child, minlength=len(sizes))
    for node in drawn.permutation(len(child)):
        if counts[child[node]] > sizes[child[node]]:
            lacking = [stage for stage in range(len(sizes)) if counts[stage] < sizes[stage]]
            stage = int(drawn.choice(lacking))
            counts[child[node]] -= 1
            counts[stage] += 1
            child[node] = stage
    return child


class _Allocation:
    """What allocations of a network to stages of these sizes cost."""

    def __init__(self, network: Network, sizes: tuple[int, ...]) -> None:
        self.network, self.stages = network, len(sizes)
        self.matching = cache(self._matching)

    def cost(self, genes: Genes) -> float:
        """In seconds."""
        inside = np.where(genes[:, None] == genes[None, :], self.network.edge, 0.0)
        return float(inside.max()) + 2 * closed_tour(self.between(genes))[0]

    def improved(self, genes: Genes) -> Genes:
        """The same with the best exchange of the node that has the slowest link of its stage."""
        inside = np.where(genes[:, None] == genes[None, :], self.network.edge, 0.0)
        slowest = int(inside.max(axis=1).argmax())
        swaps = [genes]
        for other in np.flatnonzero(genes != genes[slowest]).tolist():
            swapped = genes.copy()
            swapped[[slowest, other]] = genes[[other, slowest]]
            swaps.append(swapped)
        return min(swaps, key=self.cost)

    def between(self, genes: Genes) -> Costs:
        """The bottleneck matching of every two stages [stages, stages]."""
        members = [tuple(np.flatnonzero(genes == stage).tolist()) for stage in range(self.stages)]
        found = np.zeros((self.stages, self.stages))
        for a, b in itertools.permutations(range(self.stages), 2):
            found[a, b] = self.matching(members[a], members[b])
        return found

    def _matching(self, here: tuple[int, ...], there: tuple[int, ...]) -> float:
        return bottleneck(hops(self.network, here, there))

    def ordered(self, genes: Genes) -> Assignment:
        """The stages in the order of their tour."""
        _, tour = closed_tour(self.between(genes))
        return Assignment(tuple(tuple(np.flatnonzero(genes == stage).tolist()) for stage in tour))


def hops(network: Network, here: Sequence[int], there: Sequence[int]) -> Costs:
    """What it takes to compute on one node and to hand on to another [here, there], in seconds."""
    return network.edge[np.ix_(here, there)] + network.work[list(here)][:, None]


def bottleneck(costs: Costs) -> float:
    """The least, over all matchings of as many as there can be, of the largest cost in it.

    >>> bottleneck(np.array([[1.0, 9.0], [2.0, 3.0]]))
    3.0
    """
    values = np.unique(costs)
    low, high = 0, len(values) - 1
    while low < high:
        middle = (low + high) // 2
        above = costs > values[middle]
        if above[linear_sum_assignment(above)].any():
            low = middle + 1
        else:
            high = middle
    return float(values[low])


def matched(costs: Costs) -> list[tuple[int, int]]:
    """The pairs of row and column of a bottleneck matching: of all that there are, the one of the least sum.

    >>> matched(np.array([[1.0, 9.0], [2.0, 3.0]]))
    [(0, 0), (1, 1)]
    """
    rows, columns = linear_sum_assignment(np.where(costs > bottleneck(costs), np.inf, costs))
    return list(zip(rows.tolist(), columns.tolist(), strict=True))


def closed_tour(between: Costs) -> tuple[float, list[int]]:
    """The shortest tour through all stages from 0 and back, and its order.

    >>> closed_tour(np.array([[0.0, 1.0, 9.0], [9.0, 0.0, 1.0], [1.0, 9.0, 0.0]]))
    (3.0, [0, 1, 2])
    """
    if len(between) > ENUMERATED:
        return _held_karp(between)
    tours = _tours(len(between))
    lengths = between[tours[:, :-1], tours[:, 1:]].sum(axis=1)
    best = int(lengths.argmin())
    return float(lengths[best]), tours[best, :-1].tolist()


@cache
def _tours(count: int) -> Genes:
    """All tours from 0 and back [tours, count + 1]."""
    return np.array([(0, *order, 0) for order in itertools.permutations(range(1, count))])


def _held_karp(between: Costs) -> tuple[float, list[int]]:
    """The same for many stages, by the sets that a tour has been through."""
    count = len(between)
    best: dict[tuple[int, int], tuple[float, int]] = {(1 << k, k): (float(between[0, k]), 0) for k in range(1, count)}
    for mask in range(2, 1 << count, 2):
        for k in range(1, count):
            if mask & 1 << k and mask != 1 << k:
                before = mask & ~(1 << k)
                best[mask, k] = min(
                    (best[before, j][0] + float(between[j, k]), j) for j in range(1, count) if before & 1 << j
                )
    mask = (1 << count) - 2
    length, last = min((best[mask, k][0] + float(between[k, 0]), k) for k in range(1, count))
    order = []
    while last:
        order.append(last)
        mask, last = mask & ~(1 << last), best[mask, last][1]
    return length, [0, *order[::-1]]
