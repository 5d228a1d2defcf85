"""Systems, parameters and solutions of a family are in memory a few rows at a time, however many there are."""

from __future__ import annotations

import pickle
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lamella.files import Work
from lamella.methods.skr import LinearSystems, Solutions, arrange, skr
from lamella.methods.skr import rows as rows_module
from lamella.methods.skr.families import FAMILIES
from lamella.methods.skr.sorting import CentredRows, Order

GRID, BRIEF = 8, {"m": 14, "k": 6}
LARGE = 96  # cells along each side where memory is measured: a row of parameters or solutions has 72 KB


@pytest.fixture(autouse=True)
def two_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "BYTES", 2 * 8 * GRID**2)


def growth(job: Callable[[LinearSystems], Any], few: int = 6, many: int = 30) -> float:
    """Rows by which the peak of NumPy's and Python's memory grows with each system of a family."""
    peaks = []
    for count in (few, few, many):  # the first run imports modules
        tracemalloc.start()
        systems = FAMILIES["darcy"](LARGE, count)
        tracemalloc.reset_peak()
        job(systems)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    return (peaks[2] - peaks[1]) / (many - few) / (8 * LARGE**2)


def test_the_measurement_sees_what_is_kept() -> None:
    assert 0.9 < growth(lambda systems: np.asarray(systems.parameters[0])) < 1.1
    assert growth(list) > 4  # whole matrices


@pytest.mark.parametrize("order", ["greedy", "gray", "hilbert"])
def test_a_family_is_sorted_with_few_rows_in_memory(order: Order) -> None:
    assert growth(lambda systems: arrange(systems.parameters, len(systems), order)) < 0.3


def test_systems_are_solved_with_one_solution_in_memory(tmp_path: Path) -> None:
    def job(systems: LinearSystems) -> None:
        skr(systems, m=4, k=2, max_iterations=4, work=Work(Path(tempfile.mkdtemp(dir=tmp_path))))

    assert growth(job) < 0.3  # the figures of each system


def test_systems_are_written_one_by_one(tmp_path: Path) -> None:
    assert growth(lambda systems: systems.write(tmp_path / "systems.npz")) < 0.3


@pytest.mark.parametrize("suffix", [".npz", ".h5"])  # zarr writes whole chunks of its own choice
def test_a_data_set_is_written_few_rows_at_a_time(suffix: str, tmp_path: Path) -> None:
    def job(systems: LinearSystems) -> None:
        work = Work(Path(tempfile.mkdtemp(dir=tmp_path)))
        solutions = skr(systems, order="none", m=4, k=2, max_iterations=4, work=work)
        solutions.write(tmp_path / f"data{suffix}", overwrite=True)

    assert growth(job) < 0.3


def test_a_tile_has_as_many_rows_as_fit(monkeypatch: Any) -> None:
    block = np.zeros((7, 4))
    for size, lengths in ((1, 7 * [1]), (2 * 4 * 8, [2, 2, 2, 1]), (10**6, [7])):
        monkeypatch.setattr(rows_module, "BYTES", size)
        assert [len(block[tile]) for tile in rows_module.tiles(block)] == lengths


@pytest.mark.parametrize("name", FAMILIES)
def test_parameters_drawn_on_access_are_an_array(name: str) -> None:
    for block in FAMILIES[name](GRID, 6).parameters:
        whole = np.asarray(block)
        assert whole.shape == block.shape and whole.dtype == block.dtype and len(block) == 6
        np.testing.assert_array_equal(block[2:4], whole[2:4])
        np.testing.assert_array_equal(block[np.array([5, 1])], whole[[5, 1]])
        np.testing.assert_array_equal(block[-1], whole[-1])


def test_another_process_gets_a_family_without_its_parameters() -> None:
    assert len(pickle.dumps(FAMILIES["darcy"](64, 500))) < 10_000


@pytest.mark.parametrize("order", ["greedy", "grouped-greedy", "gray", "hilbert"])
def test_orders_do_not_depend_on_how_many_rows_are_in_memory(order: Order, monkeypatch: Any) -> None:
    for name in ("darcy", "clustered-darcy", "helmholtz", "convection"):
        parameters = FAMILIES[name](GRID, 30).parameters
        tiled = arrange(parameters, 30, order)
        monkeypatch.setattr(rows_module, "BYTES", 10**9)
        np.testing.assert_array_equal(arrange(tuple(map(np.asarray, parameters)), 30, order), tiled)


@pytest.mark.parametrize("width", [3, 50])  # rows that are shorter and longer than there are systems
def test_products_are_those_of_the_centred_rows(width: int) -> None:
    block = np.random.default_rng(0).standard_normal((12, width))
    members = np.array([3, 7, 1, 10, 4])
    centred = block - block.mean(axis=0)
    squares, with_all = CentredRows(block).products(members)
    expected = centred[members] @ centred[members].T
    np.testing.assert_allclose(squares, expected.diagonal(), rtol=1e-12)
    np.testing.assert_allclose([with_all(each) for each in range(5)], expected, rtol=1e-10, atol=1e-12)


def data_sets() -> Iterator[Solutions]:
    yield skr(FAMILIES["helmholtz"](GRID, 5), **BRIEF)
    yield skr(FAMILIES["darcy"](GRID, 3), m=14, k=0)  # a basis without vectors


@pytest.mark.parametrize("suffix", [".npz", ".h5", ".zarr"])
def test_data_sets_written_in_parts_are_read_as_they_are(suffix: str, tmp_path: Path) -> None:
    for number, solutions in enumerate(data_sets()):
        read = Solutions.read(solutions.write(tmp_path / f"{number}{suffix}"))
        for name, array in solutions._arrays().items():
            np.testing.assert_array_equal(read._arrays()[name], np.asarray(array))
            assert read._arrays()[name].dtype == array.dtype


def test_an_archive_is_the_one_that_numpy_writes(tmp_path: Path) -> None:
    systems = FAMILIES["darcy"](GRID, 5)
    systems.write(tmp_path / "ours.npz")
    every = list(systems)
    with np.load(tmp_path / "ours.npz") as file:
        for name in ("data", "indices"):
            parts = [getattr(each.A, name) for each in every]
            np.testing.assert_array_equal(file[name], np.concatenate(parts))
            assert file[name].dtype == parts[0].dtype
        np.testing.assert_array_equal(file["indptr"], [each.A.indptr for each in every])
        np.testing.assert_array_equal(file["b"], [each.b for each in every])
    opened = LinearSystems.open(tmp_path / "ours.npz")
    assert [each.digest for each in opened] == [each.digest for each in every]
