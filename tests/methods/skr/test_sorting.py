"""Orders are permutations that keep neighbours close, whatever the systems are called."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
from numpy.typing import NDArray

from lamella.errors import LamellaError
from lamella.methods.skr import arrange, sorting
from lamella.methods.skr.sorting import Order

Array = NDArray[np.float64]
FIELDS = np.random.default_rng(0).standard_normal((40, 6, 5))
SCALARS = np.random.default_rng(1).uniform(0, 9, 40)


def brute_greedy(fields: Array, scalars: Array | None = None, start: int = 0) -> list[int]:
    """Algorithm 1 of the paper as it is written, with infinity where the authors' code has 10000."""
    order, remaining = [start], set(range(len(fields))) - {start}
    while remaining:
        here, best, least = order[-1], -1, np.inf
        for j in sorted(remaining):
            d = np.linalg.norm(fields[here] - fields[j])
            d += 0 if scalars is None else abs(scalars[here] - scalars[j])
            if d < least:
                best, least = j, d
        order.append(best)
        remaining.remove(best)
    return order


@pytest.mark.parametrize("order", get_args(Order))
@pytest.mark.parametrize("parameters", [(FIELDS,), (FIELDS, SCALARS), (SCALARS,), (FIELDS[:, :, 0],), (FIELDS[:1],)])
def test_every_order_is_a_permutation(order, parameters):
    count = len(parameters[0])
    assert sorted(arrange(parameters, count, order)) == list(range(count))


@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_greedy_is_the_papers_algorithm_at_any_scale(scale):
    assert arrange((scale * FIELDS,), 40, "greedy").tolist() == brute_greedy(FIELDS)


def test_a_field_and_a_wavenumber_count_with_the_sum_of_their_norms():
    assert arrange((FIELDS, SCALARS), 40, "greedy").tolist() == brute_greedy(FIELDS, SCALARS)


def test_greedy_does_not_depend_on_what_systems_are_called_but_for_the_start():
    names = np.r_[0, 1 + np.random.default_rng(2).permutation(39)]  # system 0 stays the first
    renamed = arrange((FIELDS[names],), 40, "greedy")
    np.testing.assert_array_equal(names[renamed], arrange((FIELDS,), 40, "greedy"))


def test_equal_parameters_follow_each_other():
    fields = np.repeat(FIELDS[:5], 4, axis=0)[np.random.default_rng(3).permutation(20)]
    sorted_fields = fields[arrange((fields,), 20, "greedy")]
    jumps = (np.abs(np.diff(sorted_fields, axis=0)).max(axis=(1, 2)) > 0).sum()
    assert jumps == 4


@pytest.mark.parametrize("order", ["greedy", "grouped-greedy", "gray", "hilbert"])
def test_neighbours_are_closer_than_at_random(order, monkeypatch):
    monkeypatch.setattr(sorting, "GROUP", 25)
    turns = np.random.default_rng(0).uniform(0, 2 * np.pi, (200, 2))
    x, y = np.meshgrid(np.linspace(0, 1, 16), np.linspace(0, 1, 16))
    fields = np.sin(2 * np.pi * x + turns[:, :1, None]) + np.cos(2 * np.pi * y + turns[:, 1:, None])

    def length(sequence: NDArray[np.intp]) -> float:
        return float(np.linalg.norm(np.diff(fields[sequence], axis=0), axis=(1, 2)).mean())

    assert length(arrange((fields,), 200, order)) < 0.6 * length(arrange((fields,), 200, "random"))


def test_greedy_works_in_groups_where_there_are_too_many(monkeypatch):
    monkeypatch.setattr(sorting, "LARGE", 30)
    monkeypatch.setattr(sorting, "GROUP", 10)
    grouped = arrange((FIELDS,), 40, "greedy")
    np.testing.assert_array_equal(grouped, arrange((FIELDS,), 40, "grouped-greedy"))
    assert grouped.tolist() != brute_greedy(FIELDS)


def test_cells_in_gray_order_differ_in_one_axis():
    corners = np.array([[(cell >> axis) & 1 for axis in range(3)] for cell in range(8)], dtype=float)
    places = sorting._gray_cells(corners @ np.diag([4.0, 2.0, 1.0]))  # the principal axes are these, in this order
    assert sorted(places) == list(range(8))
    assert (np.abs(np.diff(corners[np.argsort(places)], axis=0)).sum(axis=1) == 1).all()


@pytest.mark.parametrize("axes", [2, 3])
def test_the_hilbert_curve_visits_every_cell_by_steps_of_one(axes):
    cells = np.stack(np.meshgrid(*[np.arange(8)] * axes, indexing="ij"), axis=-1).reshape(-1, axes)
    places = [sorting._hilbert(cell.tolist(), 3) for cell in cells]
    assert sorted(places) == list(range(8**axes))
    assert (np.abs(np.diff(cells[np.argsort(places)], axis=0)).sum(axis=1) == 1).all()


def test_features_are_the_central_block_of_the_spectrum():
    fields = np.random.default_rng(0).standard_normal((3, 32, 32))
    spectrum = np.fft.fftshift(np.fft.fft2(fields[1]))[10:22, 10:22].ravel()
    np.testing.assert_allclose(sorting.features((fields,))[1], np.r_[spectrum.real, spectrum.imag])


def test_random_order_comes_from_its_seed():
    orders = [arrange((), 30, "random", seed).tolist() for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_without_parameters_there_is_nothing_to_sort_on():
    with pytest.raises(LamellaError, match="needs the parameters of the systems"):
        arrange((), 3, "greedy")
    assert arrange((), 3, "none").tolist() == [0, 1, 2]
