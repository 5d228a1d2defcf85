"""Loading of NumPy files from untrusted sources.

The header of an array declares a shape and a type, and the directory of an archive declares sizes. NumPy trusts both
and allocates what they declare, so they are compared with the size of the file before anything is read.
"""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from lamella.reading import FileRefused, check_expansion, open_file

Array = NDArray[Any]
KINDS = "biufcSU"  # booleans, numbers and text; no pickled objects, no records
SUFFIX = ".npy"  # of an array in an archive
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def read_npz(path: Path) -> dict[str, Array]:
    """Read the arrays of a .npz archive by their names.

    Args:
        path: the archive.

    Raises:
        FileRefused: if the file is missing or damaged, or declares more than the maximum size.
    """
    with _one_error(), open_file(path) as file, zipfile.ZipFile(file) as archive:
        members = [each for each in archive.infolist() if each.filename.endswith(SUFFIX)]
        check_expansion(_size(file), sum(each.file_size for each in members))
        arrays = {}
        for each in members:
            with archive.open(each) as member:
                arrays[each.filename.removesuffix(SUFFIX)] = _read(member, each.file_size)
        return arrays


def read_npy(path: Path) -> Array:
    """Read the array of a .npy file.

    Args:
        path: the file.

    Raises:
        FileRefused: if the file is missing or damaged, or declares more than it contains.
    """
    with _one_error(), open_file(path) as file:
        return _read(file, _size(file))


def _size(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_size


@contextmanager
def _one_error() -> Iterator[None]:
    try:
        yield
    except FileRefused:
        raise
    except Exception as error:  # zipfile, zlib and NumPy raise a dozen types for damaged files
        raise FileRefused(getattr(error, "strerror", None) or str(error) or type(error).__name__) from None


def _read(file: Any, size: int) -> Array:
    """Read an array from an open file, or from an open archive member, of ``size`` bytes."""
    read_header = HEADERS.get(np.lib.format.read_magic(file))
    if read_header is None:
        raise FileRefused("its header has another version than 1.0 or 2.0")
    shape, _, dtype = read_header(file)
    if dtype.hasobject:
        raise FileRefused("pickled objects are not loaded")
    if dtype.kind not in KINDS or dtype.itemsize == 0:
        raise FileRefused(f"arrays of {dtype} are not read")
    if any(length < 0 for length in shape) or math.prod(shape) * dtype.itemsize != size - file.tell():
        raise FileRefused(f"its header declares {shape} values of {dtype}, and {size - file.tell()} bytes follow")
    file.seek(0)
    return np.lib.format.read_array(file, allow_pickle=False)
