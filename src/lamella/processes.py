"""Several processes that do one job together, as ``accelerate launch`` starts them: what one of them does alone."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")  # what a launcher says of a process
PR_SET_PDEATHSIG = 1  # of Linux' prctl


def is_first() -> bool:
    """Whether this process speaks and writes: the only one, or the first of several."""
    return os.environ.get("RANK", "0") == "0"


def local_rank() -> int:
    """The number of this process on its machine, and of the accelerator that is its own."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def count() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def alone() -> Iterator[None]:
    """Let this process work for itself inside this block, as if it were the only one.

    Processes that share their work in a way of their own call what would otherwise share it in its way.
    """
    hidden = {name: os.environ.pop(name) for name in LAUNCHED if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def end_with_parent() -> None:
    """Let the kernel end this process when the one that started it ends, be it killed: on Linux, and in no other.

    Else a worker would go on with the task of a run that was killed, beside the run that goes on from there.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
