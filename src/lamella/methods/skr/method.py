"""SKR: accelerating data generation for neural operators via Krylov subspace recycling (Wang et al., ICLR 2024).

arXiv 2401.09516. A neural operator is trained on thousands of solved equations with parameters from one distribution.
Each is a sparse system A x = b; solving them is nearly all of the cost. Systems with similar parameters have similar
matrices, and the slowly converging components of one are those of the next::

    P_0 P_1 P_2 ... --sort--> P_0 P_7 P_3 | P_5 P_1 ...      1. each system close to the previous one (sorting.py)
                               |U--> |U-->|  |U-->            2. GCRO-DR passes its basis U on (gcrodr.py)
                              chunk 0     | chunk 1           3. chunks in parallel (chunks.py)

Ours are the basis in solution space, which stays valid if the preconditioner changes, and ``recycle="auto"``, which
detects harmful bases (harm.py).
"""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Ge, Gt, Lt
from numpy.typing import NDArray

from lamella.errors import MethodError
from lamella.files import Work
from lamella.methods.skr.chunks import Chunk, ChunkSolution, cut, open_work, solve_chunks
from lamella.methods.skr.gcrodr import Apply, Solve, gcrodr
from lamella.methods.skr.harm import Harm
from lamella.methods.skr.preconditioners import Factory, check
from lamella.methods.skr.result import Solutions
from lamella.methods.skr.rows import MatrixFile
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
    m: Annotated[int, Ge(1)] = 40,
    k: Annotated[int, Ge(0)] = 20,
    tol: Annotated[float, Gt(0), Lt(1)] = 1e-8,
    max_iterations: Annotated[int, Ge(1)] = 10_000,
    preconditioner: str | Factory = "jacobi",
    order: Order = "greedy",
    recycle: Recycle = "auto",
    backend: Backend = "numpy",
    workers: Workers = WORKERS,
    work: Work = Work(),
    seed: int = 0,
) -> Solutions:
    """Solve a family of linear systems in sorted order, recycling a Krylov subspace from each system to the next.

    Args:
        systems: N systems A x = b of n unknowns with their parameters, or any input of :meth:`LinearSystems.open`.
        m: dimension of the search space; the paper uses 40.
        k: dimension of the recycled subspace; the paper uses 20. 0 is restarted GMRES.
        tol: residual to reach, relative to |b|; the paper's tables go from 1e-1 to 1e-11, most are at 1e-8.
        max_iterations: per system; the paper uses 10 000. A system that reaches it is marked as not converged.
        preconditioner: ``none``, ``jacobi``, ``sor``, ``asm``, ``ilu``, ``icc``, ``amg``, or a function from A to M^-1.
            The paper compares several and has no default.
        order: how to sort the systems, ``greedy`` is Algorithm 1; see :func:`~lamella.methods.skr.sorting.arrange`.
        recycle: ``always`` as in the paper; ``auto`` drops harmful bases; ``never`` starts each system cold.
        backend: ``numpy`` is Lamella's own; ``gcrotmk`` is SciPy's, which recycles other vectors; ``petsc`` needs a
            PETSc with HPDDM.
        workers: the processes that solve one chunk of the sorted sequence each, on this machine or on a Ray cluster.
        work: directory that keeps each finished system, so that an interrupted run resumes with the same result.
        seed: random seed of the order ``random``, the paper's control without sorting.

    Returns:
        The solutions in the caller's order.

    Raises:
        LamellaError: for systems that do not fit each other, or that cannot be solved; see the page.
    """
    systems = LinearSystems.open(systems)
    _check(m, k, recycle, backend, work.folder)
    check(preconditioner)
    options: dict[str, Any] = {
        "m": m, "k": k, "tol": tol, "max_iterations": max_iterations, "preconditioner": _name(preconditioner),
        "order": order, "recycle": recycle, "backend": backend,
        "workers": workers.cluster or workers.processes or 1, "seed": seed,
    }  # fmt: skip
    solver = _solver(backend, preconditioner, recycle, m=m, k=k, tol=tol, max_iterations=max_iterations)
    sequence = arrange(systems.parameters, len(systems), order, seed)
    _warn_of_one_matrix(systems, sequence)
    own = "none" if backend == "petsc" else preconditioner  # PETSc creates its own
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
    """Run steps 2 and 3 with any solver: split the sequence, solve the chunks, and restore the caller's order.

    Args:
        systems: the systems.
        sequence: the order in which to solve them.
        solver: creates the solver of a chunk.
        options: the options of the run.
        preconditioner: a name or a factory.
        workers: the processes that solve the chunks.
        work: directory that keeps each finished system.
    """
    with workers.pool() as pool:
        chunks = cut(sequence, pool.size)
        job = options | {"systems": systems.description, "sequence": sequence.tolist(), "chunks": len(chunks)}
        folder = open_work(work, job)
        jobs = [Chunk(systems, each, solver, preconditioner, folder, number) for number, each in enumerate(chunks)]
        finished = solve_chunks(jobs, pool)
    return _collect(systems, chunks, options, finished, folder)


