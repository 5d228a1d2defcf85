"""Files of linear systems that anyone may have written: sizes and indices are checked before they are followed."""

from __future__ import annotations

import gzip
import io
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sparse
from scipy.io import mmwrite

from lamella.errors import LamellaError
from lamella.methods.skr import LinearSystems

N, COUNT = 3, 2
WHOLE = {
    "data": np.arange(1.0, 1 + 3 * COUNT),
    "indices": np.tile(np.arange(N), COUNT),
    "indptr": np.tile(np.arange(N + 1), (COUNT, 1)),
    "b": np.ones((COUNT, N)),
    "parameters_0": np.arange(COUNT),
}
FAR = np.iinfo(np.int64).max


def changed(**arrays: Any) -> dict[str, Any]:
    return {name: array for name, array in (WHOLE | arrays).items() if array is not None}


ARCHIVES: dict[str, tuple[dict[str, Any], str]] = {
    "a column far beyond the matrix": (changed(indices=np.array([0, 1, 10**9, 0, 1, 2])), "columns go from 0 to 2"),
    "a column before the matrix": (changed(indices=np.array([0, 1, -(10**9), 0, 1, 2])), "columns go from 0 to 2"),
    "a column just beyond the matrix": (changed(indices=np.array([0, 1, 3, 0, 1, 2])), "columns go from 0 to 2"),
    "rows that end beyond the values": (changed(indptr=np.array([[0, 1, 2, 10**9]] * 2)), "and there are 6 values"),
    "rows that go back": (changed(indptr=np.array([[0, 3, 1, 3]] * 2)), "does not split 6 values into rows"),
    "rows whose differences overflow": (
        changed(b=np.ones((2, 4)), indptr=np.array([[0, FAR, -FAR - 1, -1, 3]] * 2)), "and there are 6 values"
    ),
    "rows of fewer values": (changed(indptr=np.array([[0, 1, 2, 2]] * 2)), "does not split 6 values into rows"),
    "pointers of one system": (changed(indptr=np.arange(N + 1)), "not [N, n] and [N, n + 1]"),
    "pointers that are fractions": (changed(indptr=WHOLE["indptr"] / 2), "no integers 'indptr'"),
    "no pointers": (changed(indptr=None), "no integers 'indptr'"),
    "no values": (changed(data=None), "no 'data'"),
    "text for values": (changed(data=np.array(["a"] * 6)), "'data' contains text"),
    "values as a matrix": (changed(data=np.ones((2, 3))), "not two vectors of one length"),
    "a scalar right-hand side": (changed(b=np.float64(1)), "b is []"),
    "one right-hand side": (changed(b=np.ones(N)), "b is [3]"),
    "no systems": (changed(b=np.ones((0, N)), indptr=np.ones((0, N + 1), int)), "b is [0, 3]"),
    "a scalar parameter": (changed(parameters_0=np.float64(1)), "a single value for 2 systems"),
    "a value that is not finite": (changed(data=np.array([1, 2, np.nan, 4, 5, 6])), "not finite"),
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHIVES)
def test_an_archive_whose_arrays_do_not_fit_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    arrays, message = ARCHIVES[name]
    np.savez(tmp_path / "systems.npz", **arrays)
    with pytest.raises(LamellaError, match=re.escape(message)) as caught:
        LinearSystems.open(tmp_path / "systems.npz")
    assert "\n" not in str(caught.value)


def test_the_archive_that_is_damaged_above_is_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "systems.npz", **WHOLE)
    assert [each.A.diagonal().tolist() for each in LinearSystems.open(tmp_path / "systems.npz")] == [
        [1, 2, 3],
        [4, 5, 6],
    ]


def header(shape: tuple[int, ...], kind: str = "<f8") -> bytes:
    """The beginning of a .npy file that declares this shape."""
    written = io.BytesIO()
    np.lib.format.write_array_header_1_0(written, {"descr": kind, "fortran_order": False, "shape": shape})
    return written.getvalue()


def archive(**members: bytes) -> bytes:
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(f"{name}.npy", content)
    return written.getvalue()


