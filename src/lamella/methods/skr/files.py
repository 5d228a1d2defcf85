"""Matrices and vectors from files, with all checks that compiled code relies on.

SciPy's routines follow the indices of a sparse matrix without checks: an index outside the matrix reads or writes
beyond an array.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from lamella.arrays import read_npy, read_npz
from lamella.errors import LamellaError
from lamella.reading import LONGEST, FileRefused, may_expand_to, open_decompressed

Array = NDArray[np.float64]
COMPRESSED = ("csr", "csc", "bsr")  # formats with row or column pointers
WIDTHS = {"real": 3, "integer": 3, "pattern": 2}  # values per entry of a Matrix Market file
MIRRORED = {"general": None, "symmetric": 1, "skew-symmetric": -1}  # the sign of the mirrored entry


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Convert any error of a damaged file into one that names the file.

    Raises:
        LamellaError: for any error of the block.
    """
    try:
        yield
    except LamellaError:
        raise
    except Exception as error:  # SciPy and NumPy raise a dozen types for damaged files
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise LamellaError(f"{path}: not linear systems ({reason}); see LinearSystems.open for formats") from error


def read_matrix(path: Path) -> Any:
    """Read a matrix from a .npz file of SciPy, or from a Matrix Market file.

    Raises:
        LamellaError: if the file is invalid, or declares more than it holds.
    """
    with reading(path):
        return _of_scipy(read_npz(path)) if path.suffix == ".npz" else _matrix_market(path)


def read_dense(path: Path) -> Array:
    """Read an array, such as a right-hand side [n] or several as columns [n, N], from a .npy or a Matrix Market file.

    Raises:
        LamellaError: if the file is invalid, or declares more than it holds.
    """
    with reading(path):
        if path.suffix == ".npy":
            return check_numeric(read_npy(path), path.name)
        found = _matrix_market(path)
        if isinstance(found, np.ndarray):
            return found
        if found.shape[0] * found.shape[1] * found.dtype.itemsize > may_expand_to(path.stat().st_size):
            raise FileRefused(f"it declares {found.shape[0]} x {found.shape[1]} values and holds {found.nnz}")
        return found.toarray()


def check_numeric(array: Array, name: str) -> Array:
    """Return the array after a check of its type.

    Args:
        array: the array.
        name: its name for messages.

    Raises:
        FileRefused: if it contains text.
    """
    if array.dtype.kind in "SU":
        raise FileRefused(f"{name} contains text instead of numbers")
    return array


def _of_scipy(arrays: Mapping[str, Any]) -> Any:
    """Build a matrix from an archive of ``scipy.sparse.save_npz``."""
    if missing := {"format", "shape", "data"} - set(arrays):
        raise FileRefused(f"it has no '{min(missing)}', as scipy.sparse.save_npz writes")
    format_, shape, data = arrays["format"].item(), arrays["shape"].tolist(), check_numeric(arrays["data"], "data")
    kind = format_.decode() if isinstance(format_, bytes) else format_
    if (
        not isinstance(shape, list)
        or len(shape) != 2
        or not all(type(length) is int and length > 0 for length in shape)
    ):
        raise FileRefused(f"its shape is {shape}; give two sizes above 0")
    names = {"coo": ("row", "col"), "dia": ("offsets",)} | dict.fromkeys(COMPRESSED, ("indices", "indptr"))
    if kind not in names:
        raise FileRefused(f"its format is '{kind}'; give one of {', '.join(names)}")
    indices = [integers(arrays, name) for name in names[kind]]
    if kind == "dia" and ((indices[0] < -shape[0]) | (indices[0] > shape[1])).any():
        raise FileRefused("it has a diagonal outside of its shape")
    content = (data, tuple(indices)) if kind == "coo" else (data, *indices)
    return getattr(sparse, f"{kind}_array")(content, shape=shape)


def integers(arrays: Mapping[str, Any], name: str) -> NDArray[np.int64]:
    """Return an array of an archive as signed integers.

    Args:
        arrays: the arrays of the archive.
        name: the name of the array.

    Raises:
        FileRefused: if it is missing, not of integers, or has values that do not fit.
    """
    found = arrays.get(name)
    if found is None or found.dtype.kind not in "iu":
        raise FileRefused(f"it has no integers '{name}'")
    if found.size and int(found.max()) > np.iinfo(np.int64).max:
        raise FileRefused(f"its '{name}' are above {np.iinfo(np.int64).max}")
    return found.astype(np.int64)


