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

from lamella.errors import MethodError
from lamella.files import Work
from lamella.methods.skr.method import Recycling, run, skr
from lamella.methods.skr.preconditioners import Factory
from lamella.methods.skr.result import SOLVED, Solutions
from lamella.methods.skr.solvers import GMRES, Direct, Outer, Symmetric
from lamella.methods.skr.sorting import arrange
from lamella.methods.skr.systems import LinearSystems
from lamella.registry import command


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


@dataclass(kw_only=True, eq=False)
class Comparison(Solutions):
    """The solutions of SKR, beside those of its baselines on the same systems."""

    others: dict[str, Solutions] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.findings["baselines"] = {name: each.findings for name, each in self.others.items()}

    def apart(self, name: str) -> float:
        """The largest |x - x_other| / |x_other| of all systems."""
        other = self.others[name].x
        sizes = np.linalg.norm(other, axis=1)
        return float((np.linalg.norm(self.x - other, axis=1) / np.where(sizes > 0, sizes, 1)).max())


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
    solved = {name: getattr(ours, name) for name in SOLVED}
    return Comparison(**solved, others=others)
