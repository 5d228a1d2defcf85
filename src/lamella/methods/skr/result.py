"""The result: solutions in the caller's order, with the figures of each system, as a data set to train on."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from lamella.errors import ExportError, LamellaError
from lamella.extras import require
from lamella.methods.skr.chunks import Solved
from lamella.results import Result

Array = NDArray[np.float64]
DATASET = "solutions.npz"  # in a folder of results
SUFFIXES = (".npz", ".h5", ".hdf5", ".zarr")


@dataclass(frozen=True)
class Solutions:
    """What :func:`~lamella.methods.skr.skr` returns, and every baseline.

    Attributes:
        x: the solutions, in the caller's order [N, n].
        parameters: what they belong to, in the same order: blocks [N, ...].
        sequence: the number of the system that was solved first, second, and so on [N].
        solved: the figures, in that order; ``solved[0]`` was cold.
        bases: what each chunk would have handed on [n, about k].
        options: of the run.
        source: the description of the systems.
        provenance: stamped by the house.
    """

    x: Array
    parameters: tuple[Array, ...]
    sequence: NDArray[np.intp]
    solved: list[Solved]
    bases: tuple[Array, ...]
    options: dict[str, Any]
    source: dict[str, Any]
    provenance: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def converged(self) -> NDArray[np.bool_]:
        """In the caller's order [N]."""
        return self._by_caller([each.converged for each in self.solved])

    @property
    def residuals(self) -> Array:
        """|b - A x| / |b| in the caller's order [N]."""
        return self._by_caller([each.residual for each in self.solved])

    def mean(self, figure: str, first: bool = True) -> float:
        """The mean of ``iterations``, ``matvecs``, ``applications`` or ``seconds``.

        Args:
            first: with the very first system, which nothing could be recycled for.
        """
        values = [getattr(each, figure) for each in self.solved]
        return float(np.mean(values if first or len(values) == 1 else values[1:]))

    def evidence(self) -> dict[str, Any]:
        """The figures as a document: what a page is drawn from."""
        names = ("iterations", "matvecs", "applications", "seconds")
        return {
            "source": self.source,
            "options": self.options,
            "systems": len(self.solved),
            "unknowns": self.x.shape[1],
            "mean": {name: self.mean(name) for name in names},
            "mean_without_first": {name: self.mean(name, first=False) for name in names},
            "worst_residual": float(self.residuals.max()),
            "not_converged": np.flatnonzero(~self.converged).tolist(),
            "starts": dict(Counter(each.start for each in self.solved)),
            "matrices": len({each.matrix for each in self.solved}),
            "solved": [asdict(each) for each in self.solved],
        }

    def findings(self) -> list[str]:
        """What a reader must know, each in one sentence."""
        found = []
        count, lost = len(self.solved), np.flatnonzero(~self.converged)
        starts, matrices = Counter(each.start for each in self.solved), len({each.matrix for each in self.solved})
        if len(lost):
            numbers = ", ".join(map(str, lost[:10])) + (" ..." if len(lost) > 10 else "")
            found.append(f"{len(lost)} of {count} systems did not reach the tolerance: {numbers}.")
        if count > 1 and matrices == 1:
            found.append(f"All {count} systems have the same matrix: factorise it once (baseline 'one-lu').")
        elif matrices < count:
            found.append(f"There are {matrices} different matrices in {count} systems.")
        if starts["zero"]:
            found.append(f"{starts['zero']} systems have a right-hand side of zero, and so the solution zero.")
        if starts["dropped"]:
            found.append(
                f"A carried basis did harm {starts['dropped']} times and was dropped; {starts['cold']} systems were "
                "solved cold."
            )
        return found

    def summary(self) -> str:
        """A few lines for the screen."""
        mean, later = self.mean("iterations"), self.mean("iterations", first=False)
        lines = [
            f"{len(self.solved)} systems of {self.x.shape[1]} unknowns: {mean:.1f} iterations each ({later:.1f} "
            f"without the first), {self.mean('matvecs'):.1f} products with A, {self.mean('seconds'):.3f} s; "
            f"worst residual {self.residuals.max():.2g}"
        ]
        return "\n".join(lines + self.findings())

    def write(self, path: str | Path, overwrite: bool = False) -> Path:
        """Write a data set that a trainer of neural operators reads: ``.npz``, HDF5 (``.h5``) or ``.zarr``.

        It holds ``x`` [N, n] and ``parameters_0`` [N, ...], ... in the caller's order, ``converged`` and ``residual``
        [N], ``sequence`` [N], ``basis_0`` ... [n, k], and the evidence as the text ``evidence``.

        Raises:
            ExportError: when ``path`` exists or cannot be written, or has another ending.
            LamellaError: without h5py or zarr, for those.
        """
        path = Path(path)
        if path.suffix not in SUFFIXES:
            raise ExportError(f"{path}: no data set ends so; take one of {', '.join(SUFFIXES)}")
        if path.exists() and not overwrite:
            raise ExportError(f"{path}: exists; choose another name, or overwrite it")
        partial = path.with_name(f".{path.stem}.partial-{os.getpid()}{path.suffix}")
        try:
            _write(partial, self._arrays(), json.dumps(self.evidence()))
            _put(partial, path)
        except OSError as error:
            raise ExportError(f"{path}: cannot be written ({error.strerror or error}); choose another place") from error
        return path

    @classmethod
    def read(cls, path: str | Path) -> Solutions:
        """Read back what :meth:`write` wrote.

        Raises:
            LamellaError: when it is none.
        """
        path = Path(path)
        try:
            held, text = _read(path)
            evidence = json.loads(text)
            return cls(
                held["x"],
                tuple(held[name] for name in sorted(held, key=_place) if name.startswith("parameters_")),
                held["sequence"].astype(np.intp),
                [Solved(**each) for each in evidence["solved"]],
                tuple(held[name] for name in sorted(held, key=_place) if name.startswith("basis_")),
                evidence["options"],
                evidence["source"],
            )
        except LamellaError:
            raise
        except Exception as error:  # each format has its own for a damaged file
            reason = " ".join(str(error).split()) or type(error).__name__
            raise LamellaError(f"{path}: not a data set of solutions ({reason}); give a file that skr wrote") from error

    def as_result(self) -> Dataset:
        """The same as a result of the house."""
        return Dataset(solutions=self, findings=self.evidence(), notes=self.findings(), provenance=self.provenance)

    def _arrays(self) -> dict[str, Any]:
        arrays: dict[str, Any] = {"x": self.x, "sequence": self.sequence}
        arrays |= {"converged": self.converged, "residual": self.residuals}
        arrays |= {f"parameters_{place}": block for place, block in enumerate(self.parameters)}
        return arrays | {f"basis_{place}": basis for place, basis in enumerate(self.bases)}

    def _by_caller(self, values: list[Any]) -> NDArray[Any]:
        given = np.array(values)
        back = np.empty_like(given)
        back[self.sequence] = given
        return back