def _collect(
    systems: LinearSystems,
    chunks: list[Index],
    options: dict[str, Any],
    finished: list[ChunkSolution],
    folder: Path | None,
) -> Solutions:
    shape = (len(systems), systems.n)
    x = np.empty(shape) if folder is None else _on_disk(folder / "x.npy", shape)
    for members, chunk in zip(chunks, finished, strict=True):
        rows = chunk.rows()
        for position, index in enumerate(members):
            x[index] = rows[position]  # from the order of solving to the caller's order
    sequence = np.concatenate(chunks)
    solved = [each for chunk in finished for each in chunk.solved]
    bases = tuple(chunk.state.get("U", np.empty((systems.n, 0))) for chunk in finished)
    return Solutions(
        x=np.load(x.file, mmap_mode="r+") if isinstance(x, MatrixFile) else x,
        parameters=systems.parameters,
        sequence=sequence,
        solved=solved,
        bases=bases,
        options=options,
        source=systems.description,
    )


class Recycling:
    """GCRO-DR with state between systems: the basis U, and statistics of harmful bases."""

    def __init__(self, recycle: Recycle, **settings: Any) -> None:
        self.recycle, self.settings = recycle, settings
        self.U: Array | None = None
        self.harm = Harm()

    def __call__(self, system: System, M: Apply | None) -> tuple[Solve, str]:
        """Solve a system, and return the solution and how it started."""
        carried = self.U is not None and self.recycle != "never"
        if carried and self.recycle == "auto":
            carried = self.harm.may_recycle()
        harm_test = self.harm if carried and self.recycle == "auto" else None
        solve = gcrodr(system.A, system.b, M=M, Y=self.U if carried else None, harm=harm_test, **self.settings)
        self.U = None if solve.U is None else np.ascontiguousarray(solve.U)
        self.harm.update(solve, carried)
        return solve, "dropped" if solve.dropped else "recycled" if carried else "cold"

    def state(self) -> dict[str, Any]:
        """Return the state to save."""
        return self.harm.state() | ({} if self.U is None else {"U": self.U})

    def restore(self, state: dict[str, Any]) -> None:
        """Restore a saved state."""
        self.harm.restore(state)
        self.U = state.get("U")


def _on_disk(file: Path, shape: tuple[int, int]) -> MatrixFile:
    """Return an array in a new file; an earlier result keeps the file that it had."""
    file.unlink(missing_ok=True)
    return MatrixFile(file, shape)


def _solver(backend: Backend, preconditioner: str | Factory, recycle: Recycle, **settings: Any) -> Any:
    """Return a picklable function that creates the solver of each chunk."""
    if backend == "numpy":
        return partial(Recycling, recycle, **settings)
    if backend == "gcrotmk":
        return partial(Outer, carried=recycle != "never", **settings)
    from lamella.methods.skr.petsc import HPDDM

    return partial(HPDDM, preconditioner, carried=recycle != "never", **settings)


def _check(m: int, k: int, recycle: Recycle, backend: Backend, work: Path | None) -> None:
    if k >= m:
        raise MethodError(f"k is {k} and m is {m}; recycle fewer than m vectors")
    if backend == "petsc" and work is not None:
        raise MethodError("a work directory needs the basis, which PETSc keeps internally; omit `work`, or use 'numpy'")
    if recycle == "auto" and backend != "numpy":
        raise MethodError(f"recycle 'auto' needs the backend 'numpy'; use 'always' or 'never' for '{backend}'")


def _warn_of_one_matrix(systems: LinearSystems, sequence: Index) -> None:
    """Compare three systems before a long run, which detects most families with a single matrix."""
    sampled = {int(sequence[position]) for position in (0, min(1, len(sequence) - 1), -1)}
    if len(sampled) > 1 and len({systems[index].matrix for index in sampled}) == 1:
        warnings.warn(
            f"systems {', '.join(map(str, sorted(sampled)))} have the same matrix; if all do, one factorisation solves "
            "them faster than any recycling (baseline 'one-lu')",
            stacklevel=3,
        )


def _name(preconditioner: str | Factory) -> str:
    if isinstance(preconditioner, str):
        return preconditioner
    return f"{preconditioner.__module__}.{getattr(preconditioner, '__qualname__', type(preconditioner).__qualname__)}"
