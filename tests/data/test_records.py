"""Records of text files: how they are parted, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from lamella.data import InputContext, Records, SampledRecords, TextRecord, read_records
from lamella.errors import CalibrationError
from lamella.zoo import open_tokenizer

NANO_LLAMA = Path(__file__).parents[1] / "models" / "nano-llama"
READER = InputContext(lambda: open_tokenizer(NANO_LLAMA))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "one\ntwo\n\n three\n\n\nfour \n", [TextRecord("one\ntwo"), TextRecord("three"), TextRecord("four")]),
        ("a.txt", "one\ntwo\nthree", [TextRecord("one"), TextRecord("two"), TextRecord("three")]),
        ("a.jsonl", '{"text": "one"}\n\n"two"\n', [TextRecord("one"), TextRecord("two")]),
        ("a.jsonl", '{"question": "why?", "answer": "so"}', [TextRecord("so", "why?")]),
        (
            "a.jsonl",
            '{"instruction": "add", "input": "1 2", "output": "3"}\n{"prompt": "p", "response": "r", "input": ""}',
            [TextRecord("3", "add\n1 2\n"), TextRecord("r", "p")],
        ),
    ],
)
def test_records_are_read_in_their_order(name: str, content: str, expected: list[TextRecord], tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    assert read_records(tmp_path / name) == expected


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", "", "holds no records"),
        ("a.txt", " \n\n ", "holds no records"),
        ("a.jsonl", "\n", "holds no records"),
        ("a.jsonl", '{"text": "one"}\n{"text"', "line 2 is not JSON"),
        ("a.jsonl", '{"prompt": "one"}', "line 1 holds no text"),
        ("a.jsonl", '{"text": " "}', "line 1 holds no text"),
        ("a.jsonl", "3", "line 1 holds no text"),
        ("a.txt", b"\xff\xfe", "cannot be read as UTF-8"),
        ("a.txt", None, "cannot be read as UTF-8"),
    ],
)
def test_what_holds_no_records_is_refused_in_one_line(
    name: str, content: str | bytes | None, said: str, tmp_path: Path
) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CalibrationError, match=said) as error:
        read_records(file)
    assert "\n" not in str(error.value)


@pytest.fixture
def paragraphs(tmp_path: Path) -> Path:
    file = tmp_path / "book.txt"
    file.write_text("\n\n".join(f"This is paragraph number {number} of a book." for number in range(50)))
    return file


def test_records_that_stand_for_more_are_drawn_from_a_plain_text(paragraphs: Path, tmp_path: Path) -> None:
    every = Records.open(paragraphs, READER, sequences=8)
    some = SampledRecords.open(paragraphs, READER, sequences=8)
    assert (len(every), len(some)) == (50, 8)
    ids = [sample["input_ids"].tolist() for sample in every]
    places = [ids.index(sample["input_ids"].tolist()) for sample in some]
    assert places == sorted(set(places)) and max(places) > 8  # from all over the text
    assert (some.describe()["records"], some.describe()["of"]) == (8, 50) and "of" not in every.describe()
    again = SampledRecords.open(paragraphs, READER, sequences=8)
    assert [each["input_ids"].tolist() for each in again] == [each["input_ids"].tolist() for each in some]
    assert len(SampledRecords.open(paragraphs, READER, sequences=64)) == 50
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(f'{{"text": "This is record number {number}."}}' for number in range(50)))
    assert len(SampledRecords.open(rows, READER, sequences=8)) == 50
