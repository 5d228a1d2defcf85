"""Records: single pieces of a text file, such as those that a model shall forget."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from lamella.errors import CalibrationError
from lamella.reading import read_rows, read_text

PROMPTS = ("prompt", "instruction", "question")
RESPONSES = ("response", "output", "answer", "completion")


class Record(NamedTuple):
    """One piece: plain text, or the response to a prompt."""

    text: str
    prompt: str | None = None


def read_records(path: str | Path) -> list[Record]:
    """The records of a file, in their order.

    Args:
        path: ``.jsonl`` with one object a line, which has ``text``, or a prompt (``prompt``, ``instruction`` or
            ``question``, with ``input`` after it) and its response (``response``, ``output``, ``answer`` or
            ``completion``); or any text file, whose records are parted by blank lines, else by lines.

    Raises:
        CalibrationError: for a file that is missing, empty or malformed, with its line.
    """
    file = Path(path).expanduser()
    if file.suffix == ".jsonl":
        records = [_of_row(row, f"{path} line {number}") for number, row in read_rows(path)]
    else:
        content = read_text(path)
        pieces = re.split(r"\n\s*\n", content.strip())
        if len(pieces) == 1:
            pieces = content.splitlines()
        records = [Record(piece.strip()) for piece in pieces if piece.strip()]
    if not records:
        raise CalibrationError(f"{path} holds no records: give at least one")
    return records


def _of_row(row: Any, where: str) -> Record:
    fields = row if isinstance(row, dict) else {"text": row}
    texts = {name: value for name, value in fields.items() if isinstance(value, str) and value.strip()}
    prompt, response = (next((texts[n] for n in names if n in texts), None) for names in (PROMPTS, RESPONSES))
    if prompt is not None and response is not None:
        return Record(response, f"{prompt}\n{texts['input']}\n" if "input" in texts else prompt)
    if "text" not in texts:
        raise CalibrationError(f"{where} holds no text; give 'text', or a 'prompt' and its 'response'")
    return Record(texts["text"])
