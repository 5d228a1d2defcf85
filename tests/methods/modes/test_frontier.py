"""The frontier search against every pair of thresholds."""

from __future__ import annotations

import numpy as np
import pytest

from lamella.errors import MethodError
from lamella.methods.modes.frontier import frontier


def grown(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """A matrix that grows, not always strictly, along both axes."""
    steps = rng.random((rows, columns)) * (rng.random((rows, columns)) < 0.6)
    return steps.cumsum(0).cumsum(1)


def test_it_finds_what_brute_force_finds_on_monotone_grids() -> None:
    rng = np.random.default_rng(0)
    for _ in range(1000):
        rows, columns = rng.integers(1, 12, 2)
        g, f = grown(rng, rows, columns), grown(rng, rows, columns)
        share = rng.random() * g[-1, -1]
        found = frontier(int(rows), int(columns), lambda i, j: (float(g[i, j]), float(f[i, j])), float(share))  # noqa: B023
        assert found.skipped >= share and found.cost == f[g >= share].min()
        assert found.evaluations <= 2 * rows + columns and found.violations == 0


def test_every_text_threshold_is_compared_also_where_the_image_threshold_stays() -> None:
    g = np.array([[0.1, 0.4], [0.2, 0.6], [0.3, 0.7], [0.4, 0.9]])
    f = np.array([[0.0, 0.0], [0.0, 0.5], [0.0, 0.3], [0.0, 0.6]])  # falls between the second and the third
    found = frontier(4, 2, lambda i, j: (float(g[i, j]), float(f[i, j])), 0.5)
    assert (found.text, found.image, found.cost) == (2, 1, 0.3)


def test_a_pair_that_skips_too_little_is_never_chosen_where_g_falls() -> None:
    g = np.array([[0.1, 0.6], [0.2, 0.4], [0.3, 0.7]])
    found = frontier(3, 2, lambda i, j: (float(g[i, j]), -float(i)), 0.5)
    assert found.skipped >= 0.5 and (found.text, found.image) == (2, 1)


def test_violations_of_monotonicity_are_counted() -> None:
    g = np.array([[0.1, 0.5], [0.2, 0.4]])
    assert frontier(2, 2, lambda i, j: (float(g[i, j]), 0.0), 0.3).violations == 1


def test_what_cannot_be_skipped_is_refused() -> None:
    with pytest.raises(MethodError, match=r"skip 40\.0% and not 50\.0%"):
        frontier(3, 3, lambda i, j: (0.4, 0.0), 0.5)
