"""SKR: accelerating data generation for neural operators via Krylov subspace recycling (Wang et al., ICLR 2024).

arXiv 2401.09516. A neural operator learns from thousands of solved equations, drawn from one distribution of
parameters. Each is a sparse system A x = b; solving them is nearly all the work. Systems with similar parameters have
similar matrices, and the slow part of one is the slow part of the next::

    P_0 P_1 P_2 ... --sort--> P_0 P_7 P_3 | P_5 P_1 ...      1. each system close to the one before (sorting.py)
                               |U--> |U-->|  |U-->            2. GCRO-DR hands its basis U on (gcrodr.py)
                              chunk 0     | chunk 1           3. chunks side by side (chunks.py)

What is ours: the basis in solution space, which survives a change of the preconditioner, and ``recycle="auto"``, which
notices when a carried basis does harm (harm.py).
"""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from lamella.errors import MethodError
from lamella.files import Work
from lamella.methods.skr.chunks import Chunk, Finished, cut, open_work, solve_chunks
from lamella.methods.skr.gcrodr import Apply, Solve, gcrodr
from lamella.methods.skr.harm import Harm
from lamella.methods.skr.preconditioners import Factory, check
from lamella.methods.skr.result import Solutions
from lamella.methods.skr.solvers import Outer
from lamella.methods.skr.sorting import Order, arrange
from lamella.methods.skr.systems import LinearSystems, System
from lamella.registry import method
from lamella.workers import Workers

Array = NDArray[np.float64]
Index = NDArray[np.intp]
Recycle = Literal["auto", "always", "never"]
Backend = Literal["numpy", "gcrotmk", "petsc"]
WORKERS = Workers()


@method("skr", paper="2401.09516", purpose="recycle", on="any", brief={"m": 14, "k": 6})
def skr(
    systems: LinearSystems,
    *,
    m: int = 40,
    k: int = 20,
    tol: float = 1e-8,
    max_iterations: int = 10_000,
    preconditioner: str | Factory = "jacobi",
    order: Order = "greedy",
    recycle: Recycle = "auto",
    backend: Backend = "numpy",
    workers: Workers = WORKERS,
    work: Work = Work(),
    seed: int = 0,
) -> Solutions:
    """Solve a family of linear systems in an order in which each helps the next.

    Args:
        systems: N systems A x = b of n unknowns with their parameters; also what :meth:`LinearSystems.open` takes.
        m: dimension of the search space; the paper's 40.
        k: how much of it is recycled; the paper's 20. 0 is restarted GMRES.
        tol: residual to reach, relative to |b|; the paper's tables go from 1e-1 to 1e-11, most are at 1e-8.
        max_iterations: of one system; the paper's 10 000. One that gets there is marked as not converged.
        preconditioner: ``none``, ``jacobi``, ``sor``, ``ilu``, ``icc``, ``amg``, or a function from A to M^-1. The
            paper compares several and has no default.
        order: how systems are sorted, ``greedy`` being Algorithm 1; see :func:`~lamella.methods.skr.sorting.arrange`.
        recycle: ``always`` is the paper's; ``auto`` drops a basis that does harm; ``never`` starts each system cold.
        backend: ``numpy`` is this package's own; ``gcrotmk`` is SciPy's, which recycles other vectors; ``petsc``
            needs a PETSc with HPDDM.
        workers: who solves chunks of the sorted sequence, one each, on this machine or a Ray cluster.
        work: keeps each finished system, so that a killed run goes on with the same result.
        seed: of the order ``random``, the paper's control without sorting.

    Returns:
        The solutions in the caller's order.

    Raises:
        LamellaError: for systems that do not fit each other, or that cannot be solved; see the page.
    """
    systems = LinearSystems.open(systems)
    _check(m, k, tol, max_iterations, recycle, backend, work.folder)
    check(preconditioner)
    options: dict[str, Any] = {
        "m": m, "k": k, "tol": tol, "max_iterations": max_iterations, "preconditioner": _name(preconditioner),
        "order": order, "recycle": recycle, "backend": backend,
        "workers": workers.cluster or workers.processes or 1, "seed": seed,
    }  # fmt: skip
    solver = _solver(backend, preconditioner, recycle, m=m, k=k, tol=tol, max_iterations=max_iterations)
    sequence = arrange(systems.parameters, len(systems), order, seed)
    _warn_of_one_matrix(systems, sequence)
    own = "none" if backend == "petsc" else preconditioner  # PETSc makes its own
    return run(systems, sequence, solver, options, preconditioner=own, workers=workers, work=work.folder)


