"""Which node belongs to which stage: a genetic search (after Yuan et al. 2022, "DT-FM", for stages of any sizes).

data        the slowest link inside a stage, whose nodes add up their gradients
pipeline    between two stages, the least that the slowest of their pairs can take (a bottleneck matching); the
            stages then stand in the order of the shortest closed tour from stage 0
cost        data * factor + 2 * pipeline
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

from lamella.errors import MethodError
from lamella.methods.skippipe.network import Network
from lamella.methods.skippipe.paths import Assignment
from lamella.progress import track

Genes = npt.NDArray[np.int64]  # the stage of each node


@dataclass(frozen=True)
class Evolution:
    """Settings of the search; the authors'.

    Attributes:
        population: allocations that live at once.
        trials: offspring, one after the other.
        points: of the crossover.
        factor: what a message of gradients costs, in activations.
    """

    population: int = 200
    trials: int = 8000
    points: int = 5
    factor: float = 1.0


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
    drawn = np.random.default_rng(seed)
    start = np.repeat(np.arange(len(sizes)), sizes)
    living = [drawn.permutation(start) for _ in range(settings.population)]
    costs = [cost(network, genes, len(sizes), settings.factor) for genes in living]
    for _ in track(range(settings.trials), "skippipe: nodes to stages"):
        one, other = drawn.choice(len(living), 2, replace=False)
        child = improved(
            network, crossed(living[one], living[other], sizes, settings.points, drawn), len(sizes), settings.factor
        )
        found = cost(network, child, len(sizes), settings.factor)
        worse = one if costs[one] >= costs[other] else other
        if found <= costs[worse]:
            living[worse], costs[worse] = child, found
    best = living[int(np.argmin(costs))]
    return ordered(network, best, len(sizes))


def crossed(one: Genes, other: Genes, sizes: Sequence[int], points: int, drawn: np.random.Generator) -> Genes:
    """A child of two, alternately from either, with nodes moved from stages that are too full to those that lack some."""
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


def improved(network: Network, genes: Genes, stages: int, factor: float) -> Genes:
    """The same with the best exchange of a node that has the slowest link of its stage."""
    slowest = _slowest(network, genes, stages)
    best, least = genes, cost(network, genes, stages, factor)
    for other in range(len(genes)):
        if genes[other] != genes[slowest]:
            swapped = genes.copy()
            swapped[[slowest, other]] = genes[[other, slowest]]
            found = cost(network, swapped, stages, factor)
            if found < least:
                best, least = swapped, found
    return best


def _slowest(network: Network, genes: Genes, stages: int) -> int:
    inside = np.where(genes[:, None] == genes[None, :], network.edge, 0.0)
    return int(inside.max(axis=1).argmax())


def cost(network: Network, genes: Genes, stages: int, factor: float) -> float:
    """What an allocation costs, in seconds."""
    inside = np.where(genes[:, None] == genes[None, :], network.edge, 0.0)
    between = _between(network, genes, stages)
    tour, _ = closed_tour(between)
    return factor * float(inside.max()) + 2 * tour


def _between(network: Network, genes: Genes, stages: int) -> npt.NDArray[np.float64]:
    """The bottleneck matching of every two stages [stages, stages]."""
    members = [np.flatnonzero(genes == stage) for stage in range(stages)]
    found = np.zeros((stages, stages))
    for a in range(stages):
        for b in range(stages):
            if a != b:
                pairs = network.edge[np.ix_(members[a], members[b])] + network.work[members[a]][:, None]
                found[a, b] = bottleneck(pairs)
    return found


def bottleneck(costs: npt.NDArray[np.float64]) -> float:
    """The least, over all matchings of as many as there can be, of the largest cost in it.

    >>> bottleneck(np.array([[1.0, 9.0], [2.0, 3.0]]))
    3.0
    """
    values = np.unique(costs)
    low, high = 0, len(values) - 1
    wanted = min(costs.shape)
    while low < high:
        middle = (low + high) // 2
        rows, columns = linear_sum_assignment(costs > values[middle])
        if int((costs[rows, columns] <= values[middle]).sum()) == wanted:
            high = middle
        else:
            low = middle + 1
    return float(values[low])


def closed_tour(between: npt.NDArray[np.float64]) -> tuple[float, list[int]]:
    """The shortest tour through all stages from 0 and back, and its order (Held and Karp).

    >>> closed_tour(np.array([[0.0, 1.0, 9.0], [9.0, 0.0, 1.0], [1.0, 9.0, 0.0]]))
    (3.0, [0, 1, 2])
    """
    count = len(between)
    if count == 1:
        return 0.0, [0]
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


def ordered(network: Network, genes: Genes, stages: int) -> Assignment:
    """The stages in the order of their tour."""
    _, tour = closed_tour(_between(network, genes, stages))
    return Assignment(tuple(tuple(np.flatnonzero(genes == stage).tolist()) for stage in tour))
