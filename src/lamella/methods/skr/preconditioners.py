"""Preconditioners: from a matrix A to z = M^-1 v."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from lamella.errors import MethodError, NumericsError
from lamella.extras import require

Array = NDArray[np.float64]
Apply = Callable[[Array], Array]
Factory = Callable[[Any], Any]  # A -> a LinearOperator, or anything with `@`, or a function of v


def make(preconditioner: str | Factory, A: Any, where: str) -> Apply | None:
    """M^-1 for this matrix; None for none.

    Args:
        preconditioner: a name of :data:`PRECONDITIONERS`, or a factory.
        where: the system's name, for messages.

    Raises:
        MethodError: for a name that there is not.
        NumericsError: when it is singular.
    """
    if callable(preconditioner):
        made = preconditioner(A)
        if hasattr(made, "matvec"):
            return made.matvec
        if callable(made):
            return made
        if hasattr(made, "__matmul__"):
            return lambda v: made @ v
        raise MethodError(f"the preconditioner made {type(made).__name__} of {where}; make a function or an operator")
    check(preconditioner)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", sparse.SparseEfficiencyWarning)
            return PRECONDITIONERS[preconditioner](A)
    except (RuntimeError, ZeroDivisionError) as error:
        hint = "take another, such as preconditioner='none'"
        raise NumericsError(f"{where}: its preconditioner '{preconditioner}' is singular ({error}); {hint}") from error


def check(preconditioner: str | Factory) -> None:
    """Check a name before anything takes long."""
    if not callable(preconditioner) and preconditioner not in PRECONDITIONERS:
        raise MethodError(f"no preconditioner '{preconditioner}'; there are {', '.join(PRECONDITIONERS)}")


def none(A: Any) -> None:
    """No preconditioner."""


def jacobi(A: Any) -> Apply:
    """M = diag A."""
    inverse = 1 / _diagonal(A)
    return lambda v: inverse * v


def sor(A: Any) -> Apply:
    """M = D + L, one forward sweep with omega = 1 (Gauss-Seidel), PETSc's default omega."""
    _diagonal(A)
    return _triangular(sparse.tril(A, format="csc"))


def ilu(A: Any) -> Apply:
    """Incomplete LU with at most twice the entries of A: SuperLU's, which drops by size, not by pattern as ILU(0)."""
    from scipy.sparse.linalg import spilu

    return spilu(A.tocsc(), drop_tol=0.01, fill_factor=2.0).solve


def icc(A: Any) -> Apply:
    """Incomplete Cholesky, U^T D^-1 U, of a positive definite matrix: U is SuperLU's, with pivots on the diagonal.

    Raises:
        MethodError: when A is not symmetric.
    """
    from scipy.sparse.linalg import spilu

    apart = abs(A - A.T)
    if apart.nnz and apart.max() > 1e-12 * abs(A).max():
        raise MethodError("the preconditioner 'icc' is for symmetric matrices; take 'ilu'")
    how: dict[str, Any] = {"permc_spec": "MMD_AT_PLUS_A", "diag_pivot_thresh": 0.0}
    factors = spilu(A.tocsc(), drop_tol=0.01, fill_factor=2.0, options={"SymmetricMode": True}, **how)
    D, place = factors.U.diagonal(), factors.perm_c
    if (factors.perm_r != place).any() or (D <= 0).any():
        raise RuntimeError("A is not positive definite")
    first, last = _triangular(factors.U.T.tocsc()), _triangular(factors.U.tocsc())

    def apply(v: Array) -> Array:
        moved = np.empty_like(v)
        moved[place] = v
        return last(D * first(moved))[place]

    return apply


def amg(A: Any) -> Apply:
    """One V-cycle of smoothed aggregation, for elliptic problems.

    Raises:
        LamellaError: without pyamg.
    """
    pyamg = require("pyamg", "solve", "the preconditioner 'amg'")
    matrix = sparse.csr_matrix(A)
    return pyamg.smoothed_aggregation_solver(matrix).aspreconditioner().matvec


PRECONDITIONERS: dict[str, Callable[[Any], Apply | None]] = {
    "none": none,
    "jacobi": jacobi,
    "sor": sor,
    "ilu": ilu,
    "icc": icc,
    "amg": amg,
}


def _diagonal(A: Any) -> Array:
    diagonal = A.diagonal()
    zeros = np.flatnonzero(diagonal == 0)
    if len(zeros):
        raise ZeroDivisionError(f"row {zeros[0]} has no diagonal entry")
    return diagonal


def _triangular(L: Any) -> Apply:
    """Solves with a triangular matrix: its own LU factors, without a permutation, have no fill."""
    from scipy.sparse.linalg import splu

    return splu(L, permc_spec="NATURAL", diag_pivot_thresh=0.0, options={"Equil": False}).solve
