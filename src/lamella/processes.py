"""Jobs of several processes, as started by ``accelerate launch``, and work that one of them does alone."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")  # environment variables that a launcher sets
PR_SET_PDEATHSIG = 1  # of Linux' prctl


def is_first() -> bool:
    """Return whether this process prints and writes: the only one, or the first of several."""
    return os.environ.get("RANK", "0") == "0"


def local_rank() -> int:
    """Return the index of this process on its machine, which is also the index of its accelerator."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def count() -> int:
    """Return the number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def alone() -> Iterator[None]:
    """Run a block as if this process were the only one.

    Used by processes that distribute their work themselves and call code that would otherwise distribute it, too.
    """
    hidden = {name: os.environ.pop(name) for name in LAUNCHED if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def end_with_parent() -> None:
    """Let the kernel end this process when its parent ends, even if that is killed; on Linux only.

    Otherwise a worker would continue the task of a killed run, concurrently with the run that resumes it.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
