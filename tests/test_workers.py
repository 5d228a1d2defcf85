"""Workers: whoever does the tasks, the same results; and what cannot be had is refused before the work."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from operator import mul
from pathlib import Path
from typing import Any

import pytest

from lamella.errors import LamellaError, MethodError
from lamella.workers import Workers

ITEMS = [3, 1, 4, 1, 5, 9, 2, 6]
SEVENFOLD = partial(mul, 7)


def found(workers: Workers, task: Any = SEVENFOLD) -> dict[int, int]:
    with workers.pool() as pool:
        return dict(pool.each(task, ITEMS))


def test_this_process_does_tasks_one_by_one_in_their_order() -> None:
    seen: list[int] = []
    with Workers().pool() as pool:
        results = pool.each(seen.append, ITEMS)
        assert pool.size == 1 and next(results) == (0, None) and seen == ITEMS[:1]
        assert [number for number, _ in results] == list(range(1, 8)) and seen == ITEMS


@pytest.mark.slow
def test_several_processes_return_what_one_does() -> None:
    assert found(Workers(2)) == found(Workers()) == {number: 7 * each for number, each in enumerate(ITEMS)}
    with Workers(2).pool() as pool:
        pids = set(dict(pool.each(_pid, ITEMS)).values())
    assert os.getpid() not in pids and 1 <= len(pids) <= 2


def _pid(item: int) -> int:
    return os.getpid()


@pytest.mark.slow
def test_a_task_that_fails_says_why_and_one_that_ends_its_process_too() -> None:
    with pytest.raises(ZeroDivisionError):
        found(Workers(2), _divide)
    with pytest.raises(LamellaError, match="a worker process ended without a result"):
        found(Workers(2), os._exit)


def _divide(item: int) -> float:
    return 1 / (item - 9)


@pytest.mark.slow
def test_a_task_that_cannot_be_sent_is_refused() -> None:
    with pytest.raises(LamellaError, match=r"cannot be sent to other processes .* use one process"):
        found(Workers(2), lambda item: item)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_ray_cluster_returns_what_one_process_does_and_is_ended() -> None:
    ray = pytest.importorskip("ray")
    assert found(Workers(2, cluster="ray", address="local", memory=1)) == found(Workers())
    assert not ray.is_initialized()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"processes": 0}, "processes is 0: give a number of at least 1"),
        ({"cluster": "slurm"}, "needs a partition"),
        ({"cluster": "many"}, "give 'ray' or 'slurm'"),
        ({"cores": 0}, "cores 0, memory 2: give numbers of at least 1"),
    ],
)
def test_workers_that_cannot_be_had_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(MethodError, match=said):
        Workers(**settings)


def test_what_a_cluster_needs_is_asked_for_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm = Workers(cluster="slurm", partition="short")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(LamellaError, match=r"needs ray: pip install 'lamella\[cluster\]'"):
        Workers(cluster="ray").check()
    monkeypatch.setitem(sys.modules, "datatrove", None)
    with pytest.raises(LamellaError, match=r"needs datatrove: pip install 'lamella\[rewrite\]'"):
        slurm.check()
    Workers(4).check()


def test_slurm_is_refused_where_nothing_is_kept_in_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Workers, "check", lambda self: None)
    with pytest.raises(MethodError, match="cannot run on Slurm"), Workers(cluster="slurm", partition="x").pool():
        pass


def test_work_of_one_machine_needs_no_datatrove() -> None:
    code = (
        "import sys; sys.modules['datatrove'] = None\n"
        "import lamella.data.steps, lamella.methods.wrap.method, lamella.methods.wrap.steps\n"
        "from lamella.workers import Workers\n"
        "with Workers().pool() as pool: print(list(pool.each(str, [1])))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[(0, '1')]\n"
