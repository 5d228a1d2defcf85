"""What SKR is compared with: solvers that carry nothing, something else, or need no iterations.

Each solves the same systems with the same preconditioner and tolerance and returns the same :class:`Solutions`. The
paper compares with GMRES alone, which mixes two gains: deflation within one system and recycling between systems. The
control that tells them apart is ``gcrodr-reset``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lamella.errors import MethodError, NumericsError
from lamella.files import Work
from lamella.methods.skr.gcrodr import SLACK, Apply, Solve, gcrodr
from lamella.methods.skr.method import Recycling, run, skr
from lamella.methods.skr.preconditioners import Factory
from lamella.methods.skr.result import Dataset, Solutions
from lamella.methods.skr.sorting import arrange
from lamella.methods.skr.systems import LinearSystems, System
from lamella.registry import command

Array = NDArray[np.float64]


class Stateless:
    """A solver that begins every system anew."""

    def state(self) -> dict[str, Array]:
        return {}

    def restore(self, state: dict[str, Array]) -> None:
        pass


class GMRES:
    """GMRES(m): the same code with k = 0. ``warm`` starts from the solution before."""

    def __init__(self, warm: bool = False, *, m: int, k: int, tol: float, max_iterations: int) -> None:
        self.warm, self.settings = warm, {"m": m, "k": 0, "tol": tol, "max_iterations": max_iterations}
        self.last: Array | None = None

    def __call__(self, system: System, M: Apply | None) -> tuple[Solve, str]:
        guess = self.last if self.warm else None
        solve = gcrodr(system.A, system.b, M=M, x0=guess, **self.settings)  # type: ignore[arg-type]
        self.last = solve.x
        return solve, "cold" if guess is None else "warm"

    def state(self) -> dict[str, Array]:
        return {} if self.last is None or not self.warm else {"last": self.last}

    def restore(self, state: dict[str, Array]) -> None:
        self.last = state.get("last")


class Outer:
    """SciPy's GCROT(m, k), which recycles the corrections of outer cycles, not harmonic Ritz vectors.

    Its list of vectors takes in the solution with every call and must be trimmed. A changes, so their products with it
    are thrown away (``discard_C``): SciPy would trust them.
    """

    def __init__(self, carried: bool, *, m: int, k: int, tol: float, max_iterations: int) -> None:
        self.carried, self.m, self.k, self.tol = carried, m, k, tol
        self.max_iterations = max_iterations
        self.vectors: list[tuple[Any, Array]] = []

    def __call__(self, system: System, M: Apply | None) -> tuple[Solve, str]:
        from scipy.sparse.linalg import gcrotmk

        A, inverse, counted = counting(system, M)
        start = "recycled" if self.carried and self.vectors else "cold"
        kept = self.vectors if self.carried else []
        # SciPy's m is of inner steps, on top of the k vectors; maxiter counts outer cycles. The search space is ours.
        inner = max(self.m - self.k, 1)
        cycles = max(self.max_iterations // inner, 1)
        x, _ = gcrotmk(
            A, system.b, rtol=self.tol, atol=0.0, maxiter=cycles, M=inverse, m=inner, k=self.k, CU=kept, discard_C=True
        )
        if self.carried:
            self.vectors = [(None, u) for _, u in kept[-self.k :]] if self.k else []
        return counted.solve(x, system, self.tol), start

    def state(self) -> dict[str, Array]:
        return {"U": np.stack([u for _, u in self.vectors], axis=1)} if self.vectors else {}

    def restore(self, state: dict[str, Array]) -> None:
        self.vectors = [(None, u.copy()) for u in state["U"].T] if "U" in state else []


class Symmetric(Stateless):
    """SciPy's CG (for positive definite matrices) or MINRES (for symmetric ones)."""

    def __init__(self, name: str, *, m: int, k: int, tol: float, max_iterations: int) -> None:
        self.name, self.tol, self.max_iterations = name, tol, max_iterations

    def __call__(self, system: System, M: Apply | None) -> tuple[Solve, str]:
        from scipy.sparse import linalg

        if (apart := abs(system.A - system.A.T)).nnz and apart.max() > 1e-12 * abs(system.A).max():
            raise MethodError(f"'{self.name}' is for symmetric matrices; take 'gmres'")
        A, inverse, counted = counting(system, M)
        stop = {"atol": 0.0} if self.name == "cg" else {}
        solver = getattr(linalg, self.name)
        x, _ = solver(A, system.b, rtol=self.tol, maxiter=self.max_iterations, M=inverse, **stop)
        return counted.solve(x, system, self.tol), "cold"


