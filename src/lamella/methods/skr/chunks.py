"""Step 3 of the paper: contiguous chunks of the sorted sequence, each with its own basis, solved in parallel.

A chunk solves its systems one after the other. With a work directory every finished system is saved at once, together
with the state that the next one starts from, so an interrupted chunk resumes bit-exact.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from lamella.errors import LamellaError, NumericsError
from lamella.files import write
from lamella.methods.skr.gcrodr import Apply, Solve
from lamella.methods.skr.preconditioners import Factory, make
from lamella.methods.skr.rows import MatrixFile
from lamella.methods.skr.systems import LinearSystems, System
from lamella.progress import tracker
from lamella.workers import Pool, SerialPool

Array = NDArray[np.float64]
Index = NDArray[np.intp]


class Solver(Protocol):
    """A solver for the systems of one chunk, in order, which may keep state between them."""

    def __call__(self, system: System, M: Apply | None) -> tuple[Solve, str]:
        """Return the solution and how it started: ``cold``, ``recycled``, ``dropped`` ..."""
        ...

    def state(self) -> dict[str, Any]:
        """Return the state to save."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Restore a saved state."""
        ...


@dataclass(frozen=True)
class SystemRecord:
    """The figures of one system.

    Attributes:
        index: its index in the caller's order.
        start: ``cold``; ``recycled``, with a carried basis; ``dropped``, with a harmful one; ``zero``, if b and thus x
            is zero; or the description of another solver.
        iterations, matvecs, applications: as counted by :class:`~lamella.methods.skr.gcrodr.Solve`.
        seconds: time including the setup of its preconditioner.
        residual, converged: of the true residual.
        delta: sine of the largest angle between the new basis and the initial one; None if it started without one.
        matrix: digest of A.
    """

    index: int
    start: str
    iterations: int
    matvecs: int
    applications: int
    seconds: float
    residual: float
    converged: bool
    delta: float | None
    matrix: str


@dataclass(frozen=True)
class Chunk:
    """The input of the process that solves a chunk.

    Attributes:
        systems: all systems.
        members: the indices of the chunk's systems, in order.
        solver: creates the solver.
        preconditioner: a name or a factory.
        folder: the work directory, if any.
        number: the index of the chunk.
    """

    systems: LinearSystems
    members: Index
    solver: Callable[[], Solver]
    preconditioner: str | Factory
    folder: Path | None
    number: int


@dataclass(frozen=True)
class ChunkSolution:
    """The result of a chunk.

    Attributes:
        x: the solutions [members, n], or their file in the work directory: they may not fit in memory.
        solved: the figures of each system.
        state: the final state of the solver.
    """

    x: Array | Path
    solved: list[SystemRecord]
    state: dict[str, Any]

    def rows(self) -> Array | MatrixFile:
        """Return the solutions [members, n], in memory or in their file."""
        return MatrixFile(self.x) if isinstance(self.x, Path) else self.x


def cut(sequence: Index, parts: int) -> list[Index]:
    """Split the sequence into non-empty contiguous chunks of nearly equal length.

    Args:
        sequence: indices of the systems in their solving order `[systems]`.
        parts: number of chunks; a shorter sequence has one chunk per system.
    """
    return np.array_split(sequence, min(parts, len(sequence)))


def solve_chunk(chunk: Chunk, report: Callable[[], None] = lambda: None) -> ChunkSolution:
    """Solve the systems of a chunk one after the other, from the end of its journal.

    Args:
        chunk: the chunk.
        report: called after each system.
    """
    solver = chunk.solver()
    journal = _Journal(chunk)
    state = journal.resume()
    if state is not None:
        solver.restore(state)
    for _ in journal.solved:
        report()
    for index in chunk.members[len(journal.solved) :]:
        system = chunk.systems[int(index)]
        x, solved = _solve(solver, system, int(index), chunk.preconditioner)
        journal.add(x, solved, system, solver)
        report()
    found = journal.x
    return ChunkSolution(found.file if isinstance(found, MatrixFile) else found, journal.solved, solver.state())


def _solve(solver: Solver, system: System, index: int, preconditioner: str | Factory) -> tuple[Array, SystemRecord]:
    if not system.b.any():
        return np.zeros_like(system.b), SystemRecord(index, "zero", 0, 0, 0, 0.0, 0.0, True, None, system.matrix)
    begin = time.perf_counter()
    M = make(preconditioner, system.A, f"system {index}")
    before = solver.state().get("U")
    try:
        solve, start = solver(system, M)
    except NumericsError as error:
        raise NumericsError(f"system {index}: {error}") from error
    seconds = time.perf_counter() - begin
    delta = _distance(before, solve.U) if start in ("recycled", "dropped") else None
    counts = (solve.iterations, solve.matvecs, solve.applications)
    solved = SystemRecord(index, start, *counts, seconds, solve.residual, solve.converged, delta, system.matrix)
    return solve.x, solved


