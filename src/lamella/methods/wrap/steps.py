"""What wrap does with the documents of a task before and after they are rephrased: cut them, clean what came back."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from lamella.data import Completion, Document, Writer, WritingRequest, seed_of
from lamella.data.steps import REQUEST, WRITTEN, Row
from lamella.measure import similarities
from lamella.methods.wrap.chunks import passages
from lamella.methods.wrap.cleaning import Evaluations, Filters, cleaned, dropped_for
from lamella.methods.wrap.styles import Style


class Cut:
    """Cut documents into passages, and ask for one rephrase of each in each style."""

    def __init__(
        self, writer: Writer, styles: Sequence[Style], longest: int, shortest: int, evaluations: Evaluations, seed: int
    ) -> None:
        self.writer, self.styles, self.longest, self.shortest = writer, list(styles), longest, shortest
        self.evaluations, self.seed = evaluations, seed

    def __call__(self, documents: Sequence[Document]) -> list[Row]:
        rows = []
        for document in documents:
            known, end = self.evaluations.places(document.text), 0
            for place, passage in enumerate(passages(document.text, self.writer.count, self.longest)):
                start, end = end, end + len(passage)
                told: Row = {"id": document.id, "chunk_idx": place, "n_src_tok": self.writer.count(passage)}
                skipped = "short" if told["n_src_tok"] < self.shortest else None
                if any(first < end and start < last for first, last in known):  # also a part of it
                    skipped = "evaluation"
                if skipped:
                    rows.append(told | {"skipped": skipped})
                    continue
                rows += [told | self.asked(passage, style, told) for style in self.styles]
        return rows

    def asked(self, passage: str, style: Style, told: Row) -> Row:
        """The row of one rephrase, as far as it is known, with its request."""
        key = json.dumps([told["id"], told["chunk_idx"], style.name])
        seed = seed_of(key, style.digest, self.seed)
        most = max(1, math.ceil(style.ratio * told["n_src_tok"]))
        request = WritingRequest(key, style.messages(passage), most, seed)
        return {
            "style": style.name, "source_text": passage, "rephraser": self.writer.name, "prompt_hash": style.digest,
            "seed": seed, REQUEST: request,
        }  # fmt: skip


class Cleaned:
    """Clean what was written, and say of each row whether it is kept, or why it is dropped."""

    def __init__(self, writer: Writer, styles: Sequence[Style], filters: Filters, evaluations: Evaluations) -> None:
        self.writer, self.styles = writer, {style.name: style for style in styles}
        self.filters, self.evaluations = filters, evaluations

    def __call__(self, rows: list[Row]) -> None:
        rows = [row for row in rows if WRITTEN in row]
        reasons = [self.of(row) for row in rows]
        left = [row for row, why in zip(rows, reasons, strict=True) if why is None]
        close = similarities(self.filters.embedder, [row["source_text"] for row in left], [row["text"] for row in left])
        for row, cosine in zip(left, close.tolist(), strict=True):
            row["sim"] = round(cosine, 6)
        for row, why in zip(rows, reasons, strict=True):
            row["drop_reason"] = "similarity" if why is None and row["sim"] < self.filters.similarity else why
            row["kept"] = row["drop_reason"] is None

    def of(self, row: Row) -> str | None:
        """Put what was written into its row, and return why it is dropped, so far."""
        written: Completion = row.pop(WRITTEN)
        text = cleaned(written.text, written.finished)
        tokens = self.writer.count(text)
        row |= {
            "text": text, "n_out_tok": tokens, "n_read": written.read, "n_written": written.tokens,
            "finished": written.finished, "sim": None,
        }  # fmt: skip
        style = self.styles[row["style"]]
        ratio = tokens / row["n_src_tok"]
        return dropped_for(text, written.text, row["source_text"], style, ratio, self.filters, self.evaluations)
