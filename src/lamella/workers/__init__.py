"""Long jobs as independent tasks: in this process, in several processes, or on a cluster, with equal results.

A task is a function of one item. Tasks run in any order, and the result of a task depends on its item only. In local
processes and on Ray, results are sent back. On Slurm, where only files come back, a task keeps its result in a folder
that all machines see, and returns it at once when it is called again.

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
    """Where the tasks of a long job run.

    Attributes:
        processes: number of tasks that run at once; by default one in this process, or as many as the cluster has
            resources for.
        cluster: ``ray`` or ``slurm``, to run the tasks on a cluster.
        address: address of a Ray cluster; by default the running one, or else one that is started here. ``local``
            always starts one.
        partition: Slurm partition.
        hours: time limit of a task on Slurm, in hours.
        cores: CPU cores of each task on a cluster.
        memory: memory of each core on a cluster, in GB.

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
        """Check, before long work, that everything needed is installed.

        Raises:
            MethodError: if the programs of Slurm are missing.
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
        """Yield the pool of workers.

        Args:
            folder: for Slurm's job files, logs and list of finished tasks; all machines must see it. None for tasks
                that keep nothing in files.

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
                raise MethodError("this job cannot run on Slurm, which returns files only: use 'ray' or processes")
            from lamella.workers.slurm import Slurm  # needs datatrove, which is optional

            job = {"partition": self.partition, "time": f"{self.hours}:00:00", "cpus_per_task": self.cores}
            yield Slurm(folder, self.processes, job | {"mem_per_cpu_gb": self.memory})
        else:
            yield SerialPool() if self.processes in (None, 1) else ProcessPool(self.processes)
