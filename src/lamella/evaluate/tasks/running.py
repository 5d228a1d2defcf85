"""Running what a model wrote: in a process of its own that can do little, and not for long."""

from __future__ import annotations

import secrets
import subprocess
import sys
import tempfile
import warnings
from functools import cache
from pathlib import Path

SECONDS = 10  # of the CPU, for one program
PATIENCE = 6  # times as long may pass on the clock, since the machine may have other work
SCRIPT = Path(__file__).with_name("limited.py")
WANTED = {"network": "reach the network", "files": "write and remove files", "processes": "see other processes"}


def passes(program: str, seconds: int = SECONDS) -> bool:
    """Whether a program of a model's runs to its end without an error.

    It runs in an empty folder, without the environment of this process, with little time and memory, and, where the
    system has it (Linux), without a network, without a right to write files and out of sight of other processes. What
    could not be taken away from it is warned of once.

    Args:
        program: Python source.
        seconds: of the CPU that it has.
    """
    _warn()
    return _run(program, seconds)[1]


def _run(program: str, seconds: int = SECONDS) -> tuple[list[str], bool]:
    """What was taken away from a program, and whether it came to its end."""
    token = secrets.token_hex(16)  # a program that leaves early, with whatever exit code, has not written it
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as output:  # whose length is limited, too
        try:
            subprocess.run(
                [sys.executable, "-I", str(SCRIPT), str(seconds)],
                input=f"{token}\n{program}".encode(errors="replace"),
                stdout=output,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env={},
                start_new_session=True,
                timeout=PATIENCE * seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return [], False
        output.seek(0)
        said = output.read().decode(errors="replace").splitlines()
    return said[0].split() if said else [], said[1:] == [token]


@cache
def _warn() -> None:
    without, _ = _run("")
    if left := [what for name, what in WANTED.items() if name not in without]:
        warnings.warn(f"what the model writes is run, and on this system it could {' and '.join(left)}", stacklevel=3)
