"""A corpus: selected or generated documents or samples, with their provenance."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lamella.reading import read_rows
from lamella.result import Result

FILE = "data.jsonl"


@dataclass(kw_only=True)
class Corpus(Result):
    """Rows of text; the findings describe how they were made."""

    kind: ClassVar[str] = "corpus"
    needs_folder: ClassVar[bool] = True

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the rows to write, one object each.

        Raises:
            NotImplementedError: in a subclass without this method.
        """
        raise NotImplementedError

    def write(self, folder: Path) -> None:
        """Write the rows as JSON lines into a folder."""
        write_rows(folder / FILE, self.rows())

    @classmethod
    def read(cls, path: Path) -> list[dict[str, Any]]:
        """Return the rows in a folder of results."""
        return [row for _, row in read_rows(path / FILE if path.is_dir() else path)]


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSON lines, in UTF-8.

    Args:
        path: the file; an existing one is replaced.
        rows: the rows, as JSON values.
    """
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
