"""GCRO-DR against dense algebra, SciPy's GMRES and GMRES-DR, and what must hold after every cycle."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sparse
from numpy.typing import NDArray
from scipy.linalg import eigh, subspace_angles
from scipy.sparse.linalg import gmres

from lamella.errors import NumericsError
from lamella.methods.skr import preconditioners
from lamella.methods.skr.families import convection, darcy
from lamella.methods.skr.gcrodr import Cycle, gcrodr

Array = NDArray[np.float64]


def nonsymmetric(n: int = 120, seed: int = 0) -> tuple[Any, Array]:
    """A matrix with complex eigenvalues near zero, and a right-hand side."""
    random = np.random.default_rng(seed)
    A = np.diag(np.linspace(0.05, 6, n)) + 0.3 * np.diag(np.ones(n - 1), 1) - 0.25 * np.diag(np.ones(n - 1), -1)
    return sparse.csr_array(A), random.standard_normal(n)


def test_without_recycling_the_residuals_are_those_of_scipys_restarted_gmres():
    A, b = nonsymmetric()
    theirs: list[float] = []
    gmres(A, b, rtol=1e-9, restart=12, maxiter=60, callback=theirs.append, callback_type="pr_norm")
    ours = gcrodr(A, b, m=12, k=0, tol=1e-9)
    count = min(len(theirs), ours.iterations)
    assert count > 24  # restarted at least twice
    np.testing.assert_allclose(ours.history[1 : count + 1], theirs[:count], atol=1e-10, rtol=0)


def test_the_first_cycle_minimises_the_residual_over_the_krylov_space():
    A, b = nonsymmetric(40)
    dense, solve = A.toarray(), gcrodr(A, b, m=10, k=4, tol=1e-14, max_iterations=10)
    space = np.linalg.qr(np.stack([np.linalg.matrix_power(dense, j) @ b for j in range(10)], axis=1))[0]
    for j in range(1, 11):
        columns = dense @ space[:, :j]
        best = np.linalg.norm(b - columns @ np.linalg.lstsq(columns, b)[0]) / np.linalg.norm(b)
        assert solve.history[j] == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("preconditioner", ["none", "jacobi", "ilu"])
def test_every_cycle_keeps_its_invariants_while_matrix_and_preconditioner_change(preconditioner):
    Y, cycles = None, 0
    for system in darcy(20, 3, seed=3):
        A = system.A
        size = float(abs(A).sum(axis=0).max())

        def check(cycle: Cycle, A: Any = A, size: float = size) -> None:
            nonlocal cycles
            cycles += 1
            k = cycle.C.shape[1]
            assert np.linalg.norm(A @ cycle.U - cycle.C) <= 1e-10 * size
            assert np.linalg.norm(cycle.C.T @ cycle.C - np.eye(k)) <= 1e-12
            assert np.linalg.norm(A @ cycle.Vhat - cycle.What @ cycle.G) <= 1e-12 * size * np.linalg.norm(cycle.Vhat)

        M = preconditioners.make(preconditioner, A, "system")
        solve = gcrodr(A, system.b, M=M, Y=Y, m=16, k=6, tol=1e-9, on_cycle=check)
        Y = solve.U
        assert solve.converged
    assert cycles > 9


def test_the_residual_is_the_true_one_and_every_product_is_counted():
    class Counted:
        def __init__(self, A: Any) -> None:
            self.A, self.products = A, 0

        def __matmul__(self, v: Array) -> Array:
            self.products += 1 if v.ndim == 1 else v.shape[1]
            return self.A @ v

    first, second = darcy(16, 2)
    Y = gcrodr(first.A, first.b, m=12, k=5).U
    counted = Counted(second.A)
    solve = gcrodr(counted, second.b, Y=Y, m=12, k=5, tol=1e-8)
    true = np.linalg.norm(second.b - second.A @ solve.x) / np.linalg.norm(second.b)
    assert solve.residual == pytest.approx(true) and true <= 1.01e-8
    assert solve.matvecs == counted.products == solve.iterations + Y.shape[1] + 1
    assert len(solve.history) == len(solve.work) == solve.iterations + 2  # at the start, and after the projection


def test_a_second_solve_of_the_same_system_needs_fewer_iterations():
    system = darcy(20, 1)[0]
    first = gcrodr(system.A, system.b, m=20, k=8)
    second = gcrodr(system.A, system.b, Y=first.U, m=20, k=8)
    assert second.iterations < 0.8 * first.iterations


def test_with_the_exact_invariant_subspace_it_runs_as_gmres_on_the_deflated_problem():
    system, m, k = darcy(14, 1, seed=1)[0], 18, 6
    Q = eigh(system.A.toarray(), subset_by_index=(0, k - 1))[1]
    solve = gcrodr(system.A, system.b, Y=Q, m=m, k=k, tol=1e-9)
    projected = sparse.csr_array((np.eye(len(Q)) - Q @ Q.T) @ system.A.toarray())
    right = system.b - Q @ (Q.T @ system.b)
    scale = np.linalg.norm(right) / np.linalg.norm(system.b)
    deflated = gcrodr(projected, right, m=m - k, k=0, tol=1e-9 / scale)
    assert solve.iterations == deflated.iterations
    assert np.sin(subspace_angles(solve.U, Q)).max() <= 1e-8  # delta = 0, and it stays there


def gmres_dr(A: Array, b: Array, m: int, k: int, cycles: int) -> list[float]:
    """Morgan's GMRES-DR in dense algebra: harmonic Ritz vectors and a Krylov space of the residual, each cycle anew."""
    x, kept, norms = np.zeros_like(b), np.empty((len(b), 0)), []
    for _ in range(cycles):
        r = b - A @ x
        space = kept
        v = r
        while space.shape[1] < m:
            basis = np.linalg.qr(np.column_stack([space, v]))[0]
            space, v = basis, A @ basis[:, -1]
        AW = A @ space
        x = x + space @ np.linalg.lstsq(AW, r)[0]
        norms.append(float(np.linalg.norm(b - A @ x)))
        inverse, vectors = np.linalg.eig(np.linalg.solve(AW.T @ AW, AW.T @ space))  # 1 / theta
        order = np.argsort(-np.abs(inverse))
        split = abs(abs(inverse[order[k - 1]]) - abs(inverse[order[k]])) < 1e-9 * abs(inverse[order[k]])
        wanted = space @ vectors[:, order[: k + 1 if split else k]]
        real = np.column_stack([wanted.real, wanted.imag])
        kept = np.linalg.svd(real)[0][:, : wanted.shape[1]]
    return norms


