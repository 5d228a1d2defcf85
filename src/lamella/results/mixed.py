"""A generated corpus with its training mixture: rows with their provenance, and two splits of text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lamella.data import Document, Documents
from lamella.data.lazy import mapped
from lamella.data.sources import MIXTURE
from lamella.extras import require
from lamella.results.corpus import Corpus, write_rows

SPLITS = ("train", "test")
BATCH = 4096  # rows of a .parquet file that are in memory at a time


@dataclass(kw_only=True)
class MixedCorpus(Corpus):
    """Rows of text, with a training mixture and a test split.

    ``data.jsonl`` contains every row with its provenance. ``train.jsonl`` and ``test.jsonl`` are the input of
    ``lamella heal --text FOLDER``; ``mixture.json`` next to them specifies that no window may combine two sources.

    Attributes:
        items: the rows.
        train: texts in training order.
        test: texts from which nothing was generated.
        parquet: whether ``data.parquet`` is written too.
    """

    items: Sequence[dict[str, Any]]
    train: Sequence[dict[str, Any]] = ()
    test: Sequence[dict[str, Any]] = ()
    parquet: bool = False

    kind: ClassVar[str] = "mixed"

    @classmethod
    def of(
        cls,
        rows: Sequence[dict[str, Any]],
        documents: Documents,
        held_out: Sequence[Document],
        train: Sequence[dict[str, Any]],
        mixture: dict[str, Any],
        *,
        parquet: bool,
        notes: Sequence[str],
        **findings: Any,
    ) -> MixedCorpus:
        """Return the corpus generated from documents, with the findings that all such corpora have.

        Args:
            rows: everything that was generated.
            documents: the given documents.
            held_out: documents from which nothing was generated.
            train: the training texts.
            mixture: the account of the training mixture.
            parquet: see :class:`MixedCorpus`.
            notes: notes for the report.
            findings: the method's own.
        """
        counts = {"given": len(documents), "held out": len(held_out), "unreadable": documents.broken.count}
        digest = hashlib.sha256()
        for row in rows:
            digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
        return cls(
            items=rows,
            train=train,
            test=mapped(held_out, lambda each: {"text": each.text, "id": each.id}),
            parquet=parquet,
            findings={"documents": counts, **findings, "mixture": mixture, "corpus": digest.hexdigest()},
            notes=[*documents.broken.note(), *notes],
            files={MIXTURE: json.dumps(mixture, indent=2) + "\n"},
        )

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield all rows."""
        yield from self.items

    def write(self, folder: Path) -> None:
        """Write the rows and the splits into a folder."""
        super().write(folder)
        for name in SPLITS:
            write_rows(folder / f"{name}.jsonl", getattr(self, name))
        if self.parquet:
            arrow, parquet = (require(each, "data", "a .parquet file") for each in ("pyarrow", "pyarrow.parquet"))
            batches = [range(start, min(start + BATCH, len(self.items))) for start in range(0, len(self.items), BATCH)]
            schemas = [arrow.RecordBatch.from_pylist([self.items[n] for n in batch]).schema for batch in batches]
            schema = arrow.unify_schemas(schemas, promote_options="permissive")  # a column may be empty in some batches
            with parquet.ParquetWriter(folder / "data.parquet", schema) as file:
                for batch in batches:
                    file.write_batch(arrow.RecordBatch.from_pylist([self.items[n] for n in batch], schema))
