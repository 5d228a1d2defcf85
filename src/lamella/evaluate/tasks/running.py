"""Running generated code: in a separate, restricted process with a time limit."""

from __future__ import annotations

import secrets
import subprocess
import sys
import tempfile
import warnings
from functools import cache
from pathlib import Path

SECONDS = 10  # of CPU time for one program
PATIENCE = 6  # limit of wall time relative to CPU time, for busy machines
SCRIPT = Path(__file__).with_name("limited.py")
WANTED = {"network": "reach the network", "files": "write and remove files", "processes": "see other processes"}


def passes(program: str, seconds: int = SECONDS) -> bool:
    """Return whether a generated program runs to its end without an error.

    It runs in an empty folder, without the environment of this process, with limited time and memory, and, where the
    system supports it (Linux), without network, without write access to files and isolated from other processes. A
    warning names once what could not be restricted.

    Args:
        program: Python source.
        seconds: limit of CPU time.
    """
    _warn()
    return _run(program, seconds)[1]


def _run(program: str, seconds: int = SECONDS) -> tuple[list[str], bool]:
    """Return the restrictions of a program, and whether it ran to its end."""
    token = secrets.token_hex(16)  # a program that exits early, with any exit code, has not written it
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as output:  # its size is limited, too
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
        lines = output.read().decode(errors="replace").splitlines()
    return lines[0].split() if lines else [], lines[1:] == [token]


@cache
def _warn() -> None:
    without, _ = _run("")
    if left := [what for name, what in WANTED.items() if name not in without]:
        warnings.warn(f"generated code is run, and on this system it could {' and '.join(left)}", stacklevel=3)