def whole() -> bytes:
    written = io.BytesIO()
    np.savez_compressed(written, **WHOLE)
    return written.getvalue()


def without_a_stream(content: bytes) -> bytes:
    """The same archive, the first member of which is no longer a zlib stream."""
    start = content.index(b"data.npy") + len(b"data.npy") + 20  # behind the name and the sizes of zip64
    return content[:start] + bytes([content[start] ^ 0xFF]) * 8 + content[start + 8 :]


FILES: dict[str, Callable[[], bytes]] = {
    "cut short": lambda: whole()[:200],
    "without its directory": lambda: whole()[:-30],
    "with a broken zlib stream": lambda: without_a_stream(whole()),
    "of a gigantic shape": lambda: archive(b=header((10**6, 10**6)), data=header((10**13,))),
    "of a negative shape": lambda: archive(b=header((-1, 3)) + bytes(24)),
    "of an expansion beyond any archive of numbers": lambda: archive(b=header((2**24,)) + bytes(2**27)),
}


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_archive_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "systems.npz").write_bytes(FILES[name]())
    with pytest.raises(LamellaError, match="not linear systems") as caught:
        LinearSystems.open(tmp_path / "systems.npz")
    assert "\n" not in str(caught.value)


def saved(matrix: Any, **arrays: Any) -> bytes:
    written = io.BytesIO()
    sparse.save_npz(written, matrix)
    np.savez(changed := io.BytesIO(), **dict(np.load(io.BytesIO(written.getvalue()))) | arrays)
    return changed.getvalue()


CSR = sparse.csr_array(np.diag([2.0, 3.0, 4.0]))
MATRICES: dict[str, Callable[[], bytes]] = {
    "csr, a column outside": lambda: saved(CSR, indices=np.array([0, 1, 10**9])),
    "csr, rows that go back": lambda: saved(CSR, indptr=np.array([0, 3, 1, 3])),
    "csr, rows whose differences overflow": lambda: saved(CSR, indptr=np.array([0, FAR, -FAR - 1, 3])),
    "csc, a row outside": lambda: saved(CSR.tocsc(), indices=np.array([0, 1, -7])),
    "bsr, a block outside": lambda: saved(CSR.tobsr((1, 1)), indices=np.array([0, 1, 10**8])),
    "coo, a row outside": lambda: saved(CSR.tocoo(), row=np.array([0, 1, 10**9])),
    "dia, a diagonal outside": lambda: saved(CSR.todia(), offsets=np.array([-(2**63)])),
    "coo, a gigantic shape": lambda: saved(CSR.tocoo(), shape=np.array([10**13, 10**13])),
    "a shape of one number": lambda: saved(CSR, shape=np.array(3)),
    "an unknown format": lambda: saved(CSR, format=b"dok"),
    "no format": lambda: archive(data=b""),
}


@pytest.mark.parametrize("name", MATRICES)
def test_a_matrix_of_a_folder_is_checked_too(tmp_path: Path, name: str) -> None:
    (tmp_path / "A.npz").write_bytes(MATRICES[name]())
    np.save(tmp_path / "b.npy", np.ones(3))
    with pytest.raises(LamellaError) as caught:
        LinearSystems.open(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["csr", "csc", "bsr", "coo", "dia"])
def test_every_format_of_scipy_is_read(tmp_path: Path, kind: str) -> None:
    sparse.save_npz(tmp_path / "A.npz", CSR.asformat(kind))
    np.save(tmp_path / "b.npy", np.ones(3))
    assert LinearSystems.open(tmp_path)[0].A.toarray().tolist() == CSR.toarray().tolist()


