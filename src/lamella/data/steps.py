"""Steps of a pipeline that every rewriting of documents has: read a task's share, have it written, keep the rows.

Imported only where datatrove is installed. A document of datatrove carries one request from :class:`Rolled` on: its
``metadata`` has what the step was told of it and, afterwards, what was written.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from datatrove.data import Document as Piece
from datatrove.pipeline.base import PipelineStep

from lamella.data.decoding import Sampling
from lamella.data.documents import Document
from lamella.data.rollout import rollout
from lamella.data.tasks import Cluster, Workers, carry_out
from lamella.data.writer import Request, Writer
from lamella.files import write
from lamella.reading import parse_json, read_text

REQUEST, WRITTEN = "request", "written"


def through(
    documents: Sequence[Document], steps: Sequence[PipelineStep], each: int, workers: Workers, cluster: Cluster, folder: Path
) -> list[dict[str, Any]]:
    """Documents through a pipeline, so many in each task: its rows, in the order of the documents.

    Args:
        steps: what becomes of them; the metadata of what comes out are the rows.
        folder: of all that is kept on the way, with which a run that was stopped goes on.
    """
    given, kept = folder / "documents", folder / "rows"
    tasks = range(0, len(documents), each)
    for rank, start in enumerate(tasks):
        _put(given, rank, documents[start : start + each])
    carry_out([Shared(given), *steps, Kept(kept)], len(tasks), workers, folder / "tasks", cluster)
    return [row for rank in range(len(tasks)) for row in _get(kept, rank)]


def _put(folder: Path, rank: int, values: Sequence[Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / f"{rank:05d}.json", json.dumps(values, ensure_ascii=False))


def _get(folder: Path, rank: int) -> Any:
    return parse_json(read_text(folder / f"{rank:05d}.json"))


class Shared(PipelineStep):
    """Read the documents of a task."""

    type, name = "reader", "documents of a task"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def run(self, data: Iterable[Piece] | None, rank: int = 0, world_size: int = 1) -> Iterator[Piece]:
        for id_, text in _get(self.folder, rank):
            self.stat_update("documents")
            yield Piece(text=text, id=id_, metadata={})


class Rolled(PipelineStep):
    """Have everything written that the documents of a task ask for; those that ask for nothing pass."""

    type, name = "writer model", "rollout"

    def __init__(self, writer: Writer, sampling: Sampling, folder: Path) -> None:
        super().__init__()
        self.writer, self.sampling, self.folder = writer, sampling, folder

    def run(self, data: Iterable[Piece], rank: int = 0, world_size: int = 1) -> Iterator[Piece]:
        pieces = list(data)
        requests: list[Request] = [each.metadata[REQUEST] for each in pieces if REQUEST in each.metadata]
        found = rollout(self.writer, requests, self.sampling, self.folder / f"written-{rank:05d}.jsonl")
        for piece in pieces:
            request = piece.metadata.pop(REQUEST, None)
            if request is not None:
                piece.metadata[WRITTEN] = found[request.key]
                self.stat_update("written")
            yield piece


class Kept(PipelineStep):
    """Keep the metadata of all documents of a task as its rows."""

    type, name = "writer", "rows of a task"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def run(self, data: Iterable[Piece], rank: int = 0, world_size: int = 1) -> Iterator[Piece]:
        pieces = list(data)
        _put(self.folder, rank, [each.metadata for each in pieces])
        yield from pieces