def run(
    systems: LinearSystems,
    sequence: Index,
    solver: Any,
    options: dict[str, Any],
    *,
    preconditioner: str | Factory,
    workers: Workers = WORKERS,
    work: str | Path | None = None,
) -> Solutions:
    """Steps 2 and 3 with any solver: cut the sequence, solve its chunks, put the solutions into the caller's order."""
    with workers.pool() as pool:
        chunks = cut(sequence, pool.size)
        job = options | {"systems": systems.description, "sequence": sequence.tolist(), "chunks": len(chunks)}
        folder = open_work(work, job)
        given = [Chunk(systems, each, solver, preconditioner, folder, number) for number, each in enumerate(chunks)]
        finished = solve_chunks(given, pool)
    return _collected(systems, sequence, options, finished)


def _collected(systems: LinearSystems, sequence: Index, options: dict[str, Any], finished: list[Finished]) -> Solutions:
    x = np.empty((len(systems), systems.n))
    solved = [each for chunk in finished for each in chunk.solved]
    x[sequence] = np.concatenate([chunk.x for chunk in finished])  # back from the solved to the caller's order
    bases = tuple(chunk.state.get("U", np.empty((systems.n, 0))) for chunk in finished)
    return Solutions(x, systems.parameters, sequence, solved, bases, options, systems.description)


class Recycling:
    """GCRO-DR from one system to the next: what it remembers is the basis U, and what it learnt of harm."""

    def __init__(self, recycle: Recycle, **settings: Any) -> None:
        self.recycle, self.settings = recycle, settings
        self.U: Array | None = None
        self.harm = Harm()

    def __call__(self, system: System, M: Apply | None) -> tuple[Solve, str]:
        carried = self.U is not None and self.recycle != "never"
        if carried and self.recycle == "auto":
            carried = self.harm.begin()
        judged = self.harm if carried and self.recycle == "auto" else None
        solve = gcrodr(system.A, system.b, M=M, Y=self.U if carried else None, harm=judged, **self.settings)
        self.U = None if solve.U is None else np.ascontiguousarray(solve.U)
        self.harm.end(solve, carried)
        return solve, "dropped" if solve.dropped else "recycled" if carried else "cold"

    def state(self) -> dict[str, Any]:
        return self.harm.state() | ({} if self.U is None else {"U": self.U})

    def restore(self, state: dict[str, Any]) -> None:
        self.harm.restore(state)
        self.U = state.get("U")


def _solver(backend: Backend, preconditioner: str | Factory, recycle: Recycle, **settings: Any) -> Any:
    """What makes the solver of each chunk, as something that can travel to another process."""
    if backend == "numpy":
        return partial(Recycling, recycle, **settings)
    if backend == "gcrotmk":
        return partial(Outer, carried=recycle != "never", **settings)
    from lamella.methods.skr.petsc import HPDDM

    return partial(HPDDM, preconditioner, carried=recycle != "never", **settings)


def _check(m: int, k: int, tol: float, max_iterations: int, recycle: str, backend: str, work: Path | None) -> None:
    if not 0 <= k < m:
        raise MethodError(f"k is {k} and m is {m}; recycle at least 0 and fewer than m vectors")
    if not 0 < tol < 1:
        raise MethodError(f"tol is {tol}; give a relative residual between 0 and 1")
    if max_iterations < 1:
        raise MethodError(f"max_iterations is {max_iterations}; give at least 1")
    for name, value, known in (("recycle", recycle, Recycle), ("backend", backend, Backend)):
        if value not in get_args(known):
            raise MethodError(f"no {name} '{value}'; there are {', '.join(get_args(known))}")
    if backend == "petsc" and work is not None:
        raise MethodError("a work folder needs the basis, which PETSc keeps; leave out `work`, or take 'numpy'")
    if recycle == "auto" and backend != "numpy":
        raise MethodError(f"recycle 'auto' needs the backend 'numpy'; say 'always' or 'never' for '{backend}'")


def _warn_of_one_matrix(systems: LinearSystems, sequence: Index) -> None:
    """Before a long run: the first, the second and the last system tell most families that have but one matrix."""
    few = {int(sequence[place]) for place in (0, min(1, len(sequence) - 1), -1)}
    if len(few) > 1 and len({systems[index].matrix for index in few}) == 1:
        warnings.warn(
            f"systems {', '.join(map(str, sorted(few)))} have the same matrix; if all do, one factorisation solves "
            "them faster than any recycling (baseline 'one-lu')",
            stacklevel=3,
        )


def _name(preconditioner: str | Factory) -> str:
    if isinstance(preconditioner, str):
        return preconditioner
    return f"{preconditioner.__module__}.{getattr(preconditioner, '__qualname__', type(preconditioner).__qualname__)}"
