"""The result: solutions in the caller's order, with the figures of each system, as a data set to train on."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import asdict, dataclass
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
SOLVED = ("x", "parameters", "sequence", "solved", "bases", "options", "source")  # what solutions are made of
SUFFIXES = (".npz", ".h5", ".hdf5", ".zarr")


@dataclass(kw_only=True, eq=False)
class Solutions(Result):
    """What :func:`~lamella.methods.skr.skr` returns, and every baseline.

    Attributes:
        x: the solutions, in the caller's order [N, n].
        parameters: what they belong to, in the same order: blocks [N, ...].
        sequence: the number of the system that was solved first, second, and so on [N].
        solved: the figures, in that order; ``solved[0]`` was cold.
        bases: what each chunk would have handed on [n, about k].
        options: of the run.
        source: the description of the systems.
    """

    x: Array
    parameters: tuple[Array, ...]
    sequence: NDArray[np.intp]
    solved: list[Solved]
    bases: tuple[Array, ...]
    options: dict[str, Any]
    source: dict[str, Any]

    kind: ClassVar[str] = "dataset"
    needs_folder: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.findings, self.notes = self._figures(), self._remarks()

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

    def _figures(self) -> dict[str, Any]:
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

    def _remarks(self) -> list[str]:
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

    def text(self) -> str:
        """A few lines for the screen."""
        mean, later = self.mean("iterations"), self.mean("iterations", first=False)
        lines = [
            f"{len(self.solved)} systems of {self.x.shape[1]} unknowns: {mean:.1f} iterations each ({later:.1f} "
            f"without the first), {self.mean('matvecs'):.1f} products with A, {self.mean('seconds'):.3f} s; "
            f"worst residual {self.residuals.max():.2g}"
        ]
        return "\n".join(lines + self.notes)

    def write(self, path: str | Path, overwrite: bool = False) -> Path:  # type: ignore[override]
        """Write a data set that a trainer of neural operators reads: ``.npz``, HDF5 (``.h5``) or ``.zarr``.

        Into a folder of results it is written as ``solutions.npz``.

        It holds ``x`` [N, n] and ``parameters_0`` [N, ...], ... in the caller's order, ``converged`` and ``residual``
        [N], ``sequence`` [N], ``basis_0`` ... [n, k], and the evidence as the text ``evidence``.

        Raises:
            ExportError: when ``path`` exists or cannot be written, or has another ending.
            LamellaError: without h5py or zarr, for those.
        """
        path = _dataset(Path(path))
        if path.suffix not in SUFFIXES:
            raise ExportError(f"{path}: no data set ends so; take one of {', '.join(SUFFIXES)}")
        if path.exists() and not overwrite:
            raise ExportError(f"{path}: exists; choose another name, or overwrite it")
        partial = path.with_name(f".{path.stem}.partial-{os.getpid()}{path.suffix}")
        try:
            _write(partial, self._arrays(), json.dumps(self.findings))
            _put(partial, path)
        except OSError as error:
            raise ExportError(f"{path}: cannot be written ({error.strerror or error}); choose another place") from error
        return path

    @classmethod
    def read(cls, path: str | Path) -> Solutions:
        """Read back what :meth:`write` wrote, from its file or from a folder of results.

        Raises:
            LamellaError: when it is none.
        """
        path = _dataset(Path(path))
        try:
            held, text = _read(path)
            evidence = json.loads(text)
            return Solutions(
                x=held["x"],
                parameters=_blocks(held, "parameters_"),
                sequence=held["sequence"].astype(np.intp),
                solved=[Solved(**each) for each in evidence["solved"]],
                bases=_blocks(held, "basis_"),
                options=evidence["options"],
                source=evidence["source"],
            )
        except LamellaError:
            raise
        except Exception as error:  # each format has its own for a damaged file
            reason = " ".join(str(error).split()) or type(error).__name__
            raise LamellaError(f"{path}: not a data set of solutions ({reason}); give a file that skr wrote") from error

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


def _dataset(path: Path) -> Path:
    """The file in a folder of results; any other path as it is, also a folder that is a ``.zarr``."""
    return path / DATASET if path.is_dir() and path.suffix != ".zarr" else path


def _blocks(held: dict[str, Array], prefix: str) -> tuple[Array, ...]:
    return tuple(held[name] for name in sorted(held, key=_place) if name.startswith(prefix))


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
