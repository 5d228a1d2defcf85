"""The steps of wrap before and after the generation: split documents into passages, and clean the rephrases."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from lamella.data import Completion, Document, Writer, WritingRequest, seed_of
from lamella.data.steps import REQUEST, WRITTEN, Row
from lamella.measure import similarities
from lamella.methods.wrap.chunks import passages
from lamella.methods.wrap.cleaning import Evaluations, Filters, clean_rephrase, drop_reason
from lamella.methods.wrap.styles import Style


class PassageRequests:
    """Splits documents into passages, and creates one request per passage and style.

    Args:
        writer: the rephraser.
        styles: the styles.
        longest: maximum tokens per passage.
        shortest: minimum tokens of a passage to be rephrased.
        evaluations: the evaluation sets.
        seed: random seed.
    """

    def __init__(
        self, writer: Writer, styles: Sequence[Style], longest: int, shortest: int, evaluations: Evaluations, seed: int
    ) -> None:
        self.writer, self.styles, self.longest, self.shortest = writer, list(styles), longest, shortest
        self.evaluations, self.seed = evaluations, seed

    def __call__(self, documents: Sequence[Document]) -> list[Row]:
        """Return the rows of some documents, with their requests."""
        rows = []
        for document in documents:
            known, end = self.evaluations.spans(document.text), 0
            for index, passage in enumerate(passages(document.text, self.writer.count, self.longest)):
                start, end = end, end + len(passage)
                row: Row = {"id": document.id, "chunk_idx": index, "n_src_tok": self.writer.count(passage)}
                skipped = "short" if row["n_src_tok"] < self.shortest else None
                if any(first < end and start < last for first, last in known):  # even if only a part of it overlaps
                    skipped = "evaluation"
                if skipped:
                    rows.append(row | {"skipped": skipped})
                    continue
                rows += [row | self.request_row(passage, style, row) for style in self.styles]
        return rows

    def request_row(self, passage: str, style: Style, row: Row) -> Row:
        """Return the row of one rephrase with its request.

        Args:
            passage: the passage.
            style: the style.
            row: the common entries of the passage's rows.
        """
        key = json.dumps([row["id"], row["chunk_idx"], style.name])
        seed = seed_of(key, style.digest, self.seed)
        most = max(1, math.ceil(style.ratio * row["n_src_tok"]))
        request = WritingRequest(key, style.messages(passage), most, seed)
        return {
            "style": style.name, "source_text": passage, "rephraser": self.writer.name, "prompt_hash": style.digest,
            "seed": seed, REQUEST: request,
        }  # fmt: skip


class CleanRephrases:
    """Cleans the outputs, and adds to each row whether it is kept, or the reason why it is dropped.

    Args:
        writer: the rephraser.
        styles: the styles.
        filters: the filters.
        evaluations: the evaluation sets.
    """

    def __init__(self, writer: Writer, styles: Sequence[Style], filters: Filters, evaluations: Evaluations) -> None:
        self.writer, self.styles = writer, {style.name: style for style in styles}
        self.filters, self.evaluations = filters, evaluations

    def __call__(self, rows: list[Row]) -> None:
        """Clean and filter the rows in place."""
        rows = [row for row in rows if WRITTEN in row]
        reasons = [self.of(row) for row in rows]
        remaining = [row for row, reason in zip(rows, reasons, strict=True) if reason is None]
        similarity = similarities(
            self.filters.embedder, [row["source_text"] for row in remaining], [row["text"] for row in remaining]
        )
        for row, cosine in zip(remaining, similarity.tolist(), strict=True):
            row["sim"] = round(cosine, 6)
        for row, reason in zip(rows, reasons, strict=True):
            row["drop_reason"] = "similarity" if reason is None and row["sim"] < self.filters.similarity else reason
            row["kept"] = row["drop_reason"] is None

    def of(self, row: Row) -> str | None:
        """Add the cleaned output to its row, and return the reason to drop it, if any."""
        written: Completion = row.pop(WRITTEN)
        text = clean_rephrase(written.text, written.finished)
        tokens = self.writer.count(text)
        row |= {
            "text": text, "n_out_tok": tokens, "n_read": written.read, "n_written": written.tokens,
            "finished": written.finished, "sim": None,
        }  # fmt: skip
        style = self.styles[row["style"]]
        ratio = tokens / row["n_src_tok"]
        return drop_reason(text, written.text, row["source_text"], style, ratio, self.filters, self.evaluations)
