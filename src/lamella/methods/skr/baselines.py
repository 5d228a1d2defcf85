"""Baselines for SKR: solvers that recycle nothing, recycle something else, or need no iterations.

Each solves the same systems with the same preconditioner and tolerance and returns the same :class:`Solutions`. The
paper compares with GMRES only, which mixes two gains: deflation within one system and recycling between systems. The
control that separates them is ``gcrodr-reset``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Ge, Gt, Lt

from lamella.errors import MethodError
from lamella.files import Work
from lamella.methods.skr.method import Recycling, run, skr
from lamella.methods.skr.preconditioners import Factory
from lamella.methods.skr.result import FIELDS, Solutions
from lamella.methods.skr.rows import iterate
from lamella.methods.skr.solvers import GMRES, Direct, Outer, Symmetric
from lamella.methods.skr.sorting import arrange
from lamella.methods.skr.systems import LinearSystems
from lamella.registry import command

Name = Literal[
    "gmres", "gmres-warm", "gcrodr-reset", "gcrodr-unsorted", "gcrodr-sorted", "gcrotmk", "gcrotmk-carried", "cg",
    "minres", "splu", "one-lu", "amg",
]  # fmt: skip


@dataclass(frozen=True)
class Baseline:
    """A baseline solver.

    Attributes:
        title: description in tables.
        solver: creates the solver, from the arguments m, k, tol and max_iterations.
        order: order of the systems: ``none`` (as given), ``random``, or ``greedy`` (Algorithm 1).
        preconditioner: the baseline's own preconditioner; None for that of the run.
    """

    title: str
    solver: Callable[..., Any]
    order: str = "none"
    preconditioner: str | None = None


BASELINES: dict[Name, Baseline] = {
    "gmres": Baseline("GMRES(m), cold, as in the paper", GMRES),
    "gmres-warm": Baseline("GMRES(m) from the previous solution, sorted", partial(GMRES, True), "greedy"),
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
    "one-lu": Baseline("sparse LU, reused while A is the same", partial(Direct, True), preconditioner="none"),
    "amg": Baseline("GMRES(m) with an algebraic multigrid cycle (pyamg)", GMRES, preconditioner="amg"),
}


def baseline(
    name: Name,
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
    """Solve the systems with a baseline.

    Args:
        name: the baseline.
        systems: as for :func:`~lamella.methods.skr.skr`.
        m: dimension of the search space.
        k: dimension of the recycled subspace.
        tol: residual to reach, relative to |b|.
        max_iterations: maximum number of iterations per system.
        preconditioner: a name or a factory, unless the baseline has its own.
        work: directory that keeps each finished system.
        seed: random seed of the random order.

    Raises:
        MethodError: for a baseline that does not apply to these matrices.
    """
    if name in ("cg", "minres") and preconditioner in ("sor", "ilu"):
        raise MethodError(f"'{name}' needs a symmetric preconditioner; take 'none', 'jacobi', 'icc' or 'amg'")
    systems, entry = LinearSystems.open(systems), BASELINES[name]
    order: Any = entry.order if systems.parameters or entry.order == "random" else "none"
    settings = {"m": m, "k": k, "tol": tol, "max_iterations": max_iterations}
    options = settings | {"baseline": name, "order": order, "seed": seed, "preconditioner": str(preconditioner)}
    own = entry.preconditioner or preconditioner
    sequence = arrange(systems.parameters, len(systems), order, seed)
    return run(systems, sequence, partial(entry.solver, **settings), options, preconditioner=own, work=work)


@dataclass(kw_only=True, eq=False)
class SolverComparison(Solutions):
    """The solutions of SKR, and those of baselines on the same systems.

    Attributes:
        others: the solutions of each baseline.
    """

    others: dict[str, Solutions] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.findings["baselines"] = {name: each.findings for name, each in self.others.items()}

    def max_difference(self, name: str) -> float:
        """Return the largest |x - x_other| / |x_other| over all systems."""
        found = 0.0
        for tile, other in iterate(self.others[name].x):
            sizes = np.linalg.norm(other, axis=1)
            differences = np.linalg.norm(self.x[tile] - other, axis=1) / np.where(sizes > 0, sizes, 1)
            found = max(found, float(differences.max()))
        return found


@command("skr", "compare", brief={"m": 14, "k": 6})
def compare(
    systems: LinearSystems,
    *,
    against: tuple[Name, ...] = ("gmres", "gcrodr-reset"),
    m: Annotated[int, Ge(1)] = 40,
    k: Annotated[int, Ge(0)] = 20,
    tol: Annotated[float, Gt(0), Lt(1)] = 1e-8,
    max_iterations: Annotated[int, Ge(1)] = 10_000,
    preconditioner: str | Factory = "jacobi",
    work: Work = Work(),
    seed: int = 0,
) -> SolverComparison:
    """Solve the systems with SKR and with baselines; adds one LU if all systems have the same matrix.

    Args:
        systems: as for :func:`~lamella.methods.skr.skr`.
        against: the baselines, separated by commas: gmres, gmres-warm, gcrodr-reset, gcrodr-unsorted, gcrodr-sorted,
            gcrotmk, gcrotmk-carried, cg, minres, splu, one-lu, amg.
        m: dimension of the search space.
        k: dimension of the recycled subspace.
        tol: residual to reach, relative to |b|.
        max_iterations: maximum number of iterations per system.
        preconditioner: a name or a factory, as for ``skr``.
        seed: random seed of the order ``random``.
        work: directory that keeps each finished system of each solver.
    """
    systems = LinearSystems.open(systems)
    shared: dict[str, Any] = {"m": m, "k": k, "tol": tol, "max_iterations": max_iterations, "seed": seed}
    shared["preconditioner"] = preconditioner
    ours = skr(systems, work=work.within("skr"), **shared)
    names = list(dict.fromkeys(against))
    if len(systems) > 1 and len({each.matrix for each in ours.solved}) == 1 and "one-lu" not in names:
        names.append("one-lu")
    others: dict[str, Solutions] = {
        name: baseline(name, systems, work=work.within(name).folder, **shared) for name in names
    }
    solved = {name: getattr(ours, name) for name in FIELDS}
    return SolverComparison(**solved, others=others)
