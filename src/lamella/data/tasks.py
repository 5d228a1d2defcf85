"""Who does the tasks of long work over documents: this process, several, or a cluster."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import Literal

from lamella.errors import MethodError
from lamella.extras import require

Workers = int | Literal["ray", "slurm"]
EXTRA = "rewrite"


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
    if workers == "slurm" and shutil.which("sbatch") is None:
        raise MethodError("workers='slurm' needs sbatch, which is not here: run it where Slurm takes jobs")
    if workers == "ray":
        require("ray", "cluster", "workers='ray'")
    elif workers != "slurm" and (not isinstance(workers, int) or workers < 1):
        raise MethodError(f"workers is {workers!r}; give a number of processes of at least 1, 'ray' or 'slurm'")
