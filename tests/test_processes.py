"""Processes: a worker does not outlive its run, and one of several can work for itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from lamella import processes

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


def test_a_process_can_work_for_itself_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "2", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(KeyboardInterrupt), processes.alone():
        assert (processes.count(), processes.local_rank(), processes.is_first()) == (1, 0, True)
        raise KeyboardInterrupt
    assert (processes.count(), processes.local_rank(), processes.is_first()) == (4, 1, False)
