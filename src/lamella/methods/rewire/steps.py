"""Steps of a task before and after rewriting: build the requests, and parse the answers."""

from __future__ import annotations

from collections.abc import Sequence

from lamella.data import Completion, Document, Writer, WritingRequest, seed_of
from lamella.data.steps import REQUEST, WRITTEN, Row
from lamella.measure import Embedder, similarities
from lamella.methods.rewire.guiding import Guide, parse_answer


class RewriteRequests:
    """Request one rewrite of each document that is not too long and fits the rewriter's context."""

    def __init__(self, writer: Writer, guide: Guide, longest: int, answer: int, seed: int) -> None:
        self.writer, self.guide, self.longest, self.answer, self.seed = writer, guide, longest, answer, seed

    def __call__(self, documents: Sequence[Document]) -> list[Row]:
        """Return the rows of some documents, with their requests."""
        return [self.row_of(document) for document in documents]

    def row_of(self, document: Document) -> Row:
        """Return the row of one document with its request."""
        tokens = self.writer.count(document.text)
        seed = seed_of(document.id, self.guide.digest, self.seed)
        row: Row = {
            "id": document.id, "source_text": document.text, "n_src_tok": tokens, "rewriter": self.writer.name,
            "prompt_hash": self.guide.digest, "seed": seed,
        }  # fmt: skip
        request = WritingRequest(document.id, self.guide.messages(document.text), self.answer, seed)
        if tokens <= self.longest and self.writer.has_room(request):
            row[REQUEST] = request
        return row


class AnswerParser:
    """Extract the text between the markers of each answer, or record the reason of a failure."""

    def __init__(self, writer: Writer, embedder: Embedder) -> None:
        self.writer, self.embedder = writer, embedder

    def __call__(self, rows: list[Row]) -> None:
        """Complete the rows of a task in place."""
        for row in rows:
            written: Completion | None = row.pop(WRITTEN, None)
            text, reason = ("", "too long") if written is None else parse_answer(written.text)
            row |= {
                "text": text, "drop_reason": reason, "n_out_tok": self.writer.count(text), "sim": None,
                "n_read": written.read if written else 0, "n_written": written.tokens if written else 0,
            }  # fmt: skip
        kept = [row for row in rows if row["drop_reason"] is None]
        cosines = similarities(self.embedder, [row["source_text"] for row in kept], [row["text"] for row in kept])
        for row, cosine in zip(kept, cosines.tolist(), strict=True):
            row["sim"] = round(cosine, 6)
