"""Untrusted arrays, matrices and point clouds: each is read, or rejected in one line."""

from __future__ import annotations

import gzip
import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sparse
from hypothesis import given
from hypothesis import strategies as st
from scipy.io import mmwrite
from strategies import answered, damaged, point_clouds, zip_archives

from lamella.methods.agile3d.ply import read_ply
from lamella.methods.hourglass_mlp import Vectors
from lamella.methods.skr import LinearSystems

MATRIX = sparse.csr_array(np.diag([2.0, 3.0, 4.0]))
SYSTEMS: dict[str, Any] = {
    "data": np.arange(1.0, 7.0),
    "indices": np.tile(np.arange(3), 2),
    "indptr": np.tile(np.arange(4), (2, 1)),
    "b": np.ones((2, 3)),
    "parameters_0": np.arange(2.0),
}
PAIRS: dict[str, Any] = {"x": np.arange(80.0).reshape(40, 2), "y": np.full((40, 1), 0.5)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("arrays") / "folder"
    made.mkdir()
    return made


@st.composite
def changed(draw: st.DrawFn, arrays: dict[str, Any]) -> dict[str, Any]:
    """Draw almost valid arrays: of another shape or type, or with unexpected values."""
    arrays = dict(arrays)
    for name in draw(st.lists(st.sampled_from(sorted(arrays)), min_size=1, max_size=2)):
        old = np.asarray(arrays[name])
        kind = draw(st.sampled_from(["gone", "value", "type", "shape", "cut", "more"]))
        if kind == "gone":
            del arrays[name]
            return arrays
        if kind == "value" and old.size and old.dtype.kind in "iuf":
            new = old.copy() if old.dtype.kind == "f" else old.astype(np.int64)
            index = draw(st.integers(0, new.size - 1))
            floats = st.floats(allow_subnormal=False)
            whole = st.sampled_from([-(2**63), -(10**9), -1, 0, 1, 2, 3, 4, 5, 10**9, 2**31, 2**63 - 1])
            new.flat[index] = draw(floats if new.dtype.kind == "f" else whole)
            arrays[name] = new
        elif kind == "type" and old.dtype.kind in "iuf":
            types = ["?", "i1", "u2", "i8", "u8", "f2", "f4", "f8", "g", "c16", "S4", "U3", "M8[s]", "m8[s]", "V3", "O"]
            with np.errstate(all="ignore"):
                arrays[name] = old.astype(draw(st.sampled_from(types)))
        elif kind == "shape":
            shapes = [old.ravel(), old[None], old[..., None], old.ravel()[:1].reshape(-1)[:0], old.T, np.array(1)]
            arrays[name] = draw(st.sampled_from(shapes))
        elif kind == "cut" and old.ndim:
            arrays[name] = old[: draw(st.integers(0, len(old)))]
        else:
            arrays[name] = np.concatenate([np.atleast_1d(old)] * 2)
    return arrays


def archive(arrays: dict[str, Any], save: Any = np.savez) -> bytes:
    written = io.BytesIO()
    save(written, **arrays)
    return written.getvalue()


def archives(arrays: dict[str, Any]) -> st.SearchStrategy[bytes]:
    """Draw archives of arrays with invalid contents, false declarations, or damage."""
    whole = archive(arrays, np.savez_compressed)
    return st.one_of(
        changed(arrays).map(archive), changed(arrays).map(archive), st.just(whole).flatmap(damaged), zip_archives(whole)
    )


@given(content=archives(SYSTEMS))
def test_an_archive_of_systems_is_read_or_refused(folder: Path, content: bytes):
    (folder / "systems.npz").write_bytes(content)
    with answered(folder, gigabytes=1):
        for each in LinearSystems.open(folder / "systems.npz"):
            assert np.isfinite(each.A @ each.b).all() or each.A.nnz  # what compiled code follows lies inside


@given(content=archives(PAIRS))
def test_an_archive_of_vectors_is_read_or_refused(folder: Path, content: bytes):
    (folder / "pairs.npz").write_bytes(content)
    with answered(folder, gigabytes=1):
        found = Vectors.open(str(folder / "pairs.npz"))
        assert np.isfinite(found.train.x.numpy()).all()


def saved(matrix: Any) -> dict[str, Any]:
    written = io.BytesIO()
    sparse.save_npz(written, matrix)
    with np.load(io.BytesIO(written.getvalue())) as held:
        return dict(held)


@pytest.mark.parametrize("kind", ["csr", "csc", "bsr", "coo", "dia"])
@given(data=st.data())
def test_a_matrix_of_scipy_is_read_or_refused(folder: Path, kind: str, data: st.DataObject):
    directory = folder / kind
    directory.mkdir(exist_ok=True)
    (directory / "A.npz").write_bytes(data.draw(archives(saved(MATRIX.asformat(kind)))))
    np.save(directory / "b.npy", np.ones(3))
    with answered(folder, gigabytes=1):
        system = LinearSystems.open(directory)[0]
        assert (system.A @ system.b).shape == (3,)


MARKET = io.BytesIO()
mmwrite(MARKET, sparse.csr_array(np.diag([2.0, 3.0, 4.0]) + np.eye(3, k=1)))


@pytest.mark.parametrize("ending", [".mtx", ".mtx.gz"])
@given(data=st.data())
def test_a_matrix_market_file_is_read_or_refused(folder: Path, ending: str, data: st.DataObject):
    directory = folder / f"market{ending}"
    directory.mkdir(exist_ok=True)
    content = data.draw(st.just(MARKET.getvalue()).flatmap(damaged))
    if ending.endswith(".gz"):
        content = data.draw(
            st.one_of(st.just(gzip.compress(content)), st.just(gzip.compress(content)).flatmap(damaged))
        )
    (directory / f"A{ending}").write_bytes(content)
    np.save(directory / "b.npy", np.ones(3))
    with answered(folder, gigabytes=1):
        system = LinearSystems.open(directory)[0]
        assert (system.A @ system.b).shape == (3,)


@given(content=point_clouds())
def test_a_point_cloud_is_read_or_refused(folder: Path, content: bytes):
    (folder / "scene.ply").write_bytes(content)
    with answered(folder, gigabytes=1):
        scene = read_ply(folder / "scene.ply")
        assert np.isfinite(scene.coords).all() and np.isfinite(scene.colours).all()


def test_the_files_that_are_damaged_above_are_whole(folder: Path):
    (folder / "systems.npz").write_bytes(archive(SYSTEMS))
    (folder / "pairs.npz").write_bytes(archive(PAIRS))
    assert len(LinearSystems.open(folder / "systems.npz")) == 2 and len(Vectors.open(str(folder / "pairs.npz")).train)
    with zipfile.ZipFile(folder / "systems.npz") as whole:
        assert whole.testzip() is None