@pytest.mark.parametrize("k", [4, 5])
def test_one_system_goes_as_with_gmres_dr_cycle_by_cycle(k):
    A, b = nonsymmetric(90, seed=2)
    norms: list[float] = []
    gcrodr(A, b, m=14, k=k, tol=1e-7, on_cycle=lambda cycle: norms.append(cycle.residual))
    expected = gmres_dr(A.toarray(), b, 14, k, len(norms) - 1)
    assert len(expected) >= 3
    np.testing.assert_allclose(norms[:-1], expected, rtol=1e-8)


def test_complex_pairs_stay_together_and_the_basis_real():
    rotations = [np.array([[0.01 * i, 0.2], [-0.2, 0.01 * i]]) for i in range(1, 5)]
    A = sparse.block_diag([*rotations, np.diag(np.linspace(2, 9, 60))], format="csr")
    b = np.random.default_rng(0).standard_normal(A.shape[0])
    sizes: list[int] = []
    solve = gcrodr(A, b, m=20, k=5, tol=1e-10, on_cycle=lambda cycle: sizes.append(cycle.U.shape[1]))
    assert solve.converged and 6 in sizes  # three pairs, where five would split one
    assert solve.U is not None and solve.U.dtype == np.float64
    assert np.linalg.matrix_rank(solve.U) == solve.U.shape[1]


@pytest.mark.parametrize("k", [1, 4, 10])
def test_equal_moduli_do_not_fill_the_search_space(k):
    """Every eigenvalue of a cyclic shift has modulus 1, and GMRES makes no progress before n steps."""
    A = sparse.csr_array((np.ones(40), (np.arange(40), np.roll(np.arange(40), 1))), shape=(40, 40))
    sizes: list[int] = []
    b = np.random.default_rng(0).standard_normal(40)
    gcrodr(A, b, m=11, k=k, max_iterations=60, on_cycle=lambda cycle: sizes.append(cycle.U.shape[1]))
    assert sizes and max(sizes) <= min(k + 1, 10)


