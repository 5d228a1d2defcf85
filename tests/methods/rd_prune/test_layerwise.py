"""Layer-wise rules against their definitions, computed weight by weight."""

from __future__ import annotations

import numpy as np
import pytest

from lamella.methods.rd_prune import layerwise

SHAPES = [(8, 3, 3, 3), (16, 8, 3, 3), (32, 64), (10, 32)]
SIZES = [216, 1152, 2048, 320]


def weights(seed: int = 0) -> list[np.ndarray]:
    draw = np.random.default_rng(seed)
    return [draw.normal(0, scale, shape) for shape, scale in zip(SHAPES, (1.0, 0.3, 0.1, 0.5), strict=True)]


def test_uniform_takes_the_same_share_of_each() -> None:
    assert layerwise.uniform([10, 100, 7], 0.3).tolist() == [3, 30, 2]
    assert layerwise.uniform([100], 0.29).tolist() == [29]  # 0.29 * 100 is below 29 in binary


def test_uniform_plus_leaves_the_first_convolution_and_a_fifth_of_the_last_layer() -> None:
    half = layerwise.uniform_plus(SIZES, 0.5, dense=0)
    share = 0.5 * sum(SIZES) / (sum(SIZES) - 216)
    assert half.tolist() == [0, *(int(share * size) for size in SIZES[1:])]
    most = layerwise.uniform_plus(SIZES, 0.9, dense=0)
    assert most[0] == 0 and most[3] == 256  # 80 % of 320
    assert abs(int(most.sum()) - 0.9 * sum(SIZES)) <= 3
    assert layerwise.uniform_plus(SIZES, 0.4, dense=None).tolist() == layerwise.uniform(SIZES, 0.4).tolist()


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.6, 0.9, 0.97])
def test_erk_keeps_in_proportion_to_the_sum_over_the_product_of_dimensions(sparsity: float) -> None:
    kept = np.array(SIZES) - layerwise.erk(SHAPES, sparsity)
    budget = (1 - sparsity) * sum(SIZES)
    sums = np.array([sum(shape) for shape in SHAPES])  # density = scale * sum / product, so kept = scale * sum
    whole = kept == SIZES
    assert (kept <= SIZES).all() and abs(kept.sum() - budget) <= len(SIZES)
    if not whole.all():
        scale = (budget - np.array(SIZES)[whole].sum()) / sums[~whole].sum()
        assert (np.abs(kept - scale * sums)[~whole] <= 1).all()  # they are whole weights
        assert (scale * sums >= SIZES)[whole].all()  # layers are whole only where they would keep more


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9])
def test_global_magnitude_removes_the_smallest_of_all(sparsity: float) -> None:
    given = weights()
    magnitudes = np.concatenate([np.abs(w).ravel() for w in given])
    owner = np.repeat(range(4), SIZES)
    gone = np.argsort(magnitudes)[: int(sparsity * len(magnitudes))]
    assert layerwise.global_magnitude(given, sparsity).tolist() == np.bincount(owner[gone], minlength=4).tolist()


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
def test_lamp_scores_are_squares_over_the_squares_of_what_is_not_smaller(sparsity: float) -> None:
    given = [w[:6].ravel()[:150] for w in weights(1)]
    scores = [np.array([u * u / sum(v * v for v in w if abs(v) >= abs(u)) for u in w]) for w in given]
    owner = np.repeat(range(4), [len(w) for w in given])
    gone = np.argsort(np.concatenate(scores))[: int(sparsity * len(owner))]
    assert layerwise.lamp(given, sparsity).tolist() == np.bincount(owner[gone], minlength=4).tolist()


def test_lamp_never_empties_a_layer_before_all_the_others_are_down_to_one_weight() -> None:
    """The largest weight of every layer has the score 1."""
    counts = layerwise.lamp(weights(2), 1 - 4 / sum(SIZES))
    assert (np.array(SIZES) - counts).tolist() == [1, 1, 1, 1]


def test_among_equal_weights_the_first_layers_go() -> None:
    assert layerwise.global_magnitude([np.ones(4), np.ones(4), np.zeros(2)], 0.5).tolist() == [3, 0, 2]
