"""Documents from files as people hold them, and an account of what could not be read."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import socket
import tracemalloc
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from lamella import reading
from lamella.data import Document, Documents, InputContext, hold_out
from lamella.errors import CalibrationError

ROWS = [{"id": "one", "text": "A first text.\u2028Still the first."}, {"text": "A second text.", "url": "x"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
TEXTS = [row["text"] for row in ROWS]


def opened(place: Path, **settings: object) -> Documents:
    return Documents.open(place, InputContext(), **settings)


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
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
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
    assert [place.split(" line ")[1].split(" ", 1)[0] for place in found.broken.examples] == ["2", "3", "4", "5", "6"]
    (note,) = found.broken.note()
    assert (
        note.startswith("5 documents could not be read") and f"{file} line 2 is not JSON" in note and "\n" not in note
    )
    assert found.describe()["left out"] == 5


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("rows.jsonl", b"{}\n", "holds no documents: .*line 1 has no text in 'text'"),
        ("rows.jsonl.gz", gzip.compress(LINES * 50, mtime=0)[:60], "cannot be read after line"),
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


@pytest.mark.parametrize("name", ["link.txt", "link.jsonl", "link.parquet", "sub"])
def test_a_link_in_a_folder_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    secret = tmp_path / "elsewhere" / f"secret{Path(name).suffix}"
    secret.write_text("a secret")
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text("A text.")
    (folder / "deep" / name).symlink_to(secret if "." in name else secret.parent)
    with pytest.raises(CalibrationError, match=f"deep/{name}: links in a folder are not followed"):
        opened(folder)


def test_a_link_that_is_named_is_followed(tmp_path: Path) -> None:
    (tmp_path / "link.jsonl").symlink_to(written(tmp_path, ".jsonl"))
    assert [each.text for each in opened(tmp_path / "link.jsonl")] == TEXTS


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "a.jsonl"
    with socket.socket(socket.AF_UNIX) as listening:
        os.mkfifo(place) if kind == "pipe" else listening.bind(str(place))
        with pytest.raises(CalibrationError, match=r"a\.jsonl: is not a regular file"):
            opened(tmp_path)
        with pytest.raises(CalibrationError, match=r"a\.jsonl"):
            opened(place)


OPENERS = {".jsonl": open, ".jsonl.gz": gzip.open, ".jsonl.bz2": bz2.open, ".jsonl.xz": lzma.open, ".txt": open}
OPENERS[".jsonl.zst"] = lambda file, mode: pyarrow.CompressedOutputStream(pyarrow.OSFile(str(file), mode), "zstd")


@pytest.mark.parametrize("ending", [each for each in OPENERS if each != ".txt"])
@pytest.mark.parametrize("line", [b"x" * 2**20, b'{"text": "' + b"a" * 1000 + b'"}\n'], ids=["one line", "many lines"])
def test_a_file_that_expands_to_far_more_than_it_is_is_refused(
    tmp_path: Path, ending: str, line: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "ALWAYS_ALLOWED", 2**22)
    monkeypatch.setattr("lamella.data.documents.LONGEST", 2**21)
    with OPENERS[ending](tmp_path / f"bomb{ending}", "wb") as file:
        for _ in range(2**24 // len(line)):
            file.write(line)
    limit = "line 1 has more than" if line[:1] == b"x" else "bytes expand to"
    if ending == ".jsonl" and line[:1] != b"x":  # what is not compressed may be as large as it is
        assert len(opened(tmp_path / "bomb.jsonl")) > 10_000
        return
    tracemalloc.start()
    with pytest.raises(CalibrationError, match=limit) as error:
        opened(tmp_path / f"bomb{ending}")
    assert tracemalloc.get_traced_memory()[1] < 2**25
    tracemalloc.stop()
    assert "\n" not in str(error.value)


def test_a_document_that_is_too_long_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lamella.data.documents.LONGEST", 100)
    (tmp_path / "a.txt").write_text("long " * 30)
    (tmp_path / "b.txt").write_text("short")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"text": "long " * 30}]), tmp_path / "c.parquet")
    found = opened(tmp_path)
    assert [each.text for each in found] == ["short"] and found.broken.count == 2
    assert "a.txt has more than 33,554,432 characters" in found.broken.note()[0]


FOREIGN: dict[str, pyarrow.Array] = {
    "invalid UTF-8": pyarrow.array([b"\xff\xfe", b"\x80"]).cast(pyarrow.binary()).view(pyarrow.string()),
    "a date": pyarrow.array([2**31 - 1, -(2**31)], pyarrow.int32()).view(pyarrow.date32()),
    "a time": pyarrow.array([2**63 - 1, -(2**63)]).view(pyarrow.timestamp("us")),
    "an unknown time zone": pyarrow.array([0, 1]).view(pyarrow.timestamp("us", tz="Nowhere/Atlantis")),
    "a duration": pyarrow.array([2**63 - 1, -(2**63)]).view(pyarrow.duration("s")),
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("column", ["other", "id"])
def test_columns_of_a_parquet_file_that_are_not_needed_are_not_decoded(tmp_path: Path, name: str, column: str) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS, column: FOREIGN[name]}), tmp_path / "rows.parquet")
    found = opened(tmp_path / "rows.parquet")
    assert [each.text for each in found] == TEXTS and [each.id for each in found] == [
        "rows.parquet:1",
        "rows.parquet:2",
    ]


@pytest.mark.parametrize("name", FOREIGN)
def test_a_text_column_that_holds_no_text_is_named_row_by_row(tmp_path: Path, name: str) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": FOREIGN[name]}), tmp_path / "a.parquet")
    (tmp_path / "b.txt").write_text("A text.")
    found = opened(tmp_path)
    assert len(found) == 1 and found.broken.count == 2
    assert found.broken.examples[0].endswith("a.parquet line 1 has no text in 'text'")


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string()])
def test_texts_and_ids_of_every_type_are_read_from_parquet(tmp_path: Path, kind: pyarrow.DataType) -> None:
    table = pyarrow.table({"id": pyarrow.array([7, None]), "text": pyarrow.array(TEXTS, kind)})
    for version, data in enumerate((table, table.set_column(1, "text", table["text"].dictionary_encode()))):
        pyarrow.parquet.write_table(data, file := tmp_path / f"{version}.parquet")
        assert [(each.id, each.text) for each in opened(file)] == [("7", TEXTS[0]), (f"{file.name}:2", TEXTS[1])]


def test_a_parquet_file_whose_rows_repeat_one_long_text_is_refused(tmp_path: Path) -> None:
    texts = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 2000, pyarrow.int32()), ["x" * 2**20])
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "rows.parquet", compression="zstd")
    assert (tmp_path / "rows.parquet").stat().st_size < 2**16
    tracemalloc.start()
    with pytest.raises(CalibrationError, match=r"cannot be read after row \d+ \(its [\d,]+ bytes expand to"):
        opened(tmp_path / "rows.parquet")
    assert tracemalloc.get_traced_memory()[1] < 2**25
    tracemalloc.stop()


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
    calibration, test = (Documents.open("pydoc", InputContext(split=split)) for split in ("calibration", "test"))
    long = [{each.text for each in split if len(each.text) > 100} for split in (calibration, test)]
    assert len(long[0]) > 20 and not long[0] & long[1]  # a "See also:" may stand in both


def test_who_is_held_out_depends_on_names_alone() -> None:
    documents = [Document(str(number), f"text {number}") for number in range(40)]
    learnt, held_out = hold_out(documents, 0.25, seed=0)
    assert len(held_out) == 10 and sorted([*learnt, *held_out]) == sorted(documents)
    again = hold_out(documents[::-1], 0.25, seed=0)[1]
    assert set(again) == set(held_out) and set(hold_out(documents, 0.25, seed=1)[1]) != set(held_out)
    assert hold_out(documents, 0.0, seed=0) == (documents, []) and len(hold_out(documents[:2], 0.01, seed=0)[1]) == 1