def test_a_system_that_is_reached_late_is_refused_by_its_file(tmp_path: Path) -> None:
    for number in range(2):
        sparse.save_npz(tmp_path / f"A{number}.npz", CSR)
        np.save(tmp_path / f"b{number}.npy", np.ones(3))
    systems = LinearSystems.open(tmp_path)
    (tmp_path / "A1.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(LamellaError, match=r"A1\.npz: not linear systems"):
        systems[1]


FULL = np.array([[2.0, 1, 0], [1, 3, 5], [0, 5, 4]])
KINDS: dict[str, tuple[Any, dict[str, str]]] = {
    "general": (sparse.coo_array(FULL), {"symmetry": "general"}),
    "symmetric": (sparse.coo_array(FULL), {"symmetry": "symmetric"}),
    "skew-symmetric": (sparse.coo_array(np.triu(FULL, 1) - np.tril(FULL, -1)), {"symmetry": "skew-symmetric"}),
    "integer": (sparse.coo_array(FULL.astype(int)), {}),
    "pattern": (sparse.coo_array((FULL > 0).astype(float)), {"field": "pattern"}),
    "dense": (FULL, {"symmetry": "general"}),
    "dense and symmetric": (FULL, {"symmetry": "symmetric"}),
    "dense and skew-symmetric": (np.triu(FULL, 1) - np.tril(FULL, -1), {"symmetry": "skew-symmetric"}),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("ending", [".mtx", ".mtx.gz"])
def test_every_kind_of_matrix_market_file_is_read_as_scipy_writes_it(tmp_path: Path, name: str, ending: str) -> None:
    matrix, how = KINDS[name]
    mmwrite(written := io.BytesIO(), matrix, comment="written by a test", precision=17, **how)
    content = written.getvalue()
    (tmp_path / f"A{ending}").write_bytes(gzip.compress(content) if ending.endswith(".gz") else content)
    np.save(tmp_path / "b.npy", np.ones(3))
    dense = matrix.toarray() if sparse.issparse(matrix) else matrix
    assert LinearSystems.open(tmp_path)[0].A.toarray().tolist() == dense.tolist()


HEAD = "%%MatrixMarket matrix"
MARKETS = {
    "more entries than bytes": f"{HEAD} coordinate real general\n3 3 9999999999\n1 1 1.0\n",
    "a dense matrix of terabytes": f"{HEAD} array real general\n1000000 1000000\n1.0\n",
    "a column outside": f"{HEAD} coordinate real general\n3 3 1\n1 7 1.0\n",
    "fewer entries than declared": f"{HEAD} coordinate real general\n3 3 2\n1 1 1.0\n",
    "entries of two numbers": f"{HEAD} coordinate real general\n3 3 1\n1 1\n",
    "a zero byte behind a number": f"{HEAD} coordinate real general\n3 3 1\n1 1 1.0\0\0\0",
    "more values than a symmetric matrix": f"{HEAD} array integer symmetric\n2 2\n1\n2\n3\n4\n5\n6\n",
    "half a row number": f"{HEAD} coordinate real general\n3 3 1\n1.5 1 1.0\n",
    "complex values": f"{HEAD} coordinate complex general\n3 3 1\n1 1 1.0 1.0\n",
    "words": f"{HEAD} coordinate real general\nthree by three\n",
    "nothing": "",
}


@pytest.mark.parametrize("name", MARKETS)
@pytest.mark.parametrize("ending", [".mtx", ".mtx.gz"])
def test_a_matrix_market_file_holds_what_its_header_declares(tmp_path: Path, name: str, ending: str) -> None:
    content = MARKETS[name].encode()
    (tmp_path / f"A{ending}").write_bytes(gzip.compress(content) if ending.endswith(".gz") else content)
    np.save(tmp_path / "b.npy", np.ones(3))
    with pytest.raises(LamellaError) as caught:
        LinearSystems.open(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_sparse_right_hand_side_of_terabytes_is_refused(tmp_path: Path) -> None:
    sparse.save_npz(tmp_path / "A.npz", CSR)
    (tmp_path / "b.mtx").write_text(f"{HEAD} coordinate real general\n1000000000000 1 1\n1 1 1.0\n")
    with pytest.raises(LamellaError, match="declares 1000000000000 x 1 values"):
        LinearSystems.open(tmp_path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "b.npy")
    sparse.save_npz(tmp_path / "A.npz", CSR)
    with pytest.raises(LamellaError, match="not a regular file"):
        LinearSystems.open(tmp_path)
