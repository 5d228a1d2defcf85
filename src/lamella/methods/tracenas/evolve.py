"""Evolution of shapes: which layers to keep, and the width of each part of them.

    elites, unchanged      the best so far
    children               of two elites: a range of layers from one and the rest from the other, interpolated widths;
                           then sometimes a layer is flipped, and sometimes all widths are perturbed
    immigrants             new samples, if no allowed child is found, which maintains diversity

Each shape is scored once. Shapes that are not allowed are never scored.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

TRIES = 20  # attempts per allowed child, before an immigrant replaces it


@dataclass(frozen=True)
class Genome:
    """One shape before it is rounded to one that the model can have.

    Attributes:
        keep: whether each layer is kept `[layers]`, bool.
        width: the fraction of each part of each layer that is kept `[layers, parts]`.
    """

    keep: np.ndarray
    width: np.ndarray


@dataclass(frozen=True)
class Breeding:
    """Settings of the reproduction.

    Attributes:
        low, high: the limits of the widths `[parts]`.
        crossover: probability that a child has two parents.
        mutate_depth: probability that a child's layers mutate; see :func:`flip`.
        mutate_width: probability that a child's widths mutate: each is multiplied by 1 + N(0, jitter).
        jitter: standard deviation of the mutation of widths.
    """

    low: np.ndarray
    high: np.ndarray
    crossover: float = 0.7
    mutate_depth: float = 0.2
    mutate_width: float = 0.2
    jitter: float = 0.1

    def child(self, parents: Sequence[Genome], rng: np.random.Generator) -> Genome:
        """Create a child of two random parents.

        Args:
            parents: the elites.
            rng: the random number generator.
        """
        a, b = (parents[int(index)] for index in rng.integers(0, len(parents), 2))
        keep, width = a.keep, a.width
        if rng.random() < self.crossover:
            keep, width = cross_depth(a.keep, b.keep, rng), cross_width(a.width, b.width, rng)
        if rng.random() < self.mutate_depth:
            keep = flip(keep, rng)
        if rng.random() < self.mutate_width:
            width = np.clip(width * (1 + self.jitter * rng.standard_normal(width.shape)), self.low, self.high)
        return Genome(keep, width)


def cross_depth(a: np.ndarray, b: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the layers of ``b`` with one range replaced by that of ``a`` `[layers]`.

    Args:
        a: layers kept by one parent.
        b: layers kept by the other parent.
        rng: the random number generator.
    """
    start, stop = np.sort(rng.integers(0, len(a) + 1, 2))
    child = b.copy()
    child[start:stop] = a[start:stop]
    return child


def cross_width(a: np.ndarray, b: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return random interpolations of the widths of both parents, independent for each part `[layers, parts]`.

    Args:
        a: widths of one parent.
        b: widths of the other parent.
        rng: the random number generator.
    """
    index = rng.random(a.shape)
    return index * a + (1 - index) * b


def flip(keep: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Flip one random layer, and each other with a probability of 1 / layers `[layers]`.

    Args:
        keep: the kept layers.
        rng: the random number generator.
    """
    flips = rng.random(len(keep)) < 1 / len(keep)
    flips[rng.integers(len(keep))] = True
    return keep ^ flips


class ScoredShape(NamedTuple):
    """One evaluation.

    Attributes:
        genome: the shape.
        score: its score; larger is better.
    """

    genome: Genome
    score: float


def evolve(
    sample: Callable[[np.random.Generator], Genome],
    allowed: Callable[[Genome], bool],
    score: Callable[[Genome], float],
    breeding: Breeding,
    *,
    key: Callable[[Genome], Hashable],
    population: int = 30,
    elites: int = 10,
    iterations: int = 50,
    seed: int = 0,
) -> Iterator[ScoredShape]:
    """Evolve shapes; yields every evaluation when it is made.

    Args:
        sample: draws an allowed genome.
        allowed: whether a genome is within the budget.
        score: the objective to maximise; NaN is the worst.
        breeding: settings of the reproduction.
        key: equal for genomes of the same shape.
        population: individuals per generation.
        elites: individuals that are kept unchanged.
        iterations: number of generations.
        seed: random seed.
    """
    rng = np.random.default_rng(seed)
    scores: dict[Hashable, float] = {}
    current = [sample(rng) for _ in range(population)]
    for _ in range(iterations):
        for genome in current:
            name = key(genome)
            if name not in scores:
                value = score(genome)
                scores[name] = -np.inf if np.isnan(value) else value
                yield ScoredShape(genome, scores[name])
        distinct: dict[Hashable, Genome] = {}
        for genome in current:
            distinct.setdefault(key(genome), genome)
        best = sorted(distinct, key=lambda name: scores[name], reverse=True)[:elites]
        parents = [distinct[name] for name in best]
        current = list(parents)
        while len(current) < population:
            children = (breeding.child(parents, rng) for _ in range(TRIES))
            child = next((child for child in children if allowed(child)), None)
            current.append(sample(rng) if child is None else child)
