"""Processes: a worker does not outlive the run that it works for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

PARENT = """
import subprocess, sys, time
worker = ("import time; from lamella.processes import end_with_parent; end_with_parent(); "
          "print('works', flush=True); time.sleep(60)")
child = subprocess.Popen([sys.executable, "-c", worker], stdout=subprocess.PIPE, text=True)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="no other kernel ends a process with its parent")
def test_a_worker_ends_when_its_run_is_killed() -> None:
    run = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    worker = int(run.stdout.readline())
    os.kill(worker, 0)  # it is there
    run.send_signal(signal.SIGKILL)
    run.wait()
    for _ in range(100):
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("the worker goes on")
