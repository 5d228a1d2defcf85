"""What rewire does with the documents of a task before and after they are rewritten: ask, and read what came back."""

from __future__ import annotations

from collections.abc import Sequence

from lamella.data import Completion, Document, Writer, WritingRequest, seed_of
from lamella.data.steps import REQUEST, WRITTEN, Row
from lamella.measure import Embedder, similarities
from lamella.methods.rewire.guiding import Guide, parsed


class Guided:
    """Ask for one rewrite of each document that is not too long, for the rewriter's room too."""

    def __init__(self, writer: Writer, guide: Guide, longest: int, answer: int, seed: int) -> None:
        self.writer, self.guide, self.longest, self.answer, self.seed = writer, guide, longest, answer, seed

    def __call__(self, documents: Sequence[Document]) -> list[Row]:
        return [self.asked(document) for document in documents]

    def asked(self, document: Document) -> Row:
        """The row of one document, as far as it is known, with its request."""
        tokens = self.writer.count(document.text)
        seed = seed_of(document.id, self.guide.digest, self.seed)
        row: Row = {
            "id": document.id, "source_text": document.text, "n_src_tok": tokens, "rewriter": self.writer.name,
            "prompt_hash": self.guide.digest, "seed": seed,
        }  # fmt: skip
        request = WritingRequest(document.id, self.guide.messages(document.text), self.answer, seed)
        if tokens <= self.longest and self.writer.fits(request):
            row[REQUEST] = request
        return row


class Parsed:
    """Keep what stands between the markers of a response, and say why where there is nothing."""

    def __init__(self, writer: Writer, embedder: Embedder) -> None:
        self.writer, self.embedder = writer, embedder

    def __call__(self, rows: list[Row]) -> None:
        for row in rows:
            written: Completion | None = row.pop(WRITTEN, None)
            text, why = ("", "too long") if written is None else parsed(written.text)
            row |= {
                "text": text, "drop_reason": why, "n_out_tok": self.writer.count(text), "sim": None,
                "n_read": written.read if written else 0, "n_written": written.tokens if written else 0,
            }  # fmt: skip
        kept = [row for row in rows if row["drop_reason"] is None]
        close = similarities(self.embedder, [row["source_text"] for row in kept], [row["text"] for row in kept])
        for row, cosine in zip(kept, close.tolist(), strict=True):
            row["sim"] = round(cosine, 6)
