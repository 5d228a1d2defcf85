"""Reading what anyone may have written: whatever is wrong with a file becomes one error that names it.

Python's own reader of JSON also raises what no caller expects (``RecursionError`` for deep nesting), and lets pass what
fails much later: half of a surrogate pair can be neither written down nor tokenized.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lamella.errors import CalibrationError, LamellaError

DEEPEST = 100  # levels of nesting: far above any document, far below what ends the interpreter


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: for anything else, with one line that says why.
    """
    text = text.decode() if isinstance(text, bytes) else text
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if text.count("[") + text.count("{") > DEEPEST or "\\ud" in text or "\\uD" in text:
        _check(value)
    return value


def _check(value: Any) -> None:
    """Check level by level, without recursion, that a value is not nested too deeply and its strings are whole."""
    level = [value]
    for _ in range(DEEPEST):
        inner: list[Any] = []
        for each in level:
            if isinstance(each, str):
                each.encode()
            elif isinstance(each, dict):
                inner += [*each, *each.values()]
            elif isinstance(each, list):
                inner += each
        if not inner:
            return
        level = inner
    raise ValueError("nested too deeply")


def in_utf_8(value: Any) -> Any:
    """A JSON value whose strings UTF-8 can hold: of file names, what it cannot hold becomes question marks."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {in_utf_8(name): in_utf_8(each) for name, each in value.items()}
    return [in_utf_8(each) for each in value] if isinstance(value, list) else value


def read_text(path: str | Path, mend: str = "give a text file") -> str:
    """The content of a file of data.

    Raises:
        CalibrationError: when it is missing or no UTF-8 text.
    """
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path}: cannot be read as UTF-8 text ({error.__class__.__name__}): {mend}") from None


def read_lines(path: str | Path, mend: str = "give a text file") -> list[tuple[int, str]]:
    """The lines of a file of data that are not blank, with their numbers; see :func:`read_text`.

    Only line feeds end a line: JSON strings may hold every other character that ends one elsewhere.
    """
    return [(n, line) for n, line in enumerate(read_text(path, mend).split("\n"), start=1) if line.strip()]


def read_rows(
    path: str | Path, mend: str = "give one object a line", instead: str = "give a .jsonl file"
) -> Iterator[tuple[int, Any]]:
    """The values of a file of JSON lines, each with the number of its line.

    Args:
        mend: what a line should be, for the message.
        instead: which file to give where there is none.

    Raises:
        CalibrationError: for a file that cannot be read, or a line that is not JSON.
    """
    for number, line in read_lines(path, instead):
        try:
            row = parse_json(line)
        except ValueError as error:
            raise CalibrationError(f"{path} line {number} is not JSON ({error}); {mend}") from None
        yield number, row


def read_journal(path: Path, is_whole: Callable[[Any], bool], header: str | None = None) -> list[Any]:
    """The JSON lines of a journal, up to the first that a kill cut short or that is none of its own.

    Args:
        is_whole: whether a value is a line of this journal.
        header: the line that must come first; nothing is found under another one.

    Raises:
        LamellaError: when the file is there and cannot be read.
    """
    try:
        lines = path.read_bytes().split(b"\n") if path.exists() else []
    except OSError as error:
        raise LamellaError(f"{path}: the journal cannot be read ({error.strerror}): remove it") from None
    if header is not None:
        lines = lines[1:] if lines[:1] == [header.encode()] else []
    found = []
    for line in lines:
        try:
            value = parse_json(line)
        except ValueError:
            break
        if not is_whole(value):
            break
        found.append(value)
    return found
