"""Arrays with a row for each system, which are drawn, read and written a few rows at a time: all may not fit in memory.

Rows of a file are read and written as a file, not through a memory map, whose pages would count as memory in use.
"""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
BYTES = 2**26  # of the rows that are in memory at once; a single row may be larger


class LazyRows:
    """An array [N, ...] whose rows are computed on access and never kept.

    Args:
        draw: computes a row from its index; must be picklable for other processes.
        shape: the shape [N, ...].
    """

    dtype = np.dtype(np.float64)

    def __init__(self, draw: Callable[[int], Array], shape: tuple[int, ...]) -> None:
        self.draw, self.shape, self.ndim = draw, shape, len(shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Array:
        """Return a row by its index, or several by a slice or an array of indices."""
        indices = np.arange(len(self))[index]
        if indices.ndim == 0:
            return self.draw(int(indices))
        rows = np.empty((len(indices), *self.shape[1:]))
        for row, each in zip(rows, indices, strict=True):
            row[...] = self.draw(int(each))
        return rows

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return self[:].astype(self.dtype if dtype is None else dtype, copy=False)


Rows = Array | LazyRows


def tiles(rows: Rows) -> list[slice]:
    """Return slices of consecutive rows that need at most :data:`BYTES`, but have a row at least.

    Args:
        rows: the array [N, ...].
    """
    step = max(1, BYTES // max(1, rows.dtype.itemsize * math.prod(rows.shape[1:])))
    return [slice(first, first + step) for first in range(0, len(rows), step)]


class MatrixFile:
    """A matrix [N, n] in a .npy file, of which one row at a time is in memory.

    Args:
        file: the file.
        shape: the shape [N, n] of a new file; None opens an existing one.
    """

    def __init__(self, file: Path, shape: tuple[int, int] | None = None) -> None:
        mapped = np.lib.format.open_memmap(file, "r" if shape is None else "w+", np.float64, shape)
        self.file, self.offset, self.columns = file, mapped.offset, mapped.shape[1]

    def __getitem__(self, index: int) -> Array:
        with self.file.open("rb") as file:
            file.seek(self._position(index))
            return np.fromfile(file, np.float64, self.columns)

    def __setitem__(self, index: int, row: Array) -> None:
        with self.file.open("r+b") as file:
            file.seek(self._position(index))
            file.write(row.astype(np.float64).data)

    def sync(self) -> None:
        """Wait until what has been written is on the disk."""
        with self.file.open("r+b") as file:
            os.fsync(file.fileno())

    def _position(self, index: int) -> int:
        return self.offset + index * self.columns * np.dtype(np.float64).itemsize


@dataclass(frozen=True)
class Parts:
    """An array that is written part by part.

    Attributes:
        shape: its shape.
        dtype: its type.
        parts: its values in order, in parts of any shape.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    parts: Iterable[NDArray[Any]]

    @classmethod
    def of(cls, rows: Rows) -> Parts:
        """Divide an array into :func:`tiles`."""
        return cls(rows.shape, rows.dtype, (rows[tile] for tile in tiles(rows)))


def write_npz(path: str | Path, arrays: Mapping[str, Any], compression: int = zipfile.ZIP_STORED) -> None:
    """Write arrays by name, as ``numpy.savez`` and ``numpy.savez_compressed`` do.

    Args:
        path: the file.
        arrays: each an array, or :class:`Parts` of one.
        compression: of :mod:`zipfile`.
    """
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                if isinstance(array, Parts):
                    header = {"descr": array.dtype.str, "fortran_order": False, "shape": array.shape}
                    np.lib.format.write_array_header_1_0(file, header)
                    for part in array.parts:
                        file.write(np.ascontiguousarray(part, array.dtype).data)
                else:
                    np.lib.format.write_array(file, np.asanyarray(array), allow_pickle=False)


def iterate(rows: Rows) -> Iterator[tuple[slice, Array]]:
    """Yield the :func:`tiles` of an array with their rows."""
    return ((tile, rows[tile]) for tile in tiles(rows))
