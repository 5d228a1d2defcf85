"""Allocation of nodes to stages by a genetic search (after Yuan et al. 2022, "DT-FM", for stages of any size).

    data        the slowest link within a stage, over which its nodes all-reduce their gradients
    pipeline    between two stages, the bottleneck of the best matching of their nodes; the stages are then ordered by
                the shortest closed tour from stage 0
    cost        data + 2 * pipeline

A child takes segments of the node-to-stage string from two parents, is repaired to the right stage sizes, and is
improved by the best swap of the node with the slowest link. It replaces the worse parent unless it is worse than both.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated

import numpy as np
import numpy.typing as npt
from annotated_types import Ge
from scipy.optimize import linear_sum_assignment

from lamella.errors import MethodError
from lamella.methods.skippipe.network import PipelineNetwork
from lamella.methods.skippipe.paths import Assignment
from lamella.progress import tracker

Genes = npt.NDArray[np.int64]  # the stage of each node
Costs = npt.NDArray[np.float64]
ENUMERATED = 8  # up to this number of stages, all tours are enumerated


@dataclass(frozen=True)
class AllocationSearch:
    """Settings of the genetic search; the defaults are the authors'.

    Attributes:
        population: the number of allocations in the population.
        trials: the number of offspring, generated one at a time.
        points: the number of crossover points.
        evolve_seconds: time limit in seconds; the best allocation found by then is used.
    """

    population: Annotated[int, Ge(2)] = 200
    trials: Annotated[int, Ge(0)] = 8000
    points: Annotated[int, Ge(1)] = 5
    evolve_seconds: Annotated[float, Ge(0)] = 60.0


def even_sizes(nodes: int, stages: int) -> tuple[int, ...]:
    """Return the sizes of equal stages; the remaining nodes join stage 0, where the microbatches originate.

    Args:
        nodes: number of nodes.
        stages: number of stages.

    >>> even_sizes(20, 6)
    (5, 3, 3, 3, 3, 3)
    """
    if not 1 <= stages <= nodes:
        raise MethodError(f"{stages} stages: {nodes} nodes can form 1 to {nodes} stages")
    each = nodes // stages
    return (nodes - each * (stages - 1), *[each] * (stages - 1))


def allocate(
    network: PipelineNetwork, sizes: Sequence[int], evolution: AllocationSearch | None = None, seed: int = 0
) -> Assignment:
    """Allocate the nodes of a network to stages of given sizes.

    Args:
        network: the costs of nodes and links.
        sizes: nodes per stage.
        evolution: the settings of the search; the authors' if None.
        seed: random seed.

    Raises:
        MethodError: if the sizes do not add up to the number of nodes.
    """
    settings = evolution or AllocationSearch()
    if sum(sizes) != len(network) or min(sizes, default=0) < 1:
        raise MethodError(
            f"stages of {', '.join(map(str, sizes))} nodes: give sizes of at least 1 that add up to {len(network)}"
        )
    deadline = time.monotonic() + settings.evolve_seconds
    search = _Allocation(network, tuple(sizes))
    rng = np.random.default_rng(seed)
    start = np.repeat(np.arange(len(sizes)), sizes)
    population = [rng.permutation(start) for _ in range(settings.population)]
    costs = [search.cost(genes) for genes in population]
    with tracker("skippipe: nodes to stages", settings.trials) as count:
        for _ in range(settings.trials):
            if time.monotonic() > deadline:
                break
            one, other = rng.choice(len(population), 2, replace=False)
            child = search.improve(crossover(population[one], population[other], sizes, settings.points, rng))
            found = search.cost(child)
            worse = one if costs[one] >= costs[other] else other
            if found <= costs[worse]:
                population[worse], costs[worse] = child, found
            count()
    return search.order_stages(population[int(np.argmin(costs))])


def crossover(one: Genes, other: Genes, sizes: Sequence[int], points: int, rng: np.random.Generator) -> Genes:
    """Return a child of two parents, with nodes moved out of stages that are too large.

    Args:
        one: the stage of each node in the first parent `[nodes]`.
        other: the stage of each node in the second parent `[nodes]`.
        sizes: nodes per stage.
        points: the number of crossover points.
        rng: the random number generator.
    """
    cuts = np.sort(rng.choice(len(one) + 1, min(points, len(one)), replace=False))
    from_one = np.searchsorted(cuts, np.arange(len(one)), side="right") % 2 == 0
    child = np.where(from_one, one, other)
    counts = np.bincount(child, minlength=len(sizes))
    for node in rng.permutation(len(child)):
        if counts[child[node]] > sizes[child[node]]:
            too_small = [stage for stage in range(len(sizes)) if counts[stage] < sizes[stage]]
            stage = int(rng.choice(too_small))
            counts[child[node]] -= 1
            counts[stage] += 1
            child[node] = stage
    return child


class _Allocation:
    """The cost of allocations of a network to stages of given sizes."""

    def __init__(self, network: PipelineNetwork, sizes: tuple[int, ...]) -> None:
        self.network, self.stages = network, len(sizes)
        self.matching = cache(self._matching)

    def cost(self, genes: Genes) -> float:
        """Return the cost in seconds."""
        inside = np.where(genes[:, None] == genes[None, :], self.network.edge, 0.0)
        return float(inside.max()) + 2 * closed_tour(self.between(genes))[0]

    def improve(self, genes: Genes) -> Genes:
        """Apply the best swap of the node that has the slowest link within its stage."""
        inside = np.where(genes[:, None] == genes[None, :], self.network.edge, 0.0)
        slowest = int(inside.max(axis=1).argmax())
        swaps = [genes]
        for other in np.flatnonzero(genes != genes[slowest]).tolist():
            swapped = genes.copy()
            swapped[[slowest, other]] = genes[[other, slowest]]
            swaps.append(swapped)
        return min(swaps, key=self.cost)

    def between(self, genes: Genes) -> Costs:
        """Return the bottleneck of the best matching of every two stages `[stages, stages]`."""
        members = [tuple(np.flatnonzero(genes == stage).tolist()) for stage in range(self.stages)]
        found = np.zeros((self.stages, self.stages))
        for a, b in itertools.permutations(range(self.stages), 2):
            found[a, b] = self.matching(members[a], members[b])
        return found

    def _matching(self, here: tuple[int, ...], there: tuple[int, ...]) -> float:
        return bottleneck(hops(self.network, here, there))

    def order_stages(self, genes: Genes) -> Assignment:
        """Return the stages in the order of their tour."""
        _, tour = closed_tour(self.between(genes))
        return Assignment(tuple(tuple(np.flatnonzero(genes == stage).tolist()) for stage in tour))


def hops(network: PipelineNetwork, here: Sequence[int], there: Sequence[int]) -> Costs:
    """Return the seconds to compute on one node and to send to another `[here, there]`.

    Args:
        network: the costs of nodes and links.
        here: the sending nodes.
        there: the receiving nodes.
    """
    return network.edge[np.ix_(here, there)] + network.work[list(here)][:, None]


def bottleneck(costs: Costs) -> float:
    """Return the smallest possible maximum cost over all maximum matchings.

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


def bottleneck_matching(costs: Costs) -> list[tuple[int, int]]:
    """Return the row and column pairs of a bottleneck matching, that of the smallest sum among all of them.

    >>> bottleneck_matching(np.array([[1.0, 9.0], [2.0, 3.0]]))
    [(0, 0), (1, 1)]
    """
    rows, columns = linear_sum_assignment(np.where(costs > bottleneck(costs), np.inf, costs))
    return list(zip(rows.tolist(), columns.tolist(), strict=True))


def closed_tour(between: Costs) -> tuple[float, list[int]]:
    """Return the length and the order of the shortest closed tour through all stages from stage 0.

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
    """Return all closed tours from stage 0 `[tours, count + 1]`."""
    return np.array([(0, *order, 0) for order in itertools.permutations(range(1, count))])


def _held_karp(between: Costs) -> tuple[float, list[int]]:
    """Return the shortest tour through many stages by dynamic programming over visited sets."""
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
