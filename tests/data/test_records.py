"""Records of text files: how they are parted, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from lamella.data import Piece, read_records
from lamella.errors import CalibrationError


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "one\ntwo\n\n three\n\n\nfour \n", [Piece("one\ntwo"), Piece("three"), Piece("four")]),
        ("a.txt", "one\ntwo\nthree", [Piece("one"), Piece("two"), Piece("three")]),
        ("a.jsonl", '{"text": "one"}\n\n"two"\n', [Piece("one"), Piece("two")]),
        ("a.jsonl", '{"question": "why?", "answer": "so"}', [Piece("so", "why?")]),
        (
            "a.jsonl",
            '{"instruction": "add", "input": "1 2", "output": "3"}\n{"prompt": "p", "response": "r", "input": ""}',
            [Piece("3", "add\n1 2\n"), Piece("r", "p")],
        ),
    ],
)
def test_records_are_read_in_their_order(name: str, content: str, expected: list[Piece], tmp_path: Path) -> None:
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
