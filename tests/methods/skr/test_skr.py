"""The whole method: solutions in the caller's order, chunks, journals, and a basis that is dropped where it harms."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sparse
from scipy.sparse.linalg import spsolve

from lamella.errors import LamellaError, MethodError
from lamella.files import Work
from lamella.methods.skr import LinearSystems, Solutions, arrange, baseline, compare, skr
from lamella.methods.skr.chunks import cut
from lamella.methods.skr.families import clustered_darcy, convection, darcy, helmholtz, poisson
from lamella.methods.skr.gcrodr import Solve, gcrodr
from lamella.methods.skr.harm import Harm
from lamella.methods.skr.preconditioners import jacobi
from lamella.workers import Workers

FAMILY = clustered_darcy(12, 9, clusters=3, seed=1)
BRIEF: dict[str, Any] = {"m": 14, "k": 6}


def same(first: Solutions, second: Solutions) -> bool:
    """The same but for the seconds."""
    timeless = [[replace(each, seconds=0.0) for each in solutions.solved] for solutions in (first, second)]
    return np.array_equal(first.x, second.x) and timeless[0] == timeless[1]


@pytest.mark.parametrize("order", ["none", "random", "greedy", "hilbert"])
def test_solutions_are_in_the_callers_order(order):
    solutions = skr(FAMILY, order=order, tol=1e-10, **BRIEF)
    assert sorted(solutions.sequence) == list(range(9))
    for x, system in zip(solutions.x, FAMILY, strict=True):
        np.testing.assert_allclose(x, spsolve(system.A, system.b), rtol=1e-6)
    assert [each.index for each in solutions.solved] == solutions.sequence.tolist()
    np.testing.assert_array_equal(solutions.parameters[0], FAMILY.parameters[0])


def test_systems_are_solved_one_after_the_other_as_the_algorithm_says():
    solutions, U = skr(FAMILY, recycle="always", preconditioner="none", **BRIEF), None
    for index in arrange(FAMILY.parameters, 9, "greedy"):
        system = FAMILY[int(index)]
        solve = gcrodr(system.A, system.b, Y=U, **BRIEF)
        U = solve.U
        np.testing.assert_array_equal(solutions.x[index], solve.x)
    np.testing.assert_array_equal(solutions.bases[0], U)


def test_the_products_that_start_a_recycled_system_are_counted():
    solutions = skr(FAMILY, recycle="always", **BRIEF)
    first, *later = solutions.solved
    assert first.start == "cold" and first.matvecs == first.iterations + 1  # and the true residual
    assert all(each.start == "recycled" and 6 <= each.matvecs - each.iterations - 1 <= 7 for each in later)
    assert all(each.applications == each.iterations for each in solutions.solved)
    assert all(each.delta is not None and 0 <= each.delta <= 1 for each in later) and first.delta is None


def test_never_carries_nothing():
    solutions = skr(FAMILY, recycle="never", **BRIEF)
    for each in solutions.solved:
        system = FAMILY[each.index]
        cold = gcrodr(system.A, system.b, M=jacobi(system.A), **BRIEF)
        assert each.iterations == cold.iterations and each.start == "cold"


def test_chunks_are_contiguous_and_start_cold():
    assert [part.tolist() for part in cut(np.arange(5), 2)] == [[0, 1, 2], [3, 4]]
    assert len(cut(np.arange(3), 8)) == 3


@pytest.mark.slow
def test_processes_solve_chunks_as_one_process_solves_each_of_them():
    """Two workers give what two runs give, one for each half of the sorted sequence."""
    both = skr(FAMILY, workers=Workers(2), **BRIEF)
    halves = cut(arrange(FAMILY.parameters, 9, "greedy"), 2)
    for half in halves:
        alone = skr(LinearSystems.of([(s.A, s.b) for s in (FAMILY[int(i)] for i in half)]), order="none", **BRIEF)
        np.testing.assert_allclose(both.x[half], alone.x, rtol=1e-12)  # a worker's BLAS may use fewer threads
    assert [each.index for each in both.solved if each.start == "cold"] == [half[0] for half in halves]
    assert len(both.bases) == 2


def test_one_worker_is_the_sequential_run_bitwise():
    assert same(skr(FAMILY, workers=Workers(1), **BRIEF), skr(FAMILY, **BRIEF))


class Killed(BaseException):
    pass


CALLS: list[int] = []


def failing_jacobi(A: Any, after: int) -> Any:
    CALLS.append(1)
    if len(CALLS) > after:
        raise Killed
    return jacobi(A)


def counted_jacobi(A: Any) -> Any:
    return failing_jacobi(A, after=10**9)


@pytest.mark.parametrize("backend", ["numpy", "gcrotmk"])
def test_a_killed_run_resumes_with_the_same_result(tmp_path, backend):
    options: dict[str, Any] = {"backend": backend, "recycle": "auto" if backend == "numpy" else "always", **BRIEF}
    whole = skr(FAMILY, preconditioner=counted_jacobi, **options)
    for after in (3, 5):
        CALLS.clear()
        stopping = partial(failing_jacobi, after=after)
        stopping.__module__, stopping.__qualname__ = counted_jacobi.__module__, counted_jacobi.__qualname__  # type: ignore[attr-defined]
        with pytest.raises(Killed):
            skr(FAMILY, preconditioner=stopping, work=Work(tmp_path / "work"), **options)
    CALLS.clear()
    assert same(skr(FAMILY, preconditioner=counted_jacobi, work=Work(tmp_path / "work"), **options), whole)
    assert len(CALLS) == 9 - 3 - 5
    CALLS.clear()
    assert same(skr(FAMILY, preconditioner=counted_jacobi, work=Work(tmp_path / "work"), **options), whole)
    assert not CALLS  # a finished run has nothing to do


def test_lines_that_a_kill_left_behind_its_state_are_solved_again(tmp_path):
    whole = skr(FAMILY, **BRIEF)
    skr(FAMILY, work=Work(tmp_path), **BRIEF)
    lines = tmp_path / "solved-000.jsonl"
    lines.write_text(lines.read_text() + '{"index": 3, "sta')
    assert same(skr(FAMILY, work=Work(tmp_path), **BRIEF), whole)
    lines.write_text("\n".join(lines.read_text().splitlines()[:4]))  # fewer than the state says
    assert same(skr(FAMILY, work=Work(tmp_path), **BRIEF), whole)
    (tmp_path / "state-000.npz").write_bytes(b"PK torn")
    assert same(skr(FAMILY, work=Work(tmp_path), **BRIEF), whole)


def test_a_work_folder_of_another_job_starts_from_scratch(tmp_path):
    skr(FAMILY, work=Work(tmp_path), **BRIEF)
    assert same(skr(FAMILY, work=Work(tmp_path), tol=1e-5, **BRIEF), skr(FAMILY, tol=1e-5, **BRIEF))
    items = [(s.A, s.b, p) for s, p in zip(FAMILY, FAMILY.parameters[0], strict=True)]
    skr(LinearSystems.of(items), work=Work(tmp_path), **BRIEF)
    items[4] = (items[4][0] * 2, *items[4][1:])  # the same job by its description, but another system
    changed = LinearSystems.of(items)
    assert same(skr(changed, work=Work(tmp_path), **BRIEF), skr(changed, **BRIEF))


def test_a_folder_that_is_no_work_folder_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(LamellaError, match="not empty, and not a work directory of skr; choose another one"):
        skr(FAMILY, work=Work(tmp_path), **BRIEF)
    with pytest.raises(LamellaError, match="cannot be used as work directory"):
        skr(FAMILY, work=Work(tmp_path / "thesis.tex"), **BRIEF)
    assert (tmp_path / "thesis.tex").read_text() == "years"


def test_the_callers_systems_are_not_changed():
    A = sparse.csr_array(([1.0, 2, 3, 4], ([0, 0, 1, 2], [2, 0, 1, 2])), shape=(3, 3))
    A.indices[:2] = A.indices[:2][::-1].copy()  # unsorted, and it must stay so
    before, b = (A.data.copy(), A.indices.copy()), np.ones(3)
    skr(LinearSystems.of([(A, b)]), order="none")
    np.testing.assert_array_equal(A.data, before[0])
    np.testing.assert_array_equal(A.indices, before[1])
    np.testing.assert_array_equal(b, np.ones(3))


def test_a_right_hand_side_of_zero_has_the_solution_zero_which_is_reported():
    system = darcy(6, 1)[0]
    solutions = skr(LinearSystems.of([(system.A, system.b), (2 * system.A, 0 * system.b)]), order="none")
    assert not solutions.x[1].any() and solutions.solved[1].start == "zero" and solutions.converged.all()
    assert "1 systems have a right-hand side of zero, and thus the solution zero." in solutions.notes


def test_one_matrix_for_all_is_reported_and_solved_by_one_factorisation_beside_it():
    with pytest.warns(UserWarning, match="have the same matrix; if all do, one factorisation"):
        found = compare(poisson(8, 4), against=("gmres",))
    assert "All 4 systems have the same matrix" in " ".join(found.notes)
    assert [each.start for each in found.others["one-lu"].solved] == ["factorised"] + 3 * ["factors reused"]
    assert found.max_difference("one-lu") < 1e-6


def test_systems_that_do_not_converge_are_named():
    solutions = skr(FAMILY, max_iterations=20, **BRIEF)
    assert not solutions.converged.any()
    assert "9 of 9 systems did not reach the tolerance: 0, 1, 2" in solutions.text()


HARMFUL = {
    "convection": (convection(28, 14, seed=11), "jacobi"),
    "indefinite": (helmholtz(28, 14, wavenumber=(4.0, 28.0), medium=None, seed=11), "none"),
}


@pytest.mark.parametrize("name", HARMFUL)
def test_a_basis_that_does_harm_is_dropped(name):
    systems, preconditioner = HARMFUL[name]
    plain, found = (skr(systems, recycle=how, preconditioner=preconditioner) for how in ("always", "auto"))
    reset = baseline("gcrodr-reset", systems, preconditioner=preconditioner)
    assert plain.mean("iterations") > 1.2 * reset.mean("iterations")
    assert any(each.start == "dropped" for each in found.solved)
    assert found.mean("iterations") < 1.1 * reset.mean("iterations")
    assert "was harmful" in found.text()


def test_a_basis_that_helps_is_never_dropped():
    for systems in (darcy(20, 8, seed=7), clustered_darcy(20, 8, seed=7)):
        assert same(skr(systems, recycle="auto"), skr(systems, recycle="always"))


def steady(iterations: int) -> Solve:
    """A cold start that converges evenly to 1e-8."""
    history = np.logspace(0, -8, iterations + 1).tolist()
    return Solve(np.zeros(1), None, iterations, history=history, work=list(range(iterations + 1)))


def test_two_cycles_behind_the_cold_starts_drop_a_basis():
    harm = Harm()
    harm.update(steady(80), carried=False)
    assert harm.may_recycle()
    behind, ahead = 10**-3.0, 10**-5.0  # a cold start has 1e-4 after 40 products
    assert [harm(40, each) for each in (behind, ahead, behind, behind)] == [False, False, False, True]


def test_losses_stop_the_trying_until_they_are_a_small_share():
    harm = Harm()
    harm.update(steady(100), carried=False)
    harm.update(replace(steady(150), dropped=True), carried=True)  # 50 products lost of 250
    waited = 0
    while not harm.may_recycle():
        harm.update(steady(100), carried=False)
        waited += 1
    assert waited == 8  # 250 + 8 * 100 products, of which 5 % are more than 50


def test_what_was_saved_pays_for_no_more_than_one_cold_start():
    harm = Harm()
    harm.update(steady(100), carried=False)
    for _ in range(50):
        harm.update(steady(20), carried=True)
    assert harm.saved == 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"m": 10, "k": 10}, "k is 10 and m is 10; recycle fewer than m vectors"),
        ({"backend": "gcrotmk"}, "recycle 'auto' needs the backend 'numpy'"),
        ({"backend": "petsc", "recycle": "always", "work": Work(Path("w"))}, "a work directory needs the basis,"),
    ],
)
def test_bad_options_are_refused_in_one_line(options, message):
    with pytest.raises(MethodError, match=message) as caught:
        skr(FAMILY, **options)
    assert "\n" not in str(caught.value)


def test_petsc_is_asked_for_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "petsc4py", None)
    with pytest.raises(LamellaError, match="needs petsc4py and a PETSc with HPDDM; use backend 'numpy'"):
        skr(FAMILY, backend="petsc", recycle="always")


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_solutions_with_a_work_directory_stay_on_disk_and_are_not_changed_by_a_later_run(tmp_path, count):
    first = skr(FAMILY, work=Work(tmp_path), workers=Workers(count), **BRIEF)
    before = np.array(first.x)
    np.testing.assert_allclose(before, skr(FAMILY, **BRIEF).x, rtol=0, atol=1e-7)
    later = skr(FAMILY, work=Work(tmp_path), workers=Workers(count), tol=1e-3, **BRIEF)
    assert isinstance(first.x, np.memmap) and not np.array_equal(before, later.x)
    np.testing.assert_array_equal(first.x, before)


def test_what_cannot_travel_to_another_process_is_refused():
    with pytest.raises(LamellaError, match="cannot be sent to other processes"):
        skr(FAMILY, preconditioner=lambda A: jacobi(A), workers=Workers(2))


@pytest.mark.slow
def test_a_failure_in_another_process_is_the_users_own():
    """The chunk that fails says why, and the other one is not waited for."""
    system = darcy(6, 1)[0]
    broken = sparse.csr_array((np.ones(1), ([1], [1])), shape=system.A.shape)
    with pytest.raises(LamellaError, match="system 1: its preconditioner 'jacobi' is singular"):
        skr(LinearSystems.of([(system.A, system.b), (broken, system.b)]), order="none", workers=Workers(2))
