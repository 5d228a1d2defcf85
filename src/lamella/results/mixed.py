"""A rewritten corpus with the mixture to train on: rows with their provenance, and two splits of text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from lamella.data import Document, Documents
from lamella.data.sources import MIXTURE
from lamella.extras import require
from lamella.results.corpus import Corpus, write_rows

SPLITS = ("train", "test")


@dataclass(kw_only=True)
class MixedCorpus(Corpus):
    """Rows of text, what of them is to be trained on, and what is to be tested on.

    ``data.jsonl`` holds every row with its provenance. ``train.jsonl`` and ``test.jsonl`` are what
    ``lamella heal --text FOLDER`` reads, and ``mixture.json`` beside them says that no window may have two sources.

    Attributes:
        items: the rows.
        train: texts in the order in which they are seen.
        test: texts that nothing was made of.
        parquet: whether ``data.parquet`` is written beside ``data.jsonl``.
    """

    items: list[dict[str, Any]]
    train: list[dict[str, Any]] = field(default_factory=list)
    test: list[dict[str, Any]] = field(default_factory=list)
    parquet: bool = False

    kind: ClassVar[str] = "mixed"

    @classmethod
    def of(
        cls,
        rows: list[dict[str, Any]],
        documents: Documents,
        held_out: Sequence[Document],
        train: list[dict[str, Any]],
        mixture: dict[str, Any],
        *,
        parquet: bool,
        notes: Sequence[str],
        **findings: Any,
    ) -> MixedCorpus:
        """What was made of documents, with what every such corpus says of itself.

        Args:
            rows: everything that was made.
            documents, held_out: what was given, and what of it nothing was made of.
            train, mixture: what is trained on, and the account of it.
            parquet: see :class:`MixedCorpus`.
            notes: what must be said of it.
            findings: the method's own.
        """
        given = {"given": len(documents), "held out": len(held_out), "unreadable": documents.broken.count}
        digest = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
        return cls(
            items=rows,
            train=train,
            test=[{"text": each.text, "id": each.id} for each in held_out],
            parquet=parquet,
            findings={"documents": given, **findings, "mixture": mixture, "corpus": digest},
            notes=[*documents.broken.note(), *notes],
            files={MIXTURE: json.dumps(mixture, indent=2) + "\n"},
        )

    def rows(self) -> Iterator[dict[str, Any]]:
        yield from self.items

    def write(self, folder: Path) -> None:
        super().write(folder)
        for name in SPLITS:
            write_rows(folder / f"{name}.jsonl", getattr(self, name))
        if self.parquet:
            arrow, parquet = (require(each, "data", "a .parquet file") for each in ("pyarrow", "pyarrow.parquet"))
            parquet.write_table(arrow.Table.from_pylist(self.items), folder / "data.parquet")
