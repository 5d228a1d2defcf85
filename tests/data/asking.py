"""Steps of writing for tests, in a module that other processes can import."""

from __future__ import annotations

from collections.abc import Sequence

from lamella.data import Document, WritingRequest
from lamella.data.steps import REQUEST, WRITTEN, Row


class Ask:
    """Ask for a continuation of each document; one that is named fails."""

    def __init__(self, fails: str = "") -> None:
        self.fails = fails

    def __call__(self, documents: Sequence[Document]) -> list[Row]:
        rows = []
        for each in documents:
            if each.id == self.fails:
                raise ValueError(f"{each.id} fails")
            request = WritingRequest(each.id, [{"role": "user", "content": each.text}], 6, len(each.text))
            rows.append({"id": each.id, REQUEST: request})
        return rows


def tell(rows: list[Row]) -> None:
    """Put what was written into the rows."""
    for row in rows:
        row["text"] = row.pop(WRITTEN).text
