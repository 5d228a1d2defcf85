"""Runs a program from standard input, after this process has dropped its privileges. Uses only the standard library.

It is started as a script by ``running.py``. Its first line of output names the dropped privileges; the second is the
token that preceded the program, written when the program has ended.
"""

import contextlib
import ctypes
import os
import platform
import resource
import signal
import struct
import sys

MEMORY = 1 << 30  # bytes of address space
OUTPUT = 1 << 12  # bytes that it may write, if it can write at all
# Of linux/sched.h, linux/prctl.h and linux/landlock.h.
NEW_USER, NEW_NET, NEW_PROCESSES, NEW_IPC = 0x10000000, 0x40000000, 0x20000000, 0x08000000
DEATH_SIGNAL, NO_NEW_PRIVILEGES = 1, 38
CREATE_RULESET, RESTRICT_SELF = 444, 446
WRITING = sum(1 << bit for bit in (1, *range(4, 13)))  # write, remove, make: rights of the first version
TRUNCATE = 1 << 14  # since the third


def limit(seconds: int) -> None:
    """Set the limits that every POSIX system has: time, memory, files."""
    for what, most in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_FSIZE, OUTPUT),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 32),
    ):
        with contextlib.suppress(ValueError, OSError):  # some systems do not support one of them
            resource.setrlimit(what, (most, most))


def leave_the_system(libc: ctypes.CDLL) -> list[str]:
    """Enter separate namespaces: without network, and without other processes."""
    try:
        if libc.unshare(NEW_USER | NEW_NET | NEW_PROCESSES | NEW_IPC) != 0:
            return []
    except AttributeError:  # not Linux
        return []
    child = os.fork()  # the first process of the new namespace, which ends with it
    if child:
        os.waitpid(child, 0)
        os._exit(0)
    libc.prctl(DEATH_SIGNAL, signal.SIGKILL)
    return ["network", "processes"]


def write_nothing(libc: ctypes.CDLL) -> list[str]:
    """Drop all rights to write, create or remove files (Landlock)."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        return []
    version = libc.syscall(CREATE_RULESET, None, 0, 1)
    if version < 1:
        return []
    rights = WRITING | (TRUNCATE if version >= 3 else 0)
    attributes = struct.pack("Q", rights)
    ruleset = libc.syscall(CREATE_RULESET, attributes, len(attributes), 0)
    if ruleset < 0 or libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0) != 0 or libc.syscall(RESTRICT_SELF, ruleset, 0) != 0:
        return []
    os.close(ruleset)
    return ["files"]


def main() -> None:
    """Read a program from standard input, drop privileges, and run it."""
    token, _, program = sys.stdin.read().partition("\n")
    libc = ctypes.CDLL(None, use_errno=True)
    dropped = leave_the_system(libc) + write_nothing(libc)
    limit(int(sys.argv[1]))
    out = os.dup(sys.stdout.fileno())
    os.write(out, (" ".join(dropped) + "\n").encode())
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # the program's output is ignored
    exec(compile(program, "<written>", "exec"), {"__name__": "__main__"})
    os.write(out, f"{token}\n".encode())
    os._exit(0)  # without the program's exit handlers


if __name__ == "__main__":
    main()
