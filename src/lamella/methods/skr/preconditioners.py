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
BLOCK = 128  # approximate number of unknowns in a block of asm
Factory = Callable[[Any], Any]  # A -> a LinearOperator, or anything with `@`, or a function of v


def make(preconditioner: str | Factory, A: Any, where: str) -> Apply | None:
    """Create M^-1 for a matrix; None for no preconditioner.

    Args:
        preconditioner: a name of :data:`PRECONDITIONERS`, or a factory.
        A: the matrix.
        where: the system's name, for messages.

    Raises:
        MethodError: for an unknown name.
        NumericsError: if it is singular.
    """
    if callable(preconditioner):
        operator = preconditioner(A)
        if hasattr(operator, "matvec"):
            return operator.matvec
        if callable(operator):
            return operator
        if hasattr(operator, "__matmul__"):
            return lambda v: operator @ v
        raise MethodError(
            f"the preconditioner returned {type(operator).__name__} for {where}; return a function or an operator"
        )
    check(preconditioner)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", sparse.SparseEfficiencyWarning)
            return PRECONDITIONERS[preconditioner](A)
    except (RuntimeError, ZeroDivisionError) as error:
        hint = "use another, such as preconditioner='none'"
        raise NumericsError(f"{where}: its preconditioner '{preconditioner}' is singular ({error}); {hint}") from error


def check(preconditioner: str | Factory) -> None:
    """Check a name before the computation starts."""
    if not callable(preconditioner) and preconditioner not in PRECONDITIONERS:
        raise MethodError(f"unknown preconditioner '{preconditioner}'; use one of {', '.join(PRECONDITIONERS)}")


def none(A: Any) -> None:
    """Use no preconditioner."""


def jacobi(A: Any) -> Apply:
    """Return the preconditioner M = diag A."""
    inverse = 1 / _diagonal(A)
    return lambda v: inverse * v


def sor(A: Any) -> Apply:
    """Return M = D + L, one forward sweep with omega = 1 (Gauss-Seidel), PETSc's default omega."""
    _diagonal(A)
    return _triangular(sparse.tril(A, format="csc"))


def asm(A: Any) -> Apply:
    """Return the restricted additive Schwarz preconditioner, PETSc's default form, with exact solutions of its blocks.

    Each block owns about :data:`BLOCK` consecutive unknowns, and is solved together with the unknowns that their
    equations contain (an overlap of one); only the values of its own ones are used.
    """
    from scipy.sparse.linalg import splu

    matrix = sparse.csr_array(A)
    n = matrix.shape[0]
    blocks = []
    for own in np.array_split(np.arange(n), max(1, round(n / BLOCK))):
        around = np.union1d(own, matrix[own].indices)
        factors = splu(matrix[around][:, around].tocsc())
        blocks.append((own, around, np.searchsorted(around, own), factors.solve))

    def apply(v: Array) -> Array:
        z = np.empty_like(v)
        for own, around, places, solve in blocks:
            z[own] = solve(v[around])[places]
        return z

    return apply


def ilu(A: Any) -> Apply:
    """Return the incomplete LU of SuperLU with at most twice the entries of A, which drops by size, unlike ILU(0)."""
    from scipy.sparse.linalg import spilu

    return spilu(A.tocsc(), drop_tol=0.01, fill_factor=2.0).solve


def icc(A: Any) -> Apply:
    """Return the incomplete Cholesky factorisation U^T D^-1 U of a positive definite matrix, with U from SuperLU.

    Raises:
        MethodError: if A is not symmetric.
    """
    from scipy.sparse.linalg import spilu

    asymmetry = abs(A - A.T)
    if asymmetry.nnz and asymmetry.max() > 1e-12 * abs(A).max():
        raise MethodError("the preconditioner 'icc' is for symmetric matrices; take 'ilu'")
    settings: dict[str, Any] = {"permc_spec": "MMD_AT_PLUS_A", "diag_pivot_thresh": 0.0}
    factors = spilu(A.tocsc(), drop_tol=0.01, fill_factor=2.0, options={"SymmetricMode": True}, **settings)
    D, order = factors.U.diagonal(), factors.perm_c
    if (factors.perm_r != order).any() or (D <= 0).any():
        raise RuntimeError("A is not positive definite")
    first, last = _triangular(factors.U.T.tocsc()), _triangular(factors.U.tocsc())

    def apply(v: Array) -> Array:
        permuted = np.empty_like(v)
        permuted[order] = v
        return last(D * first(permuted))[order]

    return apply


def amg(A: Any) -> Apply:
    """Return one V-cycle of smoothed aggregation, for elliptic problems.

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
    "asm": asm,
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
    """Return a solver for a triangular matrix: its own LU factors, without a permutation, have no fill-in."""
    from scipy.sparse.linalg import splu

    return splu(L, permc_spec="NATURAL", diag_pivot_thresh=0.0, options={"Equil": False}).solve
