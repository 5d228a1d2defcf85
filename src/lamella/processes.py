"""Several processes that do one job together, as ``accelerate launch`` starts them: what one of them does alone."""

from __future__ import annotations

import os


def is_first() -> bool:
    """Whether this process speaks and writes: the only one, or the first of several."""
    return os.environ.get("RANK", "0") == "0"


def local_rank() -> int:
    """The number of this process on its machine, and of the accelerator that is its own."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def count() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))
