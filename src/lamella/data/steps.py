"""Writing over documents in tasks of a fixed size.

A task holds the same documents whoever does it, and its batches are its own, so one process, several and a cluster end
with the same rows. The rows of a finished task are kept, so a run that was stopped goes on from there.

Documents become rows, in JSON values, with a request where something is to be written; a writer answers the requests;
and what it has written is read into the rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lamella.data.decoding import Sampling
from lamella.data.documents import Document
from lamella.data.rollout import rollout, seconds_of
from lamella.data.writer import Writer
from lamella.files import write
from lamella.progress import tracker
from lamella.reading import parse_json, read_text
from lamella.workers import Workers

REQUEST, WRITTEN = "request", "written"
Row = dict[str, Any]


@dataclass(frozen=True)
class Rolled:
    """Have everything written that rows ask for under ``REQUEST``, and put it under ``WRITTEN``.

    Attributes:
        folder: of what is written.
    """

    writer: Writer
    sampling: Sampling
    folder: Path

    @property
    def seconds(self) -> float:
        """The time that writing took in all tasks together, also before a run was stopped."""
        return sum(map(seconds_of, self.folder.glob("written-*.jsonl")))

    def __call__(self, rows: list[Row], task: int) -> None:
        requests = [row[REQUEST] for row in rows if REQUEST in row]
        found = rollout(self.writer, requests, self.sampling, self.folder / f"written-{task:05d}.jsonl")
        for row in rows:
            if REQUEST in row:
                row[WRITTEN] = found[row.pop(REQUEST).key]


def through(
    documents: Sequence[Document],
    ask: Callable[[Sequence[Document]], list[Row]],
    rolled: Rolled,
    read: Callable[[list[Row]], None],
    together: int,
    workers: Workers,
) -> list[Row]:
    """The rows that documents become, in the order of the documents.

    Args:
        ask: makes rows of the documents of a task.
        rolled: what writes for them. Its folder also has the rows of finished tasks.
        read: reads what was written into the rows of a task, in place.
        together: how many documents a task has.
        workers: who does the tasks.
    """
    task = _Task(ask, rolled, read, rolled.folder)
    count = len(range(0, len(documents), together))
    for number in range(count):
        _put(task.documents(number), documents[number * together : (number + 1) * together])
    with tracker("tasks", count) as done, workers.pool(rolled.folder / "tasks") as pool:
        for _ in pool.each(task, range(count)):
            done()
    return [row for number in range(count) for row in _get(task.rows(number))]


@dataclass(frozen=True)
class _Task:
    ask: Callable[[Sequence[Document]], list[Row]]
    rolled: Rolled
    read: Callable[[list[Row]], None]
    folder: Path

    def documents(self, number: int) -> Path:
        return self.folder / "documents" / f"{number:05d}.json"

    def rows(self, number: int) -> Path:
        return self.folder / "rows" / f"{number:05d}.json"

    def __call__(self, number: int) -> None:
        if self.rows(number).exists():
            return
        rows = self.ask([Document(*each) for each in _get(self.documents(number))])
        self.rolled(rows, number)
        self.read(rows)
        _put(self.rows(number), rows)


def _put(file: Path, values: Sequence[Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write(file, json.dumps(values, ensure_ascii=False))


def _get(file: Path) -> Any:
    return parse_json(read_text(file))
