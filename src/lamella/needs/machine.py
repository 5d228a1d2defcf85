"""The speed of this machine, measured in a moment, and its memory."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

SIDE = 768  # of the matrices that are multiplied
COPIED = 1 << 25  # elements that are read and written: more than caches hold
ROUNDS = 4  # of each measurement; the fastest counts, since other processes only slow it down


@dataclass
class MachineSpeed:
    """The speed of this machine.

    Attributes:
        bandwidth: bytes that are read or written in a second.
        overhead: seconds of an operation beside its work.
        rates: multiply-adds in a second, by precision; measured when they are asked for.
    """

    bandwidth: float
    overhead: float
    rates: dict[torch.dtype, float] = field(default_factory=dict)

    @classmethod
    def measured(cls) -> MachineSpeed:
        """Measure this machine: a fifth of a second."""
        numbers = torch.ones(COPIED, device=_device())
        small = torch.ones(8, device=_device())
        copying = _fastest(lambda: numbers.mul_(1.0))
        return cls(8 * COPIED / copying, _fastest(lambda: [small + small for _ in range(1000)]) / 1000)

    def seconds(self, multiplications: float, moved: float, dtype: torch.dtype) -> float:
        """Return the time of an operation: that of its arithmetic or of its bytes, whichever takes longer.

        Args:
            multiplications: number of multiply-adds of matrix products and convolutions.
            moved: bytes that are read and written.
            dtype: the precision.
        """
        arithmetic = multiplications / self._rate(dtype) if multiplications else 0.0
        return max(arithmetic, moved / self.bandwidth) + self.overhead

    def _rate(self, dtype: torch.dtype) -> float:
        if dtype not in self.rates:
            kind = dtype if dtype.is_floating_point else torch.float32
            matrix = torch.ones(SIDE, SIDE, dtype=kind, device=_device())
            self.rates[dtype] = SIDE**3 / _fastest(lambda: matrix @ matrix)
        return self.rates[dtype]


def free_memory() -> int:
    """Return the bytes of memory that are free for new work, on the accelerator if there is one."""
    if _device() != "cpu":
        return int(torch.cuda.mem_get_info()[0])
    known = Path("/proc/meminfo")
    if known.exists():
        return int(known.read_text().split("MemAvailable:")[1].split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def used_memory() -> int:
    """Return the bytes that this process takes, which are those of Python and the libraries."""
    return _memory("VmRSS")


def peak_used_memory() -> int:
    """Return the most bytes that this process has taken so far."""
    return _memory("VmHWM")


def _memory(field: str) -> int:
    """Return a field of the process's status on Linux, in bytes; elsewhere the peak.

    On Linux ``ru_maxrss`` would begin with the memory of the process that started this one.
    """
    known = Path("/proc/self/status")
    if known.exists():
        return int(known.read_text().split(f"{field}:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _fastest(work: Callable[[], Any]) -> float:
    """Return the shortest time of some work over a few rounds, in seconds."""
    found = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        work()
        if _device() != "cpu":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - begin)
    return min(found)