class Direct(Stateless):
    """Sparse LU of every matrix; ``once`` keeps the factors as long as the matrix is the same."""

    def __init__(self, once: bool, *, m: int, k: int, tol: float, max_iterations: int) -> None:
        self.once, self.tol = once, tol
        self.matrix = ""
        self.factors: Any = None

    def __call__(self, system: System, M: Apply | None) -> tuple[Solve, str]:
        from scipy.sparse.linalg import splu

        start = "factors kept"
        if not self.once or system.matrix != self.matrix:
            try:
                self.factors, self.matrix = splu(system.A.tocsc()), system.matrix
            except RuntimeError as error:
                raise NumericsError(f"the matrix has no LU factors ({error}); leave the system out") from error
            start = "factorised"
        return _Counted().solve(self.factors.solve(system.b), system, self.tol), start


@dataclass
class _Counted:
    products: int = 0
    applications: int = 0

    def solve(self, x: Array, system: System, tol: float) -> Solve:
        residual = float(np.linalg.norm(system.b - system.A @ x) / np.linalg.norm(system.b))
        counts = (self.products, self.products + 1, self.applications)
        return Solve(x, None, *counts, residual=residual, converged=residual <= SLACK * tol)


def counting(system: System, M: Apply | None) -> tuple[Any, Any, _Counted]:
    """A and M^-1 as SciPy takes them, and how often they were used. SciPy's iterations are products with A."""
    from scipy.sparse.linalg import LinearOperator

    counted, shape = _Counted(), system.A.shape

    def product(v: Array) -> Array:
        counted.products += 1
        return system.A @ v.ravel()

    def applied(v: Array) -> Array:
        counted.applications += 1
        assert M is not None
        return M(v.ravel())

    A = LinearOperator(shape, matvec=product, dtype=np.float64)
    return A, None if M is None else LinearOperator(shape, matvec=applied, dtype=np.float64), counted


@dataclass(frozen=True)
class Baseline:
    """A solver of the comparison.

    Attributes:
        title: what it is.
        solver: makes it, from m, k, tol and max_iterations.
        order: in which it gets the systems.
        preconditioner: its own, where it has one.
    """

    title: str
    solver: Callable[..., Any]
    order: str = "none"
    preconditioner: str | None = None


BASELINES: dict[str, Baseline] = {
    "gmres": Baseline("GMRES(m), cold: the paper's", GMRES),
    "gmres-warm": Baseline("GMRES(m) from the solution before, sorted", partial(GMRES, True), "greedy"),
    "gcrodr-reset": Baseline("GCRO-DR, a new basis for each system", partial(Recycling, "never")),
    "gcrodr-unsorted": Baseline("GCRO-DR recycled in random order", partial(Recycling, "always"), "random"),
    "gcrodr-sorted": Baseline(
        "GCRO-DR recycled in sorted order, never dropped", partial(Recycling, "always"), "greedy"
    ),
    "gcrotmk": Baseline("SciPy's GCROT(m, k), cold", partial(Outer, False)),
    "gcrotmk-carried": Baseline("SciPy's GCROT(m, k), carried, sorted", partial(Outer, True), "greedy"),
    "cg": Baseline("SciPy's CG, for positive definite A", partial(Symmetric, "cg")),
    "minres": Baseline("SciPy's MINRES, for symmetric A", partial(Symmetric, "minres")),
    "splu": Baseline("sparse LU of each matrix", partial(Direct, False), preconditioner="none"),
    "one-lu": Baseline("sparse LU, once as long as A is the same", partial(Direct, True), preconditioner="none"),
    "amg": Baseline("GMRES(m) with an algebraic multigrid cycle (pyamg)", GMRES, preconditioner="amg"),
}


