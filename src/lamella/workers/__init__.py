"""Work that falls into tasks: done by this process, by several, or on a cluster, with the same results.

A task is a function of one item. It runs wherever there is room, in any order, and what it returns depends on nothing
but its item. Here and on Ray its result is sent back. On Slurm, where only files come back, a task keeps what it finds
in a folder that all machines see, and returns it at once when it is called again.

    with workers.pool() as pool:
        for number, found in pool.each(task, items):
            ...
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lamella.errors import MethodError
from lamella.extras import require
from lamella.workers.pools import Pool, ProcessPool, SerialPool, on_ray

__all__ = ["Pool", "SerialPool", "Workers"]

GB = 2**30


@dataclass(frozen=True)
class Workers:
    """Who does the tasks of a long job.

    Attributes:
        processes: how many tasks run at once; when left out, one in this process, or as many as a cluster has room for.
        cluster: ``ray`` or ``slurm``, where the tasks run on one.
        address: of a Ray cluster; when left out, the one that is running, or else one that is started here. ``local``
            always starts one.
        partition: of Slurm.
        hours: that a task may take, on Slurm.
        cores: of each task, on a cluster.
        memory: of each core in GB, on a cluster.

    Raises:
        MethodError: for fewer than one process, core, hour or GB, and for Slurm without a partition.
    """

    processes: int | None = None
    cluster: Literal["ray", "slurm"] | None = None
    address: str | None = None
    partition: str = ""
    hours: int = 24
    cores: int = 1
    memory: int = 2

    def __post_init__(self) -> None:
        if self.processes is not None and self.processes < 1:
            raise MethodError(f"processes is {self.processes}: give a number of at least 1")
        if self.cluster not in (None, "ray", "slurm"):
            raise MethodError(f"cluster is '{self.cluster}': give 'ray' or 'slurm'")
        if min(self.hours, self.cores, self.memory) < 1:
            raise MethodError(
                f"hours {self.hours}, cores {self.cores}, memory {self.memory}: give numbers of at least 1"
            )
        if self.cluster == "slurm" and not self.partition:
            raise MethodError("a Slurm cluster needs a partition: `sinfo` lists them")

    def check(self) -> None:
        """Check, before long work, that what it needs is installed.

        Raises:
            MethodError: if Slurm's programs are missing.
            LamellaError: if a package is missing.
        """
        if self.cluster == "ray":
            require("ray", "cluster", "work on a Ray cluster")
        if self.cluster == "slurm":
            require("datatrove", "rewrite", "work on a Slurm cluster")
            if shutil.which("sbatch") is None:
                raise MethodError("sbatch is missing: run the command on a machine that submits jobs to Slurm")

    @contextmanager
    def pool(self, folder: Path | None = None) -> Iterator[Pool]:
        """The workers, while they are needed.

        Args:
            folder: for Slurm's job files and logs, and which tasks are finished; all machines must see it. None for
                tasks that keep nothing in files.

        Raises:
            LamellaError: if there is no Ray cluster at the address.
            MethodError: for Slurm without a folder.
        """
        self.check()
        if self.cluster == "ray":
            with on_ray(self.address, self.processes, self.cores, self.memory * GB) as pool:
                yield pool
        elif self.cluster == "slurm":
            if folder is None:
                raise MethodError(
                    "this does not run on Slurm, from where only files come back: take 'ray' or processes"
                )
            from lamella.workers.slurm import Slurm  # of datatrove, which may be missing

            job = {"partition": self.partition, "time": f"{self.hours}:00:00", "cpus_per_task": self.cores}
            yield Slurm(folder, self.processes, job | {"mem_per_cpu_gb": self.memory})
        else:
            yield SerialPool() if self.processes in (None, 1) else ProcessPool(self.processes)
