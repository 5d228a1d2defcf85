"""The result: solutions in the caller's order, with the figures of each system, as a dataset to train on."""

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
from lamella.methods.skr.chunks import SystemRecord
from lamella.methods.skr.rows import Parts, Rows, iterate, write_npz
from lamella.results import Result

Array = NDArray[np.float64]
DATASET = "solutions.npz"  # the file in a folder of results
FIELDS = ("x", "parameters", "sequence", "solved", "bases", "options", "source")  # the fields of Solutions
SUFFIXES = (".npz", ".h5", ".hdf5", ".zarr")


@dataclass(kw_only=True, eq=False)
class Solutions(Result):
    """The result of :func:`~lamella.methods.skr.skr`, and of every baseline.

    Attributes:
        x: the solutions, in the caller's order [N, n].
        parameters: the parameters, in the same order, as blocks [N, ...]; those of a family are drawn on access.
        sequence: the indices of the systems in the order of solving [N].
        solved: the figures, in the order of solving; ``solved[0]`` was cold.
        bases: the final basis of each chunk [n, about k].
        options: the options of the run.
        source: the description of the systems.
    """

    x: Array
    parameters: tuple[Rows, ...]
    sequence: NDArray[np.intp]
    solved: list[SystemRecord]
    bases: tuple[Array, ...]
    options: dict[str, Any]
    source: dict[str, Any]

    kind: ClassVar[str] = "dataset"
    needs_folder: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.findings, self.notes = self._figures(), self._remarks()

    @property
    def converged(self) -> NDArray[np.bool_]:
        """Whether each system converged, in the caller's order [N]."""
        return self._by_caller([each.converged for each in self.solved])

    @property
    def residuals(self) -> Array:
        """|b - A x| / |b| in the caller's order [N]."""
        return self._by_caller([each.residual for each in self.solved])

    def mean(self, figure: str, first: bool = True) -> float:
        """Return the mean of ``iterations``, ``matvecs``, ``applications`` or ``seconds``.

        Args:
            figure: the name of the figure.
            first: whether to include the first system, which has nothing to recycle.
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
        count, failed = len(self.solved), np.flatnonzero(~self.converged)
        starts, matrices = Counter(each.start for each in self.solved), len({each.matrix for each in self.solved})
        if len(failed):
            numbers = ", ".join(map(str, failed[:10])) + (" ..." if len(failed) > 10 else "")
            found.append(f"{len(failed)} of {count} systems did not reach the tolerance: {numbers}.")
        if count > 1 and matrices == 1:
            found.append(f"All {count} systems have the same matrix: factorise it once (baseline 'one-lu').")
        elif matrices < count:
            found.append(f"There are {matrices} different matrices in {count} systems.")
        if starts["zero"]:
            found.append(f"{starts['zero']} systems have a right-hand side of zero, and thus the solution zero.")
        if starts["dropped"]:
            found.append(
                f"A carried basis was harmful and dropped {starts['dropped']} times; {starts['cold']} systems were "
                "solved cold."
            )
        return found

    def text(self) -> str:
        """Return a few lines for the terminal."""
        mean, later = self.mean("iterations"), self.mean("iterations", first=False)
        lines = [
            f"{len(self.solved)} systems of {self.x.shape[1]} unknowns: {mean:.1f} iterations each ({later:.1f} "
            f"without the first), {self.mean('matvecs'):.1f} products with A, {self.mean('seconds'):.3f} s; "
            f"worst residual {self.residuals.max():.2g}"
        ]
        return "\n".join(lines + self.notes)

    def write(self, path: str | Path, overwrite: bool = False) -> Path:  # type: ignore[override]
        """Write a dataset for training neural operators: ``.npz``, HDF5 (``.h5``) or ``.zarr``.

        In a folder of results it is written as ``solutions.npz``.

        It contains ``x`` [N, n] and ``parameters_0`` [N, ...], ... in the caller's order, ``converged`` and
        ``residual`` [N], ``sequence`` [N], ``basis_0`` ... [n, k], and the evidence as the text ``evidence``.

        Args:
            path: the file, or a folder of results.
            overwrite: whether to replace an existing file.

        Raises:
            ExportError: if ``path`` exists, cannot be written, or has another suffix.
            LamellaError: without h5py or zarr, for those formats.
        """
        path = _dataset(Path(path))
        if path.suffix not in SUFFIXES:
            raise ExportError(f"{path}: unknown suffix of a dataset; use one of {', '.join(SUFFIXES)}")
        if path.exists() and not overwrite:
            raise ExportError(f"{path}: exists; choose another name, or overwrite it")
        partial = path.with_name(f".{path.stem}.partial-{os.getpid()}{path.suffix}")
        try:
            _write(partial, self._arrays(), json.dumps(self.findings))
            _replace(partial, path)
        except OSError as error:
            raise ExportError(f"{path}: cannot be written ({error.strerror or error}); choose another path") from error
        return path

    @classmethod
    def read(cls, path: str | Path) -> Solutions:
        """Read a dataset of :meth:`write`, from its file or from a folder of results.

        Raises:
            LamellaError: if it is not such a dataset.
        """
        path = _dataset(Path(path))
        try:
            arrays, text = _read(path)
            evidence = json.loads(text)
            return Solutions(
                x=arrays["x"],
                parameters=_blocks(arrays, "parameters_"),
                sequence=arrays["sequence"].astype(np.intp),
                solved=[SystemRecord(**each) for each in evidence["solved"]],
                bases=_blocks(arrays, "basis_"),
                options=evidence["options"],
                source=evidence["source"],
            )
        except LamellaError:
            raise
        except Exception as error:  # each format raises its own errors for a damaged file
            reason = " ".join(str(error).split()) or type(error).__name__
            raise LamellaError(f"{path}: not a dataset of solutions ({reason}); give a file written by skr") from error

    def _arrays(self) -> dict[str, Any]:
        arrays: dict[str, Any] = {"x": self.x, "sequence": self.sequence}
        arrays |= {"converged": self.converged, "residual": self.residuals}
        arrays |= {f"parameters_{index}": block for index, block in enumerate(self.parameters)}
        return arrays | {f"basis_{index}": basis for index, basis in enumerate(self.bases)}

    def _by_caller(self, values: list[Any]) -> NDArray[Any]:
        ordered = np.array(values)
        result = np.empty_like(ordered)
        result[self.sequence] = ordered
        return result


def _dataset(path: Path) -> Path:
    """Return the file in a folder of results; any other path unchanged, also a folder that is a ``.zarr``."""
    return path / DATASET if path.is_dir() and path.suffix != ".zarr" else path


def _blocks(arrays: dict[str, Array], prefix: str) -> tuple[Array, ...]:
    return tuple(arrays[name] for name in sorted(arrays, key=_sort_key) if name.startswith(prefix))


def _sort_key(name: str) -> tuple[str, int]:
    word, _, number = name.rpartition("_")
    return (word, int(number)) if number.isdigit() else (name, 0)


def _write(path: Path, arrays: dict[str, Any], evidence: str) -> None:
    if path.suffix == ".npz":
        parts = {name: Parts.of(array) for name, array in arrays.items()}
        write_npz(path, {"evidence": np.array(evidence), **parts})
    elif path.suffix == ".zarr":
        group = require("zarr", "solve", "a zarr file").open_group(str(path), mode="w")
        for name, array in arrays.items():
            _fill(group.create_array(name, shape=array.shape, dtype=array.dtype), array)
        group.attrs["evidence"] = evidence
    else:
        with require("h5py", "solve", "HDF5").File(path, "w") as file:
            for name, array in arrays.items():
                _fill(file.create_dataset(name, shape=array.shape, dtype=array.dtype), array)
            file["evidence"] = evidence  # a dataset, since attributes are limited to 64 KiB


def _fill(target: Any, array: Rows) -> None:
    """Write an array into one of another library, a few rows at a time."""
    for tile, rows in iterate(array):
        target[tile] = rows


def _read(path: Path) -> tuple[dict[str, NDArray[Any]], str]:
    if not path.exists():
        raise LamellaError(f"{path}: no such file; give one written by skr")
    if path.suffix == ".zarr":
        group = require("zarr", "solve", "a zarr file").open_group(str(path), mode="r")
        return {name: array[...] for name, array in group.arrays()}, str(group.attrs["evidence"])
    if path.suffix in (".h5", ".hdf5"):
        with require("h5py", "solve", "HDF5").File(path, "r") as file:
            return {name: file[name][...] for name in file if name != "evidence"}, file["evidence"].asstr()[()]
    with np.load(path) as file:
        return {name: file[name] for name in file.files if name != "evidence"}, str(file["evidence"])


def _replace(partial: Path, path: Path) -> None:
    """Rename a complete file; a folder, which .zarr is, cannot be replaced atomically."""
    import shutil

    if path.is_dir():
        old = path.with_name(f".{path.name}.aside-{os.getpid()}")
        path.rename(old)
        partial.rename(path)
        shutil.rmtree(old)
    else:
        os.replace(partial, path)
