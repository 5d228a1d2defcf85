"""Generation over documents in tasks of a fixed size.

A task holds the same documents and forms the same batches wherever it runs, so one process, several processes and a
cluster give the same rows. The rows of a finished task are kept, so a run that was stopped continues from there.

Documents become rows of JSON values, with a request where something is to be generated; a writer answers the requests,
and the answers are read into the rows.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lamella.data.decoding import Sampling
from lamella.data.documents import Document
from lamella.data.lazy import Lazy
from lamella.data.rollout import rollout, seconds_of
from lamella.data.stored import FASTEST, stored
from lamella.data.writer import Writer
from lamella.errors import ExportError
from lamella.files import write_bytes
from lamella.progress import tracker
from lamella.reading import open_decompressed, parse_json
from lamella.workers import Workers

REQUEST, WRITTEN = "request", "written"
Row = dict[str, Any]


@dataclass(frozen=True)
class DocumentGeneration:
    """Answer the requests of rows under ``REQUEST``, and store the completions under ``WRITTEN``.

    Attributes:
        writer: the model that answers.
        sampling: how tokens are sampled.
        folder: the folder of the journals.
    """

    writer: Writer
    sampling: Sampling
    folder: Path

    @property
    def seconds(self) -> float:
        """The time that generation took in all tasks together, including before a stop, in seconds."""
        return sum(map(seconds_of, self.folder.glob("written-*.jsonl")))

    def __call__(self, rows: list[Row], task: int) -> None:
        """Answer the requests of the rows of a task, in place.

        Args:
            rows: the rows of the task.
            task: index of the task, which names its journal.
        """
        requests = [row[REQUEST] for row in rows if REQUEST in row]
        found = rollout(self.writer, requests, self.sampling, self.journal(task))
        for row in rows:
            if REQUEST in row:
                row[WRITTEN] = found[row.pop(REQUEST).key]

    def journal(self, task: int) -> Path:
        """Return the file with the answers of a task.

        Args:
            task: index of the task.
        """
        return self.folder / f"written-{task:05d}.jsonl"

    def shorten(self, task: int) -> None:
        """Delete the answers of a task, whose rows contain them; the time that they took is kept.

        Args:
            task: index of the task.
        """
        _put(self.journal(task), [seconds_of(self.journal(task)), []])


def process_documents(
    documents: Sequence[Document],
    ask: Callable[[Sequence[Document]], list[Row]],
    generation: DocumentGeneration,
    read: Callable[[list[Row]], None],
    together: int,
    workers: Workers,
) -> Lazy[Row]:
    """Turn documents into rows, in the order of the documents; both may be larger than the memory.

    Args:
        documents: the documents.
        ask: makes the rows of a task, with requests, from its documents.
        generation: answers the requests. Its folder also holds the rows of finished tasks.
        read: reads the completions into the rows of a task, in place.
        together: number of documents in a task.
        workers: where the tasks run.
    """
    task = _Task(ask, generation, read, generation.folder)
    count = len(range(0, len(documents), together))
    for folder in (task.documents(0).parent, task.rows(0).parent):
        folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        if not task.rows(number).exists():
            _put(task.documents(number), list(documents[number * together : (number + 1) * together]))
    with tracker("tasks", count) as done, workers.pool(generation.folder / "tasks") as pool:
        for _ in pool.each(task, range(count)):
            done()
    return stored(row for number in range(count) for row in _get(task.rows(number)))


@dataclass(frozen=True)
class _Task:
    ask: Callable[[Sequence[Document]], list[Row]]
    generation: DocumentGeneration
    read: Callable[[list[Row]], None]
    folder: Path

    def documents(self, number: int) -> Path:
        return self.folder / "documents" / f"{number:05d}.json"

    def rows(self, number: int) -> Path:
        return self.folder / "rows" / f"{number:05d}.json.gz"

    def __call__(self, number: int) -> None:
        if self.rows(number).exists():
            return
        rows = self.ask([Document(*each) for each in _get(self.documents(number))])
        self.generation(rows, number)
        self.read(rows)
        write_bytes(self.rows(number), gzip.compress(json.dumps(rows).encode(), FASTEST))
        self.documents(number).unlink()
        self.generation.shorten(number)


def _put(file: Path, value: Any) -> None:
    """Write a file that can be made again, so it need not survive the failure of the machine."""
    try:
        file.write_text(json.dumps(value) + "\n", encoding="utf-8")
    except OSError as error:
        raise ExportError(f"{file}: cannot be written ({error.strerror}); choose another folder") from None


def _get(file: Path) -> Any:
    with open_decompressed(file) as lines:
        return parse_json(lines.read())
