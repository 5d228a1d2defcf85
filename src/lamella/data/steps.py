"""Work over documents as datatrove does it: a pipeline of steps, over tasks of a fixed size.

Imported only where datatrove is installed. A task holds the same documents whoever runs it, and its batches are its
own, so one process, several and a cluster end with the same rows. datatrove remembers which tasks are finished.

A document of datatrove becomes one row. Its ``metadata`` is that row, with a request where something is to be written,
and from :class:`Rolled` on with what was.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from datatrove.data import Document as Piece
from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from loguru import logger

from lamella.data.decoding import Sampling
from lamella.data.documents import Document
from lamella.data.rollout import rollout, seconds_of
from lamella.data.tasks import Cluster, Workers
from lamella.data.writer import Request, Writer
from lamella.errors import LamellaError
from lamella.extras import require
from lamella.files import write
from lamella.processes import end_with_parent
from lamella.progress import tracker
from lamella.reading import parse_json, read_text

REQUEST, WRITTEN = "request", "written"
GLANCE = 10.0  # seconds from one look at Slurm's queue to the next


def through(
    documents: Sequence[Document],
    steps: Sequence[PipelineStep],
    each: int,
    workers: Workers,
    cluster: Cluster,
    folder: Path,
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
    carry_out([Shared(given), *steps, Kept(kept)], len(tasks), workers, cluster, folder / "tasks")
    return [row for rank in range(len(tasks)) for row in _get(kept, rank)]


def carry_out(steps: Sequence[PipelineStep], tasks: int, workers: Workers, cluster: Cluster, folder: Path) -> None:
    """Run a pipeline over all tasks, but for those that an earlier run has finished.

    Args:
        folder: of datatrove's own files: logs, and which tasks are finished. All machines must see it.

    Raises:
        LamellaError: when a task does not end well.
    """
    executor = _executor(list(steps), tasks, workers, cluster, folder)
    with tracker("tasks", tasks):
        executor.run()
        if isinstance(executor, SlurmPipelineExecutor):
            _wait(executor)
    missing = executor.get_incomplete_ranks()
    if missing:
        raise LamellaError(
            f"{len(missing)} of {tasks} tasks did not end well, such as task {missing[0]}: see {folder / 'logs'}, and "
            "run the same command again; what is finished is kept"
        )


class Here(LocalPipelineExecutor):
    """datatrove's executor on this machine, without its lines on the screen: what fails is raised here."""

    def _run_for_rank(self, *args: Any, **options: Any) -> Any:
        if os.getpid() != self.home:
            end_with_parent()
        logger.disable("datatrove")
        return super()._run_for_rank(*args, **options)

    def run(self) -> Any:
        self.home = os.getpid()
        logger.disable("datatrove")
        try:
            return super().run()
        finally:
            logger.enable("datatrove")


def _executor(steps: list[PipelineStep], tasks: int, workers: Workers, cluster: Cluster, folder: Path) -> Any:
    common: dict[str, Any] = {"pipeline": steps, "tasks": tasks, "logging_dir": str(folder)}
    if isinstance(workers, int):
        return Here(**common, workers=min(workers, tasks), start_method="spawn")  # a fork of torch's threads may hang
    most = -1 if cluster.most is None else cluster.most
    common |= {"cpus_per_task": cluster.cores, "mem_per_cpu_gb": cluster.memory, "workers": most}
    if workers == "ray":
        ray = require("ray", "cluster", "workers='ray'")
        if not ray.is_initialized():
            ray.init(log_to_driver=False)
        return RayPipelineExecutor(**common)
    hours, logs = f"{cluster.hours}:00:00", str(folder / "slurm")
    own = [each for each in sys.path if each and not each.startswith((sys.prefix, sys.base_prefix))]
    places = {"PATH": f"{Path(sys.executable).parent}:$PATH", "PYTHONPATH": os.pathsep.join(own)}
    environment = "\n".join(f'export {name}="{value}"' for name, value in places.items())
    return SlurmPipelineExecutor(
        **common, time=hours, partition=cluster.partition, job_name="lamella", slurm_logs_folder=logs, mail_type="NONE",
        env_command=environment,
    )  # fmt: skip


def _wait(executor: SlurmPipelineExecutor) -> None:
    """Until all tasks are finished, or Slurm knows none of them any more."""
    while executor.get_incomplete_ranks() and _queued(executor.job_id):
        time.sleep(GLANCE)


def _queued(job: str) -> bool:
    """Whether Slurm knows of a job; the last of several waits for those before it."""
    asked = subprocess.run(["squeue", "--noheader", "--jobs", str(job)], capture_output=True, text=True, check=False)
    return asked.returncode == 0 and bool(asked.stdout.strip())


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

    @property
    def seconds(self) -> float:
        """That writing took in all tasks together, also before a stop."""
        return sum(map(seconds_of, self.folder.glob("written-*.jsonl")))

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
