"""Evolution of shapes: which layers stay, and how wide each part of them is.

    elites, unchanged      the best so far
    children               two elites: a stretch of layers from one and the rest from the other, widths in between;
                           then sometimes a layer flips, and sometimes all widths shake
    immigrants             fresh samples, for what children cannot fill, so that diversity never dies

A score is asked once for each shape. Shapes that are not allowed are never scored.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

TRIES = 20  # for one child that is allowed, before an immigrant takes its place


@dataclass(frozen=True)
class Genome:
    """One shape before it is rounded to what a model can have.

    Attributes:
        keep: whether each layer stays [layers] bool.
        width: how much of each part of each layer stays, as shares [layers, parts].
    """

    keep: np.ndarray
    width: np.ndarray


@dataclass(frozen=True)
class Breeding:
    """How children come about.

    Attributes:
        low, high: the limits of the widths [parts].
        crossover: how likely a child has two parents.
        mutate_depth: how likely a child's layers mutate; see :func:`flip`.
        mutate_width: how likely a child's widths mutate: each is multiplied by 1 + N(0, jitter).
    """

    low: np.ndarray
    high: np.ndarray
    crossover: float = 0.7
    mutate_depth: float = 0.2
    mutate_width: float = 0.2
    jitter: float = 0.1

    def child(self, parents: Sequence[Genome], rng: np.random.Generator) -> Genome:
        a, b = (parents[int(place)] for place in rng.integers(0, len(parents), 2))
        keep, width = a.keep, a.width
        if rng.random() < self.crossover:
            keep, width = cross_depth(a.keep, b.keep, rng), cross_width(a.width, b.width, rng)
        if rng.random() < self.mutate_depth:
            keep = flip(keep, rng)
        if rng.random() < self.mutate_width:
            width = np.clip(width * (1 + self.jitter * rng.standard_normal(width.shape)), self.low, self.high)
        return Genome(keep, width)


def cross_depth(a: np.ndarray, b: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The layers of ``b`` with one stretch of ``a``'s in their place [layers]."""
    start, stop = np.sort(rng.integers(0, len(a) + 1, 2))
    child = b.copy()
    child[start:stop] = a[start:stop]
    return child


def cross_width(a: np.ndarray, b: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Widths between those of both parents, each at a place of its own [layers, parts]."""
    place = rng.random(a.shape)
    return place * a + (1 - place) * b


def flip(keep: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The same layers but one, and each other with a chance of one in all [layers]."""
    flips = rng.random(len(keep)) < 1 / len(keep)
    flips[rng.integers(len(keep))] = True
    return keep ^ flips


class Scored(NamedTuple):
    """One evaluation: the shape and its score; larger is better."""

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
) -> Iterator[Scored]:
    """Evolve shapes; yields every evaluation as it is made.

    Args:
        sample: draws an allowed genome.
        allowed: whether a genome is within the budget.
        score: what to maximise; NaN is the worst.
        breeding: how children come about.
        key: what two genomes share when they are the same shape.
        population, elites, iterations: individuals of a generation, how many go on unchanged, and generations.
        seed: of everything that is drawn.
    """
    rng = np.random.default_rng(seed)
    known: dict[Hashable, float] = {}
    current = [sample(rng) for _ in range(population)]
    for _ in range(iterations):
        for genome in current:
            name = key(genome)
            if name not in known:
                value = score(genome)
                known[name] = -np.inf if np.isnan(value) else value
                yield Scored(genome, known[name])
        distinct: dict[Hashable, Genome] = {}
        for genome in current:
            distinct.setdefault(key(genome), genome)
        best = sorted(distinct, key=lambda name: known[name], reverse=True)[:elites]
        parents = [distinct[name] for name in best]
        current = list(parents)
        while len(current) < population:
            children = (breeding.child(parents, rng) for _ in range(TRIES))
            child = next((child for child in children if allowed(child)), None)
            current.append(sample(rng) if child is None else child)