def baseline(
    name: str,
    systems: LinearSystems,
    *,
    m: int = 40,
    k: int = 20,
    tol: float = 1e-8,
    max_iterations: int = 10_000,
    preconditioner: str | Factory = "jacobi",
    work: Path | None = None,
    seed: int = 0,
) -> Solutions:
    """Solve the systems with a baseline; the options mean what they do for :func:`~lamella.methods.skr.skr`.

    Raises:
        MethodError: for a name that there is not, or a baseline that is not for these matrices.
    """
    if name not in BASELINES:
        raise MethodError(f"no baseline '{name}'; there are {', '.join(BASELINES)}")
    if name in ("cg", "minres") and preconditioner in ("sor", "ilu"):
        raise MethodError(f"'{name}' needs a symmetric preconditioner; take 'none', 'jacobi', 'icc' or 'amg'")
    systems, entry = LinearSystems.open(systems), BASELINES[name]
    order: Any = entry.order if systems.parameters or entry.order == "random" else "none"
    settings = {"m": m, "k": k, "tol": tol, "max_iterations": max_iterations}
    options = settings | {"baseline": name, "order": order, "seed": seed, "preconditioner": str(preconditioner)}
    chosen = entry.preconditioner or preconditioner
    sequence = arrange(systems.parameters, len(systems), order, seed)
    return run(systems, sequence, partial(entry.solver, **settings), options, preconditioner=chosen, work=work)


@dataclass(frozen=True)
class Comparison:
    """SKR and its baselines on the same systems."""

    ours: Solutions
    others: dict[str, Solutions] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict, compare=False)

    def apart(self, name: str) -> float:
        """The largest |x - x_other| / |x_other| of all systems."""
        other = self.others[name].x
        sizes = np.linalg.norm(other, axis=1)
        return float((np.linalg.norm(self.ours.x - other, axis=1) / np.where(sizes > 0, sizes, 1)).max())

    def evidence(self) -> dict[str, Any]:
        return self.ours.evidence() | {"baselines": {name: each.evidence() for name, each in self.others.items()}}

    def as_result(self) -> Dataset:
        """The same as a result of the house."""
        return Dataset(
            solutions=self.ours, findings=self.evidence(), notes=self.ours.findings(), provenance=self.provenance
        )


@command("skr", "compare", brief={"m": 14, "k": 6})
def compare(
    systems: LinearSystems,
    *,
    against: tuple[str, ...] = ("gmres", "gcrodr-reset"),
    m: int = 40,
    k: int = 20,
    tol: float = 1e-8,
    max_iterations: int = 10_000,
    preconditioner: str | Factory = "jacobi",
    work: Work = Work(),
    seed: int = 0,
) -> Comparison:
    """Solve the systems with SKR and with baselines; one LU joins in where they all have the same matrix.

    Args:
        systems: as of :func:`~lamella.methods.skr.skr`.
        against: the baselines, with commas: gmres, gmres-warm, gcrodr-reset, gcrodr-unsorted, gcrodr-sorted, gcrotmk,
            gcrotmk-carried, cg, minres, splu, one-lu, amg.
        m, k, tol, max_iterations, preconditioner, seed: as of :func:`~lamella.methods.skr.skr`.
        work: keeps each finished system of each solver.
    """
    systems = LinearSystems.open(systems)
    shared: dict[str, Any] = {"m": m, "k": k, "tol": tol, "max_iterations": max_iterations, "seed": seed}
    shared["preconditioner"] = preconditioner
    ours = skr(systems, work=work.within("skr"), **shared)
    names = list(dict.fromkeys(against))
    if len(systems) > 1 and len({each.matrix for each in ours.solved}) == 1 and "one-lu" not in names:
        names.append("one-lu")
    others = {name: baseline(name, systems, work=work.within(name).folder, **shared) for name in names}
    return Comparison(ours, others)
