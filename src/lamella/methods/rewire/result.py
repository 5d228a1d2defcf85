"""A pool with the score of each document, and the rewrites of an earlier run as an input."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lamella.data import Document, InputContext, Rows
from lamella.data.stored import stored
from lamella.errors import CalibrationError
from lamella.reading import read_rows
from lamella.results import Corpus
from lamella.results.corpus import FILE
from lamella.signature import Fixture

FIELDS = ("id", "source_text", "n_src_tok", "text", "n_out_tok", "drop_reason", "sim")  # that a selection needs
ROWS = [
    ("The tide was low when the boat came in.", "At low tide the boat came in. Nobody stood at the landing."),
    ("buy now buy now click here for free stuff", "Many pages offer stuff for free. They want a click."),
    ("A kettle needs four minutes for a litre.", "A kettle boils a litre of water in four minutes."),
    ("rye bread keep longer lol", "Rye bread keeps longer than wheat bread, since its crumb is dense."),
]


@dataclass(kw_only=True)
class ScoredDocuments(Corpus):
    """Documents in their order, each with its score: filter the rows by ``score``.

    Attributes:
        items: rows with id, text and score.
    """

    items: Sequence[dict[str, Any]]

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the rows."""
        yield from self.items


class Rewritten(Rows[dict[str, Any]]):
    """The rows of an earlier run, each a document of the pool with its rewrite or the reason why there is none.

    Attributes:
        held_out: the documents that were held out.
    """

    held_out: list[Document]

    metavar = "FOLDER"
    source_help = "the folder that `lamella run rewire` has written, or its data.jsonl"
    example = Fixture(
        "data.jsonl",
        "".join(
            json.dumps(dict(zip(FIELDS, (f"d{n}", source, 9, text, 12, None, 0.5), strict=True))) + "\n"
            for n, (source, text) in enumerate(ROWS)
        ),
    )

    @classmethod
    def open(cls, name: str | Path, context: InputContext) -> Rewritten:
        """Read the rows.

        Args:
            name: the folder, or its data.jsonl.
            context: not used.

        Raises:
            CalibrationError: for a file that is missing, or that is no result of rewire.
        """
        path = Path(name).expanduser()
        folder = path if path.is_dir() else path.parent
        if not path.exists() or not (folder / "data.jsonl").is_file():
            raise CalibrationError(f"{name} holds no data.jsonl: give the folder that `lamella run rewire` has written")
        rows = stored(_checked(row, number, name) for number, row in read_rows(folder / FILE))
        found = cls(rows, metadata={"data": str(name), "documents": len(rows)})
        test = folder / "test.jsonl"
        found.held_out = [Document(row["id"], row["text"]) for _, row in read_rows(test)] if test.is_file() else []
        return found


def _checked(row: dict[str, Any], number: int, name: str | Path) -> dict[str, Any]:
    """Return a row that has all fields."""
    missing = [field for field in FIELDS if field not in row]
    if missing:
        raise CalibrationError(
            f"{name}: row {number} has no '{missing[0]}': give the folder that `lamella run rewire` has written"
        )
    return row
