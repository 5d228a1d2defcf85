"""Baseline solvers: GMRES, those of SciPy, and direct ones. Each solves a chunk's systems in their order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lamella.errors import MethodError, NumericsError
from lamella.methods.skr.gcrodr import SLACK, Apply, Solve, gcrodr
from lamella.methods.skr.systems import System

Array = NDArray[np.float64]


class Stateless:
    """A solver without state between systems."""

    def state(self) -> dict[str, Array]:
        """Return no state."""
        return {}

    def restore(self, state: dict[str, Array]) -> None:
        """Ignore the state."""
        pass


class GMRES:
    """GMRES(m): the same code with k = 0. ``warm`` starts from the previous solution."""

    def __init__(self, warm: bool = False, *, m: int, k: int, tol: float, max_iterations: int) -> None:
        self.warm, self.settings = warm, {"m": m, "k": 0, "tol": tol, "max_iterations": max_iterations}
        self.last: Array | None = None

    def __call__(self, system: System, M: Apply | None) -> tuple[Solve, str]:
        """Solve a system, and return the solution and how it started."""
        guess = self.last if self.warm else None
        solve = gcrodr(system.A, system.b, M=M, x0=guess, **self.settings)  # type: ignore[arg-type]
        self.last = solve.x
        return solve, "cold" if guess is None else "warm"

    def state(self) -> dict[str, Array]:
        """Return the state to save."""
        return {} if self.last is None or not self.warm else {"last": self.last}

    def restore(self, state: dict[str, Array]) -> None:
        """Restore a saved state."""
        self.last = state.get("last")


class Outer:
    """SciPy's GCROT(m, k), which recycles the corrections of outer cycles instead of harmonic Ritz vectors.

    Its list of vectors grows by the solution with every call and must be trimmed. A changes, so the products of the
    vectors with it are discarded (``discard_C``): SciPy would rely on them.
    """

    def __init__(self, carried: bool, *, m: int, k: int, tol: float, max_iterations: int) -> None:
        self.carried, self.m, self.k, self.tol = carried, m, k, tol
        self.max_iterations = max_iterations
        self.vectors: list[tuple[Any, Array]] = []

    def __call__(self, system: System, M: Apply | None) -> tuple[Solve, str]:
        """Solve a system, and return the solution and how it started."""
        from scipy.sparse.linalg import gcrotmk

        A, inverse, counter = count_products(system, M)
        start = "recycled" if self.carried and self.vectors else "cold"
        vectors = self.vectors if self.carried else []
        # SciPy's m counts inner steps in addition to the k vectors, and maxiter outer cycles. The search space is as
        # ours.
        inner = max(self.m - self.k, 1)
        cycles = max(self.max_iterations // inner, 1)
        x, _ = gcrotmk(
            A,
            system.b,
            rtol=self.tol,
            atol=0.0,
            maxiter=cycles,
            M=inverse,
            m=inner,
            k=self.k,
            CU=vectors,
            discard_C=True,
        )
        if self.carried:
            self.vectors = [(None, u) for _, u in vectors[-self.k :]] if self.k else []
        return counter.solve(x, system, self.tol), start

    def state(self) -> dict[str, Array]:
        """Return the state to save."""
        return {"U": np.stack([u for _, u in self.vectors], axis=1)} if self.vectors else {}

    def restore(self, state: dict[str, Array]) -> None:
        """Restore a saved state."""
        self.vectors = [(None, u.copy()) for u in state["U"].T] if "U" in state else []


class Symmetric(Stateless):
    """SciPy's CG (for positive definite matrices) or MINRES (for symmetric ones)."""

    def __init__(self, name: str, *, m: int, k: int, tol: float, max_iterations: int) -> None:
        self.name, self.tol, self.max_iterations = name, tol, max_iterations

    def __call__(self, system: System, M: Apply | None) -> tuple[Solve, str]:
        """Solve a system, and return the solution and how it started."""
        from scipy.sparse import linalg

        if (asymmetry := abs(system.A - system.A.T)).nnz and asymmetry.max() > 1e-12 * abs(system.A).max():
            raise MethodError(f"'{self.name}' requires symmetric matrices; use 'gmres'")
        A, inverse, counter = count_products(system, M)
        stop = {"atol": 0.0} if self.name == "cg" else {}
        solver = getattr(linalg, self.name)
        x, _ = solver(A, system.b, rtol=self.tol, maxiter=self.max_iterations, M=inverse, **stop)
        return counter.solve(x, system, self.tol), "cold"


class Direct(Stateless):
    """Sparse LU of every matrix; ``once`` reuses the factors while the matrix is the same."""

    def __init__(self, once: bool, *, m: int, k: int, tol: float, max_iterations: int) -> None:
        self.once, self.tol = once, tol
        self.matrix = ""
        self.factors: Any = None

    def __call__(self, system: System, M: Apply | None) -> tuple[Solve, str]:
        """Solve a system, and return the solution and how it started."""
        from scipy.sparse.linalg import splu

        start = "factors reused"
        if not self.once or system.matrix != self.matrix:
            try:
                self.factors, self.matrix = splu(system.A.tocsc()), system.matrix
            except RuntimeError as error:
                raise NumericsError(f"the matrix has no LU factors ({error}); remove the system") from error
            start = "factorised"
        return _ProductCounter().solve(self.factors.solve(system.b), system, self.tol), start


@dataclass
class _ProductCounter:
    products: int = 0
    applications: int = 0

    def solve(self, x: Array, system: System, tol: float) -> Solve:
        residual = float(np.linalg.norm(system.b - system.A @ x) / np.linalg.norm(system.b))
        counts = (self.products, self.products + 1, self.applications)
        return Solve(x, None, *counts, residual=residual, converged=residual <= SLACK * tol)


def count_products(system: System, M: Apply | None) -> tuple[Any, Any, _ProductCounter]:
    """Return A and M^-1 as SciPy operators, with a counter of their products. SciPy's iterations are products with A.

    Args:
        system: the system.
        M: the preconditioner.
    """
    from scipy.sparse.linalg import LinearOperator

    counter, shape = _ProductCounter(), system.A.shape

    def product(v: Array) -> Array:
        counter.products += 1
        return system.A @ v.ravel()

    def apply(v: Array) -> Array:
        counter.applications += 1
        assert M is not None
        return M(v.ravel())

    A = LinearOperator(shape, matvec=product, dtype=np.float64)
    return A, None if M is None else LinearOperator(shape, matvec=apply, dtype=np.float64), counter