def _distance(C: Array | None, Q: Array | None) -> float | None:
    """Return delta(Q, C) = ||(I - Pi_C) Pi_Q||_2, the sine of the largest angle between span Q and span C."""
    if C is None or Q is None or not C.shape[1] or not Q.shape[1]:
        return None
    first, second = np.linalg.qr(C)[0], np.linalg.qr(Q)[0]
    return min(float(np.linalg.norm(second - first @ (first.T @ second), 2)), 1.0)


class _Journal:
    """The finished systems of a chunk, in memory and, if given, in the work directory.

    A row of ``x-000.npy`` and a line of ``solved-000.jsonl`` are written first, then ``state-000.npz`` atomically,
    whose count defines how many of them are valid.
    """

    def __init__(self, chunk: Chunk) -> None:
        self.chunk = chunk
        self.solved: list[SystemRecord] = []
        shape = (len(chunk.members), chunk.systems.n)
        if chunk.folder is None:
            self.x: Array | MatrixFile = np.empty(shape)
            return
        number = f"{chunk.number:03}"
        self.lines, self.state_file = chunk.folder / f"solved-{number}.jsonl", chunk.folder / f"state-{number}.npz"
        rows = chunk.folder / f"x-{number}.npy"
        self.x = MatrixFile(rows, None if rows.exists() and self.state_file.exists() else shape)

    def resume(self) -> dict[str, Any] | None:
        """Read the results of an interrupted run, and return its solver's state; None if there are none."""
        if self.chunk.folder is None:
            return None
        state = self._read()
        if state is None:
            self.state_file.unlink(missing_ok=True)  # first, since the other files are invalid without it
            self.lines.unlink(missing_ok=True)
        return state

    def _read(self) -> dict[str, Any] | None:
        try:
            with np.load(self.state_file) as file:
                state = {name: file[name] for name in file.files}
            count = int(state.pop("count"))
            good = self.lines.read_text(encoding="utf-8").splitlines()[:count]
            lines = [json.loads(line) for line in good]
        except (OSError, ValueError, KeyError, BadZipFile):
            return None
        systems = [self.chunk.systems[int(index)].digest for index in self.chunk.members[:count]]
        if [line.pop("system") for line in lines] != systems:
            return None  # a system has changed, which invalidates the following ones
        self.solved = [SystemRecord(**line) for line in lines]
        write(self.lines, "".join(line + "\n" for line in good))  # without an incomplete last line
        return state

    def add(self, x: Array, solved: SystemRecord, system: System, solver: Solver) -> None:
        """Append a solution and its figures, and save the solver's state."""
        self.x[len(self.solved)] = x
        self.solved.append(solved)
        if not isinstance(self.x, MatrixFile):
            return
        self.x.sync()
        with self.lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(solved) | {"system": system.digest}) + "\n")
        partial = self.state_file.with_suffix(".partial.npz")
        np.savez(partial, count=np.array(len(self.solved)), **solver.state())
        os.replace(partial, self.state_file)


def open_work(folder: str | Path | None, job: dict[str, Any]) -> Path | None:
    """Open the work directory of a job, and remove the files of another job.

    Args:
        folder: the directory; None for none.
        job: everything that the result depends on.

    Raises:
        LamellaError: if it cannot be written, or contains other files.
    """
    if folder is None:
        return None
    folder = Path(folder)
    header = hashlib.sha256(json.dumps(job, sort_keys=True, default=str).encode()).hexdigest()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        mark = folder / "job"
        if not mark.exists() and any(folder.iterdir()):
            raise LamellaError(f"{folder}: not empty, and not a work directory of skr; choose another one")
        if mark.exists() and mark.read_text() != header:
            for file in folder.iterdir():
                if file.is_file():
                    file.unlink()
        mark.write_text(header)
    except OSError as error:
        raise LamellaError(
            f"{folder}: cannot be used as work directory ({error.strerror}); choose another one"
        ) from error
    return folder


def solve_chunks(chunks: Sequence[Chunk], pool: Pool) -> list[ChunkSolution]:
    """Solve all chunks with a pool of workers.

    Args:
        chunks: the chunks.
        pool: the workers.
    """
    finished: dict[int, ChunkSolution] = {}
    with tracker("systems", sum(len(chunk.members) for chunk in chunks)) as count:
        serial = isinstance(pool, SerialPool)  # then progress is reported per system
        for number, solution in pool.each(partial(solve_chunk, report=count) if serial else solve_chunk, chunks):
            finished[number] = solution
            count(0 if serial else len(solution.solved))
    return [finished[number] for number in range(len(chunks))]