def test_dependent_and_zero_columns_of_the_carried_basis_are_dropped():
    system = darcy(12, 1)[0]
    Y = gcrodr(system.A, system.b, m=12, k=4).U
    assert Y is not None
    doubled = np.column_stack([Y, Y[:, :2], np.zeros(len(Y))])
    found: list[int] = []
    solve = gcrodr(system.A, system.b, Y=doubled, m=12, k=4, on_cycle=lambda cycle: found.append(cycle.Vhat.shape[1]))
    assert solve.converged and max(found) <= 12


def test_a_basis_in_solution_space_survives_a_preconditioner_that_changes():
    random = np.random.default_rng(0)
    totals = {"reset": 0, "in solution space": 0, "in the preconditioned space": 0}
    bases: dict[str, Any] = {}
    before = None
    for system in darcy(20, 5, seed=2):
        inverse = np.exp(0.5 * random.standard_normal(system.A.shape[0])) / system.A.diagonal()
        for name in totals:
            Y = bases.get(name)
            if Y is not None and name == "in the preconditioned space":
                Y = (inverse / before)[:, None] * Y  # what u of x = M^-1 u means once M has changed
            solve = gcrodr(system.A, system.b, M=lambda v, s=inverse: s * v, Y=Y, m=20, k=8)
            totals[name] += solve.iterations
            bases[name] = solve.U if name != "reset" else None
        before = inverse
    assert totals["in solution space"] < 0.9 * totals["reset"]
    assert totals["in solution space"] < 0.9 * totals["in the preconditioned space"]


def test_an_exhausted_krylov_space_is_the_solution():
    solve = gcrodr(sparse.eye_array(30, format="csr"), np.ones(30))
    assert (solve.iterations, solve.converged) == (1, True)
    np.testing.assert_allclose(solve.x, np.ones(30), rtol=1e-15)


def test_it_stops_where_it_may_and_says_that_it_has_not_converged():
    system = convection(16, 1)[0]
    solve = gcrodr(system.A, system.b, m=10, k=4, max_iterations=13)
    assert solve.iterations == 13 and not solve.converged


def test_a_tolerance_below_rounding_ends_without_success():
    system = darcy(12, 1)[0]
    solve = gcrodr(system.A, system.b, tol=1e-17)
    assert not solve.converged and solve.residual < 1e-12 and solve.iterations < 1000


def test_a_singular_system_ends():
    A = sparse.diags_array([0.0, 0.0, *np.linspace(1, 2, 20)]).tocsr()
    solve = gcrodr(A, np.ones(22), m=8, k=3, max_iterations=200)
    assert not solve.converged and solve.iterations <= 200


def test_a_first_guess_is_where_it_starts():
    system = darcy(12, 1)[0]
    x = gcrodr(system.A, system.b, tol=1e-10).x
    solve = gcrodr(system.A, system.b, x0=x, tol=1e-8)
    assert solve.iterations == 0 and solve.converged


def test_overflow_is_an_error_and_not_iterated():
    A = sparse.diags_array(np.full(10, 1e200)).tocsr()
    with np.errstate(all="ignore"), pytest.raises(NumericsError, match="not finite"):
        gcrodr(A, np.full(10, 1e200), M=lambda v: v * 1e200)


def test_the_verdict_drops_the_basis_and_begins_again():
    first, second = darcy(16, 2)
    Y = gcrodr(first.A, first.b, m=12, k=5).U
    solve = gcrodr(second.A, second.b, Y=Y, m=12, k=5, harm=lambda matvecs, residual: True)
    cold = gcrodr(second.A, second.b, m=12, k=5)
    assert solve.dropped and solve.converged
    assert solve.iterations == 7 + cold.iterations  # one cycle of m - k steps was in vain
    np.testing.assert_array_equal(solve.x, cold.x)
    assert math.isclose(solve.residual, cold.residual)