def _matrix_market(path: Path) -> Any:
    """Read a sparse matrix, or a dense array, in the Matrix Market format.

    SciPy's own parser is compiled code that reads and writes beyond its arrays if a file is damaged.
    """
    with open_decompressed(path) as file, io.TextIOWrapper(file, "ascii", "replace") as text:
        banner = text.readline(LONGEST).lower().split()
        if banner[:2] != ["%%matrixmarket", "matrix"] or len(banner) != 5 or banner[2] not in ("coordinate", "array"):
            raise FileRefused("it does not begin with a '%%MatrixMarket matrix' header")
        _, _, form, field, symmetry = banner
        if field not in WIDTHS or symmetry not in MIRRORED:
            raise FileRefused(f"it is {field} and {symmetry}; give real values, general or symmetric")
        declared = next((line for line in text if line.strip() and not line.startswith("%")), "")
        sizes = [int(word) for word in declared.split()]
        if len(sizes) != (3 if form == "coordinate" else 2) or min(sizes) < 0:
            raise FileRefused(f"it declares the sizes '{declared.strip()[:60]}'")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # for a file without entries, which is checked below
            values = np.loadtxt(text, comments="%", ndmin=2)
    shape, sign = (sizes[0], sizes[1]), MIRRORED[symmetry]
    return (
        _coordinates(values, sizes[2], WIDTHS[field], shape, sign)
        if form == "coordinate"
        else _dense(values, shape, sign)
    )


def _coordinates(values: Array, entries: int, width: int, shape: tuple[int, int], sign: int | None) -> Any:
    """Build a sparse matrix from its entries, each with its row and column, counted from 1."""
    if len(values) != entries or (entries and values.shape[1] != width):
        raise FileRefused(f"it declares {entries} entries of {width} values, and holds {list(values.shape)}")
    values = values.reshape(-1, width)
    indices = values[:, :2]
    if not ((indices >= 1) & (indices <= shape) & (indices == np.round(indices))).all():
        raise FileRefused(f"it has an entry outside of its {shape[0]} x {shape[1]}")
    row, column = indices.T.astype(np.int64) - 1
    data = values[:, 2] if width == 3 else np.ones(entries)
    if sign is not None:
        off_diagonal = row != column
        row, column = np.concatenate([row, column[off_diagonal]]), np.concatenate([column, row[off_diagonal]])
        data = np.concatenate([data, sign * data[off_diagonal]])
    return sparse.coo_array((data, (row, column)), shape=shape)


def _dense(values: Array, shape: tuple[int, int], sign: int | None) -> Array:
    """Build an array from its values, column by column; of a symmetric one, those on and below the diagonal."""
    rows, columns = shape
    skipped = int(sign == -1)  # the diagonal of a skew-symmetric one is 0
    entries = rows * columns if sign is None else max(0, rows - skipped) * (rows + 1 - skipped) // 2
    if values.size != entries or (sign is not None and rows != columns):
        raise FileRefused(f"it declares {rows} x {columns} values, and holds {values.size}")
    if sign is None:
        return values.reshape(columns, rows).T
    found = np.zeros(shape)
    column, row = np.triu_indices(rows, skipped)
    found[column, row], found[row, column] = sign * values.ravel(), values.ravel()
    return found


def check_indices(matrix: Any, where: str) -> None:
    """Check that all indices of a sparse matrix are within its shape.

    Args:
        matrix: the matrix.
        where: its name for messages.

    Raises:
        LamellaError: if an index is out of range, or row pointers are not in order.
    """
    if matrix.format not in COMPRESSED:
        return
    try:
        matrix.check_format(full_check=True)
        if matrix.indptr.min() < 0 or matrix.indptr.max() > len(matrix.indices):  # SciPy's differences may overflow
            raise ValueError(f"index pointers go from {matrix.indptr.min()} to {matrix.indptr.max()}")
    except ValueError as error:
        raise LamellaError(f"{where}: its matrix is damaged ({error}); write it again") from None
