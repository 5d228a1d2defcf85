"""Evolution reaches known optima, within what is allowed, asks once, and is the same again with the same seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lamella.methods.tracenas import Breeding, Genome, cross_depth, cross_width, evolve, flip
from lamella.search import Memo

LAYERS = 8
LOW, HIGH = np.array([0.2, 0.2]), np.array([1.0, 1.0])
TARGET = np.random.default_rng(5).uniform(0.3, 0.9, (LAYERS, 2))
WANTED = np.array([1, 1, 0, 1, 1, 1, 0, 1], bool)


def sample(rng: np.random.Generator) -> Genome:
    while True:
        genome = Genome(rng.random(LAYERS) < 0.8, rng.uniform(LOW, HIGH, (LAYERS, 2)))
        if allowed(genome):
            return genome


def allowed(genome: Genome) -> bool:
    return genome.keep.sum() >= 5


def score(genome: Genome) -> float:
    return -float(np.abs(genome.width - TARGET).sum() + 3 * (genome.keep != WANTED).sum())


def key(genome: Genome) -> Any:
    return tuple(genome.keep), tuple(np.round(genome.width, 3).flatten())


def run(seed: int = 0, **options: Any) -> list[Any]:
    settings: dict[str, Any] = {"population": 20, "elites": 6, "iterations": 25} | options
    return list(evolve(sample, allowed, score, Breeding(LOW, HIGH), key=key, seed=seed, **settings))


def test_it_beats_as_many_random_samples_by_far_and_finds_the_layers() -> None:
    gains = []
    for seed in range(5):
        found = run(seed)
        best = max(found, key=lambda each: each.score)
        rng = np.random.default_rng(seed + 100)
        chance = max(score(sample(rng)) for _ in found)
        assert (best.genome.keep == WANTED).all()
        gains.append(best.score - chance)
    assert min(gains) > 0 and np.mean(gains) > 1


def test_nothing_forbidden_is_scored_and_nothing_twice() -> None:
    found = run()
    assert all(allowed(each.genome) for each in found)
    assert all(((each.genome.width >= LOW) & (each.genome.width <= HIGH)).all() for each in found)
    assert len({key(each.genome) for each in found}) == len(found)
    assert len(found) <= 20 + 24 * 14


def test_the_best_never_gets_lost() -> None:
    longer, shorter = run(iterations=12), run(iterations=6)
    assert [each.score for each in longer[: len(shorter)]] == [each.score for each in shorter]
    assert max(each.score for each in longer) >= max(each.score for each in shorter)


def test_the_seed_decides() -> None:
    assert [each.score for each in run(3)] == [each.score for each in run(3)] != [each.score for each in run(4)]


def test_nan_is_the_worst() -> None:
    found = list(
        evolve(
            sample,
            allowed,
            lambda genome: float("nan"),
            Breeding(LOW, HIGH),
            key=key,
            population=4,
            elites=2,
            iterations=2,
        )
    )
    assert all(each.score == -np.inf for each in found)


def test_operators_mix_parents_and_flip_at_least_one_layer() -> None:
    rng = np.random.default_rng(0)
    a, b = np.ones(9, bool), np.zeros(9, bool)
    for _ in range(50):
        child = cross_depth(a, b, rng)
        assert np.abs(np.diff(np.concatenate([[0], child.astype(int), [0]]))).sum() in (0, 2)  # one stretch
        mixed = cross_width(np.zeros((9, 2)), np.ones((9, 2)), rng)
        assert ((mixed >= 0) & (mixed <= 1)).all() and len(np.unique(mixed)) == 18
        assert (flip(a, rng) ^ a).sum() >= 1
    assert a.all() and not b.any()


def test_scores_are_kept_for_the_same_search_alone(tmp_path: Path) -> None:
    memo = Memo(tmp_path / "memo", {"seed": 1})
    memo["a"], memo["b"] = 0.1 + 0.2, -float("inf")
    with (tmp_path / "memo").open("a") as file:
        file.write('["c", 1')  # a line that a kill cut short
    assert Memo(tmp_path / "memo", {"seed": 1}) == {"a": 0.1 + 0.2, "b": -float("inf")}
    assert Memo(tmp_path / "memo", {"seed": 2}) == {}


@pytest.mark.parametrize("population", [2, 5])
def test_small_populations_work(population: int) -> None:
    assert len(run(population=population, elites=1, iterations=3)) >= population
