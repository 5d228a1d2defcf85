"""Workers on a Slurm cluster, by datatrove's executor. Imported only if datatrove is installed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from datatrove.executor import SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep

from lamella.errors import LamellaError

INTERVAL = 10.0  # seconds between two queries of Slurm's queue
Item = TypeVar("Item")
Found = TypeVar("Found")


class Slurm:
    """A job array on Slurm. Tasks that an earlier run has finished are not repeated."""

    def __init__(self, folder: Path, most: int | None, job: dict[str, Any]) -> None:
        self.folder, self.size, self.job = folder, most or 1, job
        self.most = -1 if most is None else most  # unlimited, for datatrove

    def each(self, task: Callable[[Item], Found], items: Sequence[Item]) -> Iterator[tuple[int, Found]]:
        """Yield the index of each item and the result of its task, when all tasks are finished.

        Args:
            task: function of one item, which must be picklable.
            items: the items, one task of the job array for each.
        """
        executor = SlurmPipelineExecutor(
            [_Tasks(task, items)], len(items), workers=self.most, job_name="lamella", mail_type="NONE",
            logging_dir=str(self.folder), slurm_logs_folder=str(self.folder / "slurm"), env_command=_environment(),
            **self.job,
        )  # fmt: skip
        executor.run()
        while executor.get_incomplete_ranks() and _queued(executor.job_id):
            time.sleep(INTERVAL)
        if missing := executor.get_incomplete_ranks():
            raise LamellaError(
                f"{len(missing)} of {len(items)} tasks did not finish, such as task {missing[0]}: see "
                f"{self.folder / 'logs'}, and run the same command again; finished tasks are kept"
            )
        for number, item in enumerate(items):
            yield number, task(item)


class _Tasks(PipelineStep):
    """Runs the task of a rank."""

    type, name = "lamella", "task"

    def __init__(self, task: Callable[[Any], Any], items: Sequence[Any]) -> None:
        super().__init__()
        self.task, self.items = task, items

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Run the task of a rank."""
        self.task(self.items[rank])
        yield from ()


def _environment() -> str:
    """Return shell commands with which a job finds the interpreter and the modules of this process."""
    own = [each for each in sys.path if each and not each.startswith((sys.prefix, sys.base_prefix))]
    variables = {"PATH": f"{Path(sys.executable).parent}:$PATH", "PYTHONPATH": os.pathsep.join(own)}
    return "\n".join(f'export {name}="{value}"' for name, value in variables.items())


def _queued(job: str) -> bool:
    """Return whether Slurm knows a job; the last of several waits for those before it."""
    queue = subprocess.run(["squeue", "--noheader", "--jobs", str(job)], capture_output=True, text=True, check=False)
    return queue.returncode == 0 and bool(queue.stdout.strip())
