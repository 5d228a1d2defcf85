"""Documents from files as people hold them, and an account of what could not be read."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from lamella.data import Document, Documents, Reader, hold_out
from lamella.errors import CalibrationError

ROWS = [{"id": "one", "text": "A first text.\u2028Still the first."}, {"text": "A second text.", "url": "x"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
TEXTS = [row["text"] for row in ROWS]


def opened(place: Path, **settings: object) -> Documents:
    return Documents.open(place, Reader(), **settings)


def written(folder: Path, ending: str) -> Path:
    """The rows as a file of some kind."""
    file = folder / f"rows{ending}"
    if ending == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), file)
    elif ending == ".jsonl.zst":
        with pyarrow.CompressedOutputStream(pyarrow.OSFile(str(file), "wb"), "zstd") as out:
            out.write(LINES)
    else:
        opener = {".jsonl": open, ".jsonl.gz": gzip.open, ".jsonl.bz2": bz2.open, ".jsonl.xz": lzma.open}[ending]
        with opener(file, "wb") as out:
            out.write(LINES)
    return file


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.bz2", ".jsonl.xz", ".jsonl.zst", ".parquet"])
def test_every_kind_of_file_holds_the_same_documents(tmp_path: Path, ending: str) -> None:
    found = opened(written(tmp_path, ending))
    assert [each.text for each in found] == TEXTS
    assert [each.id for each in found] == ["one", f"rows{ending}:2"] and found.broken.count == 0


def test_a_folder_is_its_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "late.txt").write_text("A whole file.")
    (tmp_path / "a.md").write_text("Another one.")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    written(tmp_path / "b", ".jsonl.gz")
    found = opened(tmp_path)
    assert [each.id for each in found] == ["a.md", "b/late.txt", "one", "b/rows.jsonl.gz:2"]


def test_what_is_broken_is_named_by_file_and_line_counted_and_left_out(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    lines = [
        b'{"text": "good"}',
        b'{"text": ',
        b'{"text": "  "}',
        b'"no object"',
        b'{"text": 7}',
        b"\xff",
        b"",
        b'{"text": "last"}',
    ]
    file.write_bytes(b"\n".join(lines))
    found = opened(file)
    assert [each.text for each in found] == ["good", "last"] and found.broken.count == 5
    assert [place.split(" line ")[1].split(" ", 1)[0] for place in found.broken.places] == ["2", "3", "4", "5", "6"]
    (note,) = found.broken.note()
    assert (
        note.startswith("5 documents could not be read") and f"{file} line 2 is not JSON" in note and "\n" not in note
    )
    assert found.describe()["left out"] == 5


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("rows.jsonl", b"{}\n", "holds no documents: .*line 1 has no text in 'text'"),
        ("rows.jsonl.gz", gzip.compress(LINES * 50, mtime=0)[:60], "cannot be read behind line"),
        ("rows.parquet", b"PAR1 and no more", "cannot be read as Parquet"),
        ("rows.csv", b"text\na\n", "are read from .txt"),
        ("rows.jsonl", None, "no such file"),
    ],
)
def test_what_holds_no_documents_is_refused_in_one_line(
    tmp_path: Path, name: str, content: bytes | None, said: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=said) as error:
        opened(tmp_path / name)
    assert "\n" not in str(error.value) and name in str(error.value)


def test_a_folder_without_documents_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="has no documents"):
        opened(tmp_path)


def test_ids_that_come_twice_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"id": 1, "text": "a"}\n' * 3)
    assert [each.id for each in opened(tmp_path / "rows.jsonl")] == ["1", "1#2", "1#3"]


def test_another_column_and_a_limit(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"content": "a"}\n{"content": "b"}\n')
    assert [each.text for each in opened(tmp_path / "rows.jsonl", column="content", limit=1)] == ["a"]


def test_built_in_texts_are_documents_of_one_split() -> None:
    calibration, test = (Documents.open("pydoc", Reader(split=split)) for split in ("calibration", "test"))
    long = [{each.text for each in split if len(each.text) > 100} for split in (calibration, test)]
    assert len(long[0]) > 20 and not long[0] & long[1]  # a "See also:" may stand in both


def test_who_is_held_out_depends_on_names_alone() -> None:
    documents = [Document(str(number), f"text {number}") for number in range(40)]
    learnt, held_out = hold_out(documents, 0.25, seed=0)
    assert len(held_out) == 10 and sorted([*learnt, *held_out]) == sorted(documents)
    again = hold_out(documents[::-1], 0.25, seed=0)[1]
    assert set(again) == set(held_out) and set(hold_out(documents, 0.25, seed=1)[1]) != set(held_out)
    assert hold_out(documents, 0.0, seed=0) == (documents, []) and len(hold_out(documents[:2], 0.01, seed=0)[1]) == 1
