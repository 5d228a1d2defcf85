"""What rewire's pipeline does with the documents of a task: ask for a rewrite of each, read what came back.

Imported only where datatrove is installed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from datatrove.data import Document as Piece
from datatrove.pipeline.base import PipelineStep

from lamella.data import Request, Writer, Written, seed_of
from lamella.data.steps import REQUEST, WRITTEN
from lamella.measure import Embedder, similarities
from lamella.methods.rewire.guiding import Guide, parsed


class Guided(PipelineStep):
    """Ask for one rewrite of each document that is not too long, for the rewriter's room too."""

    type, name = "prompt", "guided rewrite"

    def __init__(self, writer: Writer, guide: Guide, longest: int, answer: int, seed: int) -> None:
        super().__init__()
        self.writer, self.guide, self.longest, self.answer, self.seed = writer, guide, longest, answer, seed

    def run(self, data: Iterable[Piece], rank: int = 0, world_size: int = 1) -> Iterator[Piece]:
        for document in data:
            tokens = self.writer.count(document.text)
            seed = seed_of(document.id, self.guide.digest, self.seed)
            document.metadata |= {
                "id": document.id, "source_text": document.text, "n_src_tok": tokens, "rewriter": self.writer.name,
                "prompt_hash": self.guide.digest, "seed": seed,
            }  # fmt: skip
            request = Request(document.id, self.guide.messages(document.text), self.answer, seed)
            if tokens <= self.longest and self.writer.fits(request):
                document.metadata[REQUEST] = request
            yield document


class Parsed(PipelineStep):
    """Keep what stands between the markers of a response, and say why where there is nothing."""

    type, name = "parser", "improved response"

    def __init__(self, writer: Writer, embedder: Embedder) -> None:
        super().__init__()
        self.writer, self.embedder = writer, embedder

    def run(self, data: Iterable[Piece], rank: int = 0, world_size: int = 1) -> Iterator[Piece]:
        pieces = list(data)
        for piece in pieces:
            row = piece.metadata
            written: Written | None = row.pop(WRITTEN, None)
            text, why = ("", "too long") if written is None else parsed(written.text)
            row |= {
                "text": text, "drop_reason": why, "n_out_tok": self.writer.count(text), "sim": None,
                "n_read": written.read if written else 0, "n_written": written.tokens if written else 0,
            }  # fmt: skip
            self.stat_update("parsed" if why is None else f"failed: {why}")
        rows = [piece.metadata for piece in pieces if piece.metadata["drop_reason"] is None]
        close = similarities(self.embedder, [row["source_text"] for row in rows], [row["text"] for row in rows])
        for row, cosine in zip(rows, close.tolist(), strict=True):
            row["sim"] = round(cosine, 6)
        yield from pieces
