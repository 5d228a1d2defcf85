"""The input: linear systems A x = b of one size, each with its parameters."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from lamella.arrays import read_npz
from lamella.errors import LamellaError, NumericsError
from lamella.methods.skr.equations import family
from lamella.methods.skr.files import (
    check_indices,
    check_numeric,
    integers,
    read_dense,
    read_matrix,
    reading,
)
from lamella.methods.skr.rows import Parts, Rows, iterate, write_npz
from lamella.reading import FileRefused
from lamella.signature import Fixture

Array = NDArray[np.float64]
MATRIX, VECTOR = (".mtx", ".mtx.gz", ".npz"), (".mtx", ".mtx.gz", ".npy")


@dataclass(frozen=True)
class System:
    """One system: A [n, n] as CSR and b [n].

    Attributes:
        A: the matrix.
        b: the right-hand side.
    """

    A: Any
    b: Array

    @property
    def matrix(self) -> str:
        """The digest of A: equal matrices have equal digests."""
        return _digest(self.A.indptr, self.A.indices, self.A.data)

    @property
    def digest(self) -> str:
        """The digest of A and b."""
        return _digest(self.A.indptr, self.A.indices, self.A.data, self.b)


@dataclass(frozen=True)
class LinearSystems:
    """N systems of n unknowns, each loaded on access.

    Attributes:
        load: returns A and b of a system by its index; must be picklable for other processes.
        parameters: the parameters to sort by, as blocks [N, ...]: a field, or a field and a wavenumber. Empty if
            unknown; then the caller's order is used. Those of a family are drawn on access.
        count: the number of systems.
        n: the number of unknowns.
        description: the origin of the systems, for provenance.
    """

    metavar = "SYSTEMS"
    source_help = "a folder of matrices and vectors, a .npz or .mtx file, or a family such as darcy:grid=32,count=8"
    example = Fixture("darcy:grid=8,count=5")

    load: Callable[[int], tuple[Any, Array]]
    parameters: tuple[Rows, ...]
    count: int
    n: int
    description: dict[str, Any]

    def describe(self) -> dict[str, Any]:
        """Return the metadata for provenance."""
        return self.description

    @classmethod
    def of(cls, systems: Iterable[tuple[Any, ...]]) -> LinearSystems:
        """Create the systems from an iterable of (A, b, P) or (A, b); P is an array, a scalar, or a tuple of them.

        Raises:
            LamellaError: if there are none, or their parameters have different shapes.
        """
        items = list(systems)
        if not items:
            raise LamellaError("no linear systems; give at least one (A, b, P)")
        for number, item in enumerate(items):
            if not isinstance(item, tuple) or len(item) not in (2, 3):
                raise LamellaError(f"system {number} is not (A, b, P) or (A, b) but {type(item).__name__}")
            if len(item) != len(items[0]):
                raise LamellaError(f"system {number} and system 0: only one has parameters; give all or none")
        blocks = _blocks([item[2] for item in items]) if len(items[0]) == 3 else ()
        return cls._create(partial(_item, [item[:2] for item in items]), blocks, len(items), {"source": "memory"})

    @classmethod
    def of_parameters(
        cls, blocks: tuple[Rows, ...], assemble: Callable[..., tuple[Any, Array]], description: dict[str, Any]
    ) -> LinearSystems:
        """Create the systems from their parameters.

        Args:
            blocks: the parameters [N, ...].
            assemble: builds A and b from the parameters of one system.
            description: the origin of the systems.
        """
        return cls._create(partial(_assemble, blocks, assemble), blocks, len(blocks[0]), description)

    @classmethod
    def open(cls, source: Any) -> LinearSystems:
        """Open systems from a folder, a file, a family such as ``darcy:grid=32,count=8``, or an iterable.

        A folder has A*.mtx or A*.npz (SciPy's), b*.mtx or b*.npy, and parameters.npy [N, ...] or P*.npy; one A may
        serve many b. A file NAME.mtx has its right-hand sides in NAME_b.mtx, as in the SuiteSparse collection; a .npz
        is a file of :meth:`write`.

        Raises:
            LamellaError: if they cannot be read or do not fit each other.
        """
        if isinstance(source, LinearSystems):
            return source
        if not isinstance(source, str | Path):
            return cls.of(source)
        path = Path(source)
        with reading(path):
            if path.is_dir():
                return cls._folder(path)
            if path.is_file():
                return cls._npz(path) if path.suffix == ".npz" else cls._matrix_market(path)
        return cls.of_parameters(*family(str(source)))

    @classmethod
    def _folder(cls, path: Path) -> LinearSystems:
        matrices, vectors = (_files(path, letter, suffixes) for letter, suffixes in (("A", MATRIX), ("b", VECTOR)))
        if not matrices or not vectors or len(matrices) not in (1, len(vectors)):
            raise LamellaError(
                f"{path}: {len(matrices)} files A* and {len(vectors)} files b*; give equally many, or one A"
            )
        single = path / "parameters.npy"
        each = _files(path, "P", (".npy",))
        blocks: tuple[Array, ...] = ()
        if single.is_file():
            blocks = (_real(read_dense(single)),)
        elif each:
            blocks = _blocks([read_dense(file) for file in each])
        description = {"source": path.name, "matrices": len(matrices)}
        return cls._create(partial(_read, matrices, vectors), blocks, len(vectors), description)

    @classmethod
    def _matrix_market(cls, path: Path) -> LinearSystems:
        sides_file = path.with_name(path.name.replace(".mtx", "_b.mtx", 1))
        if not sides_file.is_file():
            raise LamellaError(
                f"{path}: its right-hand sides are missing; put them into {sides_file.name}, one per column"
            )
        sides = read_dense(sides_file)  # [n, N]
        A = read_matrix(path)
        return cls._create(partial(_item, [(A, b) for b in sides.T.copy()]), (), sides.shape[1], {"source": path.name})

    @classmethod
    def _npz(cls, path: Path) -> LinearSystems:
        arrays = _check_archive(read_npz(path))
        blocks = tuple(_real(arrays[name]) for name in sorted(arrays) if name.startswith("parameters"))
        description = {"source": path.name}
        return cls._create(partial(_unpack, arrays), blocks, len(arrays["b"]), description)

    @classmethod
    def _create(
        cls,
        load: Callable[[int], tuple[Any, Array]],
        blocks: tuple[Rows, ...],
        count: int,
        description: dict[str, Any],
    ) -> LinearSystems:
        if count == 0:
            raise LamellaError("no linear systems: give at least one right-hand side")
        for block in blocks:
            if block.ndim == 0:
                raise LamellaError(f"the parameters are a single value for {count} systems; give one entry per system")
            if len(block) != count:
                raise LamellaError(f"parameters of {len(block)} systems for {count} systems; give one entry per system")
            for tile, rows in iterate(block):
                finite = np.isfinite(rows).reshape(len(rows), -1).all(axis=1)
                if finite.all():
                    continue
                bad = tile.start + int(np.flatnonzero(~finite)[0])
                raise NumericsError(f"the parameters of system {bad} are not finite; correct them or remove the system")
        first = cls(load, blocks, count, -1, description)[0]
        return cls(load, blocks, count, len(first.b), description | {"count": count, "n": len(first.b)})

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[System]:
        return (self[index] for index in range(self.count))

    def __getitem__(self, index: int) -> System:
        """Return system ``index`` after checks.

        Raises:
            LamellaError: if A is not square and real, or the sizes differ from those of the others.
            NumericsError: if an entry is not finite.
        """
        if not 0 <= index < self.count:
            raise IndexError(index)
        A, b = self.load(index)
        where = f"system {index}"
        A, b = A if sparse.issparse(A) else np.asarray(A), np.asarray(b)
        if np.iscomplexobj(A) or np.iscomplexobj(b):
            raise LamellaError(f"{where} is complex; write it as a real system of its real and imaginary parts")
        if A.ndim != 2 or A.shape[0] != A.shape[1] or A.shape[0] == 0:
            raise LamellaError(f"{where}: its matrix is {' x '.join(map(str, A.shape))}; give a square one")
        if b.shape != (A.shape[0],):  # before memory is allocated for the rows that the matrix declares
            raise LamellaError(f"{where}: b has shape {b.shape}, its matrix {A.shape[0]} rows; give ({A.shape[0]},)")
        if self.n not in (-1, len(b)):
            raise LamellaError(
                f"{where} has {len(b)} unknowns, system 0 has {self.n}; a basis is carried between systems of one size"
            )
        if sparse.issparse(A):
            check_indices(A, where)
        A, b = (
            sparse.csr_array(A.astype(np.float64)),
            b.astype(np.float64),
        )  # copies, so that the caller's arrays are unchanged
        A.sum_duplicates()
        if not (np.isfinite(A.data).all() and np.isfinite(b).all()):
            raise NumericsError(f"{where} has entries that are not finite; correct it or remove it")
        return System(A, b)

    def write(self, path: str | Path) -> None:
        """Write all systems as one .npz for :meth:`open`, with the matrices concatenated in CSR format.

        Each array is written system by system, for which every system is loaded several times.
        """
        entries = sum(each.A.nnz for each in self)
        integer, N, n = self[0].A.indices.dtype, self.count, self.n
        arrays = {
            "data": Parts((entries,), np.dtype(np.float64), (each.A.data for each in self)),
            "indices": Parts((entries,), integer, (each.A.indices for each in self)),
            "indptr": Parts((N, n + 1), integer, (each.A.indptr for each in self)),
            "b": Parts((N, n), np.dtype(np.float64), (each.b for each in self)),
        }
        blocks = {f"parameters_{index}": Parts.of(block) for index, block in enumerate(self.parameters)}
        write_npz(path, arrays | blocks, ZIP_DEFLATED)


def _blocks(parameters: list[Any]) -> tuple[Array, ...]:
    """Return the parameters of all systems, block by block [N, ...]."""
    rows = [each if isinstance(each, tuple) else (each,) for each in parameters]
    for number, row in enumerate(rows):
        shapes = [[np.shape(part) for part in each] for each in (row, rows[0])]
        if shapes[0] != shapes[1]:
            raise LamellaError(
                f"the parameters of system {number} have shape {shapes[0]}, those of system 0 {shapes[1]}; "
                "distances need equal shapes"
            )
    return tuple(_real(np.stack([np.asarray(row[index]) for row in rows])) for index in range(len(rows[0])))


def _real(block: Any) -> Array:
    if block.dtype.kind not in "fiub":
        raise LamellaError(f"parameters of type {block.dtype}; give real numbers")
    return block.astype(np.float64)


def _item(items: list[tuple[Any, Any]], index: int) -> tuple[Any, Any]:
    return items[index]


def _assemble(blocks: tuple[Rows, ...], assemble: Callable[..., tuple[Any, Array]], index: int) -> tuple[Any, Array]:
    return assemble(*(block[index] for block in blocks))


def _read(matrices: list[Path], vectors: list[Path], index: int) -> tuple[Any, Array]:
    A = read_matrix(matrices[index if len(matrices) > 1 else 0])
    b = read_dense(vectors[index])
    return A, b[:, 0] if b.ndim == 2 and b.shape[1] == 1 else b


def _check_archive(arrays: dict[str, Any]) -> dict[str, Any]:
    """Check the arrays of all systems in one archive of :meth:`LinearSystems.write`.

    Raises:
        FileRefused: if they do not fit each other.
    """
    if missing := {"data", "b"} - set(arrays):
        raise FileRefused(f"it has no '{min(missing)}'")
    data, b, indices, indptr = arrays["data"], arrays["b"], integers(arrays, "indices"), integers(arrays, "indptr")
    for name in ("data", "b"):
        check_numeric(arrays[name], f"'{name}'")
    if data.ndim != 1 or indices.shape != data.shape:
        raise FileRefused(
            f"data {list(data.shape)} and indices {list(indices.shape)} are not two vectors of one length"
        )
    if b.ndim != 2 or not b.size or indptr.shape != (len(b), b.shape[1] + 1):
        raise FileRefused(f"b is {list(b.shape)} and indptr {list(indptr.shape)}, not [N, n] and [N, n + 1]")
    n = b.shape[1]
    if indptr.min() < 0 or indptr.max() > len(
        data
    ):  # first, since differences and sums of larger values could overflow
        raise FileRefused(f"indptr goes from {indptr.min()} to {indptr.max()}, and there are {len(data)} values")
    if indptr[:, 0].any() or (np.diff(indptr) < 0).any() or indptr[:, -1].sum() != len(data):
        raise FileRefused(f"indptr does not split {len(data)} values into rows")
    if len(indices) and not (indices.min() >= 0 and indices.max() < n):
        raise FileRefused(f"indices go from {indices.min()} to {indices.max()}; columns go from 0 to {n - 1}")
    return arrays | {"indices": indices, "indptr": indptr}


def _unpack(arrays: dict[str, Any], index: int) -> tuple[Any, Array]:
    indptr = arrays["indptr"]  # [N, n + 1]
    begin = int(indptr[:index, -1].sum())
    part = slice(begin, begin + int(indptr[index, -1]))
    n = indptr.shape[1] - 1
    A = sparse.csr_array((arrays["data"][part], arrays["indices"][part], indptr[index]), shape=(n, n))
    return A, arrays["b"][index]


def _files(path: Path, letter: str, suffixes: tuple[str, ...]) -> list[Path]:
    """Return the files of a folder that begin with this letter and a number, sorted by it."""
    pattern = re.compile(rf"{letter}[-_]?(\d*)({'|'.join(map(re.escape, suffixes))})")
    found = [(int(match[1] or 0), file) for file in path.iterdir() if (match := pattern.fullmatch(file.name))]
    return [file for _, file in sorted(found)]


def _digest(*arrays: Array) -> str:
    state = hashlib.blake2b(digest_size=16)
    for array in arrays:
        if array.dtype.kind == "i":
            array = array.astype(np.int64)  # SciPy's index type depends on the size and origin of the matrix
        state.update(np.ascontiguousarray(array).tobytes())
    return state.hexdigest()
