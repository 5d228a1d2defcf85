"""What it costs and gains that waiting threads sleep instead of spinning, on an idle and on a busy machine.

By default, the threads of OpenMP spin for some time when they wait for each other. The command line sets
OMP_WAIT_POLICY=PASSIVE and a small GOMP_SPINCOUNT, unless the environment has a policy. Two processes, one of each,
decode and process prompts in turns, and one is stopped while the other works; then both again beside other busy
processes.

    python benchmarks/waiting.py            # five minutes on an idle machine
    python benchmarks/waiting.py --quick    # few rounds
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from lamella.results import Record

SPINNING, SLEEPING = "spinning", "sleeping"
THREADS = 2
BUSY = (0, 4)  # other processes
WORK = {"prompts of 4 x 256 tokens": 2, "decoding steps": 16}  # and how many of them are timed at once
COST = 0.02  # accepted on an idle machine
CHILD = """
import json, sys, time
import torch
import lamella
torch.set_num_threads(int(sys.argv[1]))
model = lamella.open("smollm2").model
ids = torch.arange(1024).view(4, 256) + 1000
def prompts(count):
    for _ in range(count):
        model(ids, use_cache=False, logits_to_keep=1)
def steps(count):
    cache = None
    for _ in range(count):
        output = model(ids[:1, :1], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
work = {"prompts of 4 x 256 tokens": prompts, "decoding steps": steps}
with torch.inference_mode():
    for line in sys.stdin:
        name, count = json.loads(line)
        begin, spent = time.perf_counter(), time.process_time()
        work[name](count)
        print(json.dumps([time.perf_counter() - begin, time.process_time() - spent]), flush=True)
"""


class Worker:
    """A process that works when it is asked."""

    def __init__(self, policy: str) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS)}
        environment.pop("OMP_WAIT_POLICY", None)
        if policy == SLEEPING:
            environment |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "3000"}
        command = [sys.executable, "-c", CHILD, str(THREADS)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, env=environment, text=True, **pipes)
        self._process.send_signal(signal.SIGSTOP)

    def time(self, name: str) -> tuple[float, float]:
        """Return the seconds and the CPU seconds of some work."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.send_signal(signal.SIGCONT)
        print(json.dumps([name, WORK[name]]), file=self._process.stdin, flush=True)
        seconds, spent = json.loads(self._process.stdout.readline())
        self._process.send_signal(signal.SIGSTOP)
        return seconds, spent

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds")
    quick = parser.parse_args().quick
    rounds = 2 if quick else 5
    workers = {policy: Worker(policy) for policy in (SPINNING, SLEEPING)}
    record = Record("waiting", f"SmolLM2, {THREADS} threads, medians of {rounds} rounds, in which both take turns", 0)
    rows = []
    try:
        for others in BUSY:
            busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(others)]
            try:
                for name in WORK:
                    for worker in workers.values():
                        worker.time(name)  # once before measuring
                    found = {policy: [] for policy in (SPINNING, SLEEPING)}
                    for number in range(rounds):
                        for policy in (SPINNING, SLEEPING) if number % 2 else (SLEEPING, SPINNING):
                            found[policy].append(workers[policy].time(name))
                    rows.append(row_of(record, others, name, found))
            finally:
                for each in busy:
                    each.kill()
                    each.wait()
    finally:
        for worker in workers.values():
            worker.end()
    columns = ["other busy processes", "work", "seconds, spinning", "sleeping", "CPU seconds, spinning", "sleeping"]
    record.table("Threads that wait by spinning and by sleeping", [*columns, "time, sleeping / spinning"], rows)
    return record.finish(Path(__file__).parent / "results" / f"waiting{'-quick' if quick else ''}.json")


def row_of(record: Record, others: int, name: str, found: dict[str, list[tuple[float, float]]]) -> list[Any]:
    """Return a row of the table, and check the ratio on an idle machine."""
    spinning, sleeping = (found[policy] for policy in (SPINNING, SLEEPING))
    ratios = [ours[0] / theirs[0] for ours, theirs in zip(sleeping, spinning, strict=True)]
    low, middle, high = (
        statistics.quantiles(ratios, n=4) if len(ratios) > 3 else (min(ratios), *ratios[-1:], max(ratios))
    )
    if not others:
        what = f"{name} on an idle machine, time with sleeping threads over that with spinning ones"
        record.check(what, f"at most {1 + COST:g}", f"{middle:.3f} ({low:.3f} to {high:.3f})", middle <= 1 + COST)
    of = [statistics.median(each[which] for each in times) for which in (0, 1) for times in (spinning, sleeping)]
    return [others, name, *of, f"{middle:.3f} ({low:.3f} to {high:.3f})"]


if __name__ == "__main__":
    raise SystemExit(main())