@dataclass(kw_only=True)
class Dataset(Result):
    """Solutions as a folder of results, with a data set that a trainer of neural operators reads."""

    solutions: Solutions

    kind: ClassVar[str] = "dataset"
    needs_folder: ClassVar[bool] = True

    def write(self, folder: Path) -> None:
        self.solutions.write(folder / DATASET)

    @classmethod
    def read(cls, path: Path) -> Solutions:
        """The solutions in a folder of results, or in a data set."""
        return Solutions.read(path / DATASET if (path / DATASET).exists() else path)


def _place(name: str) -> tuple[str, int]:
    word, _, number = name.rpartition("_")
    return (word, int(number)) if number.isdigit() else (name, 0)


def _write(path: Path, arrays: dict[str, Any], evidence: str) -> None:
    if path.suffix == ".npz":
        np.savez(path, evidence=np.array(evidence), **arrays)
    elif path.suffix == ".zarr":
        group = require("zarr", "solve", "a zarr file").open_group(str(path), mode="w")
        for name, array in arrays.items():
            group[name] = array
        group.attrs["evidence"] = evidence
    else:
        with require("h5py", "solve", "HDF5").File(path, "w") as file:
            for name, array in arrays.items():
                file[name] = array
            file["evidence"] = evidence  # a data set, since attributes have 64 KiB


def _read(path: Path) -> tuple[dict[str, NDArray[Any]], str]:
    if not path.exists():
        raise LamellaError(f"{path}: no such file; give one that skr wrote")
    if path.suffix == ".zarr":
        group = require("zarr", "solve", "a zarr file").open_group(str(path), mode="r")
        return {name: array[...] for name, array in group.arrays()}, str(group.attrs["evidence"])
    if path.suffix in (".h5", ".hdf5"):
        with require("h5py", "solve", "HDF5").File(path, "r") as file:
            return {name: file[name][...] for name in file if name != "evidence"}, file["evidence"].asstr()[()]
    with np.load(path) as file:
        return {name: file[name] for name in file.files if name != "evidence"}, str(file["evidence"])


def _put(partial: Path, path: Path) -> None:
    """Rename what is whole; a folder, which .zarr is, cannot replace another one at once."""
    import shutil

    if path.is_dir():
        aside = path.with_name(f".{path.name}.aside-{os.getpid()}")
        path.rename(aside)
        partial.rename(path)
        shutil.rmtree(aside)
    else:
        os.replace(partial, path)
