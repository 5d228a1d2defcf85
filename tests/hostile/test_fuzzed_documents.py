"""Untrusted documents and images in formats of other programs: each is read, or rejected in one line that names it."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from strategies import answered, damaged, dumped, mutated, parquet_file, parquet_files, share

from lamella.data import CaptionedImages, Documents, InputContext
from lamella.errors import LamellaError
from lamella.methods.agile3d.scenes import Scenes
from lamella.methods.muranet.plans import FloorPlans, Folder

LINES = b"".join(json.dumps({"id": str(n), "text": f"Text {n}."}).encode() + b"\n" for n in range(3))
COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pyarrow.compress(data, "zstd", asbytes=True),
}
ROWS: list[dict[str, Any]] = [{"id": "one", "text": "A text."}, {"id": None, "text": "Another text."}]
METADATA: list[dict[str, Any]] = [{"file_name": f"{n}.png", "text": f"image {n}"} for n in range(2)]
COCO: dict[str, Any] = {
    "images": [{"id": 7, "file_name": "0.png"}, {"id": 8, "file_name": "1.png"}],
    "categories": [{"id": 1, "name": "door"}, {"id": 2, "name": "window"}],
    "annotations": [{"image_id": 7, "category_id": 1, "bbox": [1, 1, 4, 4]}],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images, next to a secret file."""
    around = tmp_path_factory.mktemp("documents")
    made = around / "folder"
    made.mkdir()
    for place in (around / "canary", around / "canary.png", made / "0.png", made / "1.png"):
        Image.fromarray(np.zeros((12, 12, 3), np.uint8)).save(place, "png")
    return made


def documents(file: Path) -> Documents:
    try:
        found = Documents.open(file, InputContext())
    except LamellaError as error:
        assert str(file) in str(error)
        raise
    for each in found:
        assert each.text.strip() and each.id.encode().decode() == each.id
    return found


@pytest.mark.parametrize("ending", COMPRESSORS)
@given(data=st.data())
def test_a_compressed_file_of_documents_is_read_or_refused(folder: Path, ending: str, data: st.DataObject):
    content = data.draw(st.one_of(st.just(LINES), st.just(LINES).flatmap(damaged)))
    whole = COMPRESSORS[ending](content)
    place = folder / f"rows.jsonl{ending}"
    place.write_bytes(data.draw(st.one_of(st.just(whole).flatmap(damaged), st.just(whole))))
    with answered(folder, gigabytes=1):
        documents(place)


@pytest.mark.parametrize("line", [b"x" * 2**16, b'{"text": "' + b"a" * 4000 + b'"}\n'], ids=["one line", "many lines"])
@pytest.mark.parametrize("ending", COMPRESSORS)
def test_a_file_that_expands_a_thousandfold_is_refused_in_little_memory(folder: Path, ending: str, line: bytes):
    (folder / f"bomb.jsonl{ending}").write_bytes(COMPRESSORS[ending](line * (2**27 // len(line))))
    with answered(folder, gigabytes=2), pytest.raises(LamellaError, match=r"line 1 has more than|expand to"):
        Documents.open(folder / f"bomb.jsonl{ending}", InputContext())


@pytest.mark.parametrize("name", ["scene.ply", "plan.png"])
def test_a_link_in_a_folder_of_scenes_or_plans_is_refused(tmp_path: Path, name: str):
    (tmp_path / "folder").mkdir()
    (tmp_path / "canary").write_bytes(b"ply\n")
    (tmp_path / "folder" / name).symlink_to(tmp_path / "canary")
    with answered(tmp_path / "folder"), pytest.raises(LamellaError, match="links in a folder are not followed"):
        (Scenes if name == "scene.ply" else FloorPlans).open(tmp_path / "folder", InputContext())


@example(content=parquet_file({"text": pyarrow.array([b"\xff"]).cast(pyarrow.binary()).view(pyarrow.string())}))
@given(content=parquet_files(ROWS))
def test_a_parquet_file_of_documents_is_read_or_refused(folder: Path, content: bytes):
    (folder / "rows.parquet").write_bytes(content)
    with answered(folder, gigabytes=2):
        documents(folder / "rows.parquet")


@example(rows=[{"file_name": "a\0b.png"}])
@example(rows=[{"file_name": "x" * 5000}])
@given(rows=st.lists(st.sampled_from(METADATA).flatmap(mutated), min_size=1, max_size=3))
def test_captions_of_images_are_read_or_refused(folder: Path, rows: list[Any]):
    lines = "\n".join(dumped(row).replace("\n", " ") for row in rows)
    (folder / "metadata.jsonl").write_bytes(lines.encode("utf-8", "surrogatepass"))
    with answered(folder):
        CaptionedImages.open(folder, InputContext())


@example(document=COCO | {"images": [{"id": 7, "file_name": "a\0b.png"}]})
@example(document=COCO | {"images": [{"id": 7, "file_name": "x" * 5000}]})
@given(document=st.one_of(mutated(COCO), mutated(COCO, most=1)))
def test_boxes_in_the_form_of_coco_are_read_or_refused(folder: Path, document: Any):
    (folder / "annotations.json").write_bytes(dumped(document).encode("utf-8", "surrogatepass"))
    with answered(folder):
        for each in Folder.open(folder, 4):
            assert each.boxes is None or np.isfinite(each.boxes).all()


PNG = (np.arange(8 * 8 * 3).reshape(8, 8, 3) % 256).astype(np.uint8)


@share(2)
@given(kind=st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "WEBP"]), data=st.data())
def test_an_image_is_read_or_refused(folder: Path, kind: str, data: st.DataObject):
    place = folder / "image"
    place.mkdir(exist_ok=True)
    Image.fromarray(PNG).save(place / "0.png", kind)
    (place / "0.png").write_bytes(data.draw(damaged((place / "0.png").read_bytes())))
    with answered(folder, gigabytes=2):
        for each in CaptionedImages.open(place, InputContext(split="test")).items:
            assert each.image.ndim == 3


def test_the_files_that_are_damaged_above_are_whole(folder: Path):
    for ending, compress in COMPRESSORS.items():
        (folder / f"rows.jsonl{ending}").write_bytes(compress(LINES))
        assert len(documents(folder / f"rows.jsonl{ending}")) == 3
    (folder / "annotations.json").write_text(json.dumps(COCO))
    assert len(Folder.open(folder, 4)) == 2
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, METADATA)))
    assert len(CaptionedImages.open(folder, InputContext())) == 1
