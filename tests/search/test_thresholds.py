"""Thresholds have the requested number of scores below them; a sweep keeps every improvement over earlier results."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lamella.search import rising, threshold


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_threshold_has_the_requested_number_of_scores_below_it_and_none_next_to_it(dtype: torch.dtype) -> None:
    scores = torch.rand(5, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    ordered = scores.flatten().double().sort().values.tolist()
    for below in range(21):
        found = threshold(scores, below, margin=1e-3)
        assert int((scores.double() < found).sum()) == below
        if 0 < below < 20:
            assert found == (ordered[below - 1] + ordered[below]) / 2
    assert threshold(scores, 0, margin=1e-3) == pytest.approx(ordered[0] - 5e-4, abs=1e-7)
    assert threshold(scores, 20) == ordered[-1] and threshold(scores, 20, 1e-3) > ordered[-1]


def test_scores_that_are_equal_are_on_one_side_of_a_threshold() -> None:
    assert threshold(np.array([0.5, 0.5, 0.5, 0.9]), 2) == 0.5


def test_a_sweep_is_evaluated_lazily() -> None:
    asked = []

    def found(value: float) -> float:
        asked.append(value)
        return value

    sweep = rising(map(found, [0.0, 0.2, 0.1, 0.2, 0.5, 0.4]), float)
    assert next(sweep) == 0.2 and asked == [0.0, 0.2]
    assert list(sweep) == [0.5]
    assert list(rising([-2.0, -1.0], float)) == [] and list(rising([-2.0, -1.0], float, above=-2.0)) == [-1.0]
