"""Work over documents as datatrove does it: tasks of a fixed size, here one after the other or side by side, or elsewhere.

A task holds the same documents whoever runs it, and its batches are its own, so one process, several and a cluster end
with the same rows. datatrove remembers the tasks that are finished and does not run them again.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lamella.errors import LamellaError, MethodError
from lamella.extras import require
from lamella.progress import tracker

Workers = int | Literal["ray", "slurm"]
EXTRA = "rewrite"
GLANCE = 10.0  # seconds from one look at Slurm's queue to the next


@dataclass(frozen=True)
class Cluster:
    """What a task may take of a cluster, where one is asked to work.

    Attributes:
        partition: of Slurm.
        hours: that a task may run, on Slurm.
        cores: of each task.
        memory: of each core, in GB.
        most: tasks at once; all of them when left out.
    """

    partition: str = ""
    hours: int = 24
    cores: int = 1
    memory: int = 2
    most: int | None = None


def check_workers(workers: Workers, cluster: Cluster) -> None:
    """Check, before long work, that whoever shall do it is there.

    Raises:
        MethodError: for workers that are no number and no cluster.
        LamellaError: when a package is missing.
    """
    require("datatrove", EXTRA, "work over documents")
    if workers == "slurm" and not cluster.partition:
        raise MethodError("workers='slurm' needs a partition: `sinfo` lists them")
    if workers == "ray":
        require("ray", "cluster", "workers='ray'")
    elif workers != "slurm" and (not isinstance(workers, int) or workers < 1):
        raise MethodError(f"workers is {workers!r}; give a number of processes of at least 1, 'ray' or 'slurm'")


def carry_out(steps: Sequence[Any], tasks: int, workers: Workers, folder: Path, cluster: Cluster) -> None:
    """Run a pipeline of datatrove's steps over all tasks, but for those that an earlier run has finished.

    Args:
        steps: each reads, changes or writes the documents of one task.
        tasks: how many.
        workers: processes here, or a cluster, whose machines must all see ``folder``.
        folder: of datatrove's own files: logs, and which tasks are finished.

    Raises:
        LamellaError: when a task does not end well.
    """
    executor = _executor(list(steps), tasks, workers, folder, cluster)
    with tracker("tasks", tasks), _quietly():
        executor.run()
        if workers == "slurm":
            _wait(executor, tasks)
    missing = [rank for rank in range(tasks) if not executor.is_rank_completed(rank)]
    if missing:
        raise LamellaError(
            f"{len(missing)} of {tasks} tasks did not end well, such as task {missing[0]}: see {folder / 'logs'}, and run "
            "the same command again; what is finished is kept"
        )


def _executor(steps: list[Any], tasks: int, workers: Workers, folder: Path, cluster: Cluster) -> Any:
    trove = require("datatrove.executor", EXTRA, "work over documents")
    common: dict[str, Any] = {"pipeline": steps, "tasks": tasks, "logging_dir": str(folder)}
    if isinstance(workers, int):
        return trove.LocalPipelineExecutor(**common, workers=min(workers, tasks), start_method="spawn")
    most = -1 if cluster.most is None else cluster.most
    sizes = {"cpus_per_task": cluster.cores, "mem_per_cpu_gb": cluster.memory, "workers": most}
    if workers == "ray":
        ray = require("ray", "cluster", "workers='ray'")
        if not ray.is_initialized():
            ray.init(log_to_driver=False)
        return require("datatrove.executor.ray", EXTRA, "workers='ray'").RayPipelineExecutor(**common, **sizes)
    hours = f"{cluster.hours}:00:00"
    return trove.SlurmPipelineExecutor(
        **common, **sizes, time=hours, partition=cluster.partition, job_name="lamella", slurm_logs_folder=str(folder / "slurm")
    )


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without datatrove's lines on the screen; its files have them."""
    logger = require("loguru", EXTRA, "work over documents").logger
    logger.disable("datatrove")
    try:
        yield
    finally:
        logger.enable("datatrove")


def _wait(executor: Any, tasks: int, glance: Callable[[], None] = lambda: time.sleep(GLANCE)) -> None:
    """Until all tasks are finished, or Slurm knows none of them any more."""
    while not all(executor.is_rank_completed(rank) for rank in range(tasks)):
        if not executor.job_ids or not _queued(executor.job_ids):
            return
        glance()


def _queued(jobs: Sequence[str]) -> bool:
    asked = subprocess.run(["squeue", "--noheader", "--jobs", ",".join(jobs)], capture_output=True, text=True, check=False)
    return asked.returncode == 0 and bool(asked.stdout.strip())
