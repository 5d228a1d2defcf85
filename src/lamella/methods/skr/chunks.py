"""Step 3 of the paper: contiguous chunks of the sorted sequence, each with a basis of its own, side by side.

A chunk solves its systems one after the other. With a work folder every finished system is kept at once, with what the
next one starts from, so a chunk that was killed goes on with the same result to the bit.
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
from lamella.methods.skr.systems import LinearSystems, System
from lamella.progress import tracker
from lamella.workers import Pool, SerialPool

Array = NDArray[np.float64]
Index = NDArray[np.intp]


class Solver(Protocol):
    """What solves the systems of one chunk, in their order, and may remember what it learns."""

    def __call__(self, system: System, M: Apply | None) -> tuple[Solve, str]:
        """The solution, and how it began: ``cold``, ``recycled``, ``dropped`` ..."""
        ...

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Solved:
    """The figures of one system.

    Attributes:
        index: its number in the caller's order.
        start: ``cold``; ``recycled``, with a carried basis; ``dropped``, with one that did harm; ``zero``, where b is
            zero and so is x; or what else a solver of a comparison says.
        iterations, matvecs, applications: as :class:`~lamella.methods.skr.gcrodr.Solve` counts them.
        seconds: with the making of its preconditioner.
        residual, converged: of the true residual.
        delta: sine of the largest angle of the new basis to the one it began with; None where it began with none.
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
    """What one chunk needs, as it travels to the process that solves it."""

    systems: LinearSystems
    members: Index
    solver: Callable[[], Solver]
    preconditioner: str | Factory
    folder: Path | None
    number: int


@dataclass(frozen=True)
class Finished:
    """A chunk's solutions [members, n], the figures, and what its solver remembers."""

    x: Array
    solved: list[Solved]
    state: dict[str, Any]


def cut(sequence: Index, parts: int) -> list[Index]:
    """Contiguous chunks of nearly equal length, none of them empty."""
    return np.array_split(sequence, min(parts, len(sequence)))


def solve_chunk(chunk: Chunk, tell: Callable[[], None] = lambda: None) -> Finished:
    """Solve the systems of a chunk one after the other, from where its journal ends."""
    solver = chunk.solver()
    journal = _Journal(chunk)
    state = journal.go_on()
    if state is not None:
        solver.restore(state)
    for _ in journal.solved:
        tell()
    for index in chunk.members[len(journal.solved) :]:
        system = chunk.systems[int(index)]
        x, solved = _solve(solver, system, int(index), chunk.preconditioner)
        journal.add(x, solved, system, solver)
        tell()
    return Finished(journal.x, journal.solved, solver.state())


def _solve(solver: Solver, system: System, index: int, preconditioner: str | Factory) -> tuple[Array, Solved]:
    if not system.b.any():
        return np.zeros_like(system.b), Solved(index, "zero", 0, 0, 0, 0.0, 0.0, True, None, system.matrix)
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
    solved = Solved(index, start, *counts, seconds, solve.residual, solve.converged, delta, system.matrix)
    return solve.x, solved


def _distance(C: Array | None, Q: Array | None) -> float | None:
    """delta(Q, C) = ||(I - Pi_C) Pi_Q||_2: the sine of the largest angle that span Q makes with span C."""
    if C is None or Q is None or not C.shape[1] or not Q.shape[1]:
        return None
    first, second = np.linalg.qr(C)[0], np.linalg.qr(Q)[0]
    return min(float(np.linalg.norm(second - first @ (first.T @ second), 2)), 1.0)


class _Journal:
    """A chunk's finished systems: in memory, and in the work folder where there is one.

    A row of ``x-000.npy`` and a line of ``solved-000.jsonl`` come first, then ``state-000.npz`` at once, whose count
    says how many of them are good.
    """

    def __init__(self, chunk: Chunk) -> None:
        self.chunk = chunk
        self.solved: list[Solved] = []
        shape = (len(chunk.members), chunk.systems.n)
        if chunk.folder is None:
            self.x: Array = np.empty(shape)
            return
        number = f"{chunk.number:03}"
        self.lines, self.kept = chunk.folder / f"solved-{number}.jsonl", chunk.folder / f"state-{number}.npz"
        rows = chunk.folder / f"x-{number}.npy"
        mode: Any = "r+" if rows.exists() and self.kept.exists() else "w+"
        self.x = np.lib.format.open_memmap(rows, mode, np.float64, shape)

    def go_on(self) -> dict[str, Any] | None:
        """Read what an earlier run has left, and return what its solver knew; None to begin."""
        if self.chunk.folder is None:
            return None
        state = self._read()
        if state is None:
            self.kept.unlink(missing_ok=True)  # first, since without it nothing counts
            self.lines.unlink(missing_ok=True)
        return state

    def _read(self) -> dict[str, Any] | None:
        try:
            with np.load(self.kept) as file:
                state = {name: file[name] for name in file.files}
            count = int(state.pop("count"))
            good = self.lines.read_text(encoding="utf-8").splitlines()[:count]
            lines = [json.loads(line) for line in good]
        except (OSError, ValueError, KeyError, BadZipFile):
            return None
        systems = [self.chunk.systems[int(index)].digest for index in self.chunk.members[:count]]
        if [line.pop("system") for line in lines] != systems:
            return None  # a system has changed since, and with it all that follow
        self.solved = [Solved(**line) for line in lines]
        write(self.lines, "".join(line + "\n" for line in good))  # without what a kill cut short
        return state

    def add(self, x: Array, solved: Solved, system: System, solver: Solver) -> None:
        self.x[len(self.solved)] = x
        self.solved.append(solved)
        if self.chunk.folder is None:
            return
        assert isinstance(self.x, np.memmap)
        self.x.flush()
        with self.lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(solved) | {"system": system.digest}) + "\n")
        partial = self.kept.with_suffix(".partial.npz")
        np.savez(partial, count=np.array(len(self.solved)), **solver.state())
        os.replace(partial, self.kept)


def open_work(folder: str | Path | None, job: dict[str, Any]) -> Path | None:
    """The work folder of a job, emptied of another job's files.

    Args:
        job: everything that the result depends on.

    Raises:
        LamellaError: when it cannot be written, or holds what is not a job's.
    """
    if folder is None:
        return None
    folder = Path(folder)
    header = hashlib.sha256(json.dumps(job, sort_keys=True, default=str).encode()).hexdigest()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        mark = folder / "job"
        if not mark.exists() and any(folder.iterdir()):
            raise LamellaError(f"{folder}: not empty, and no work folder of skr; name another one")
        if mark.exists() and mark.read_text() != header:
            for file in folder.iterdir():
                if file.is_file():
                    file.unlink()
        mark.write_text(header)
    except OSError as error:
        raise LamellaError(f"{folder}: cannot be a work folder ({error.strerror}); name another one") from error
    return folder


def solve_chunks(chunks: Sequence[Chunk], pool: Pool) -> list[Finished]:
    """All chunks, each by one of some workers."""
    finished: dict[int, Finished] = {}
    with tracker("systems", sum(len(chunk.members) for chunk in chunks)) as count:
        here = isinstance(pool, SerialPool)  # then each system counts as it is solved
        for number, found in pool.each(partial(solve_chunk, tell=count) if here else solve_chunk, chunks):
            finished[number] = found
            count(0 if here else len(found.solved))
    return [finished[number] for number in range(len(chunks))]
