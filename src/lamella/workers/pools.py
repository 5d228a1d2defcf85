"""Pools of workers: this process, processes of this machine, and a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import active_children, get_context
from pickle import PicklingError
from typing import Any, Protocol, TypeVar

from lamella.errors import LamellaError
from lamella.extras import require
from lamella.processes import end_with_parent

Item = TypeVar("Item")
Found = TypeVar("Found")


class Pool(Protocol):
    """A pool of workers.

    Attributes:
        size: number of tasks that run at once.
    """

    size: int

    def each(self, task: Callable[[Item], Found], items: Sequence[Item]) -> Iterator[tuple[int, Found]]:
        """Yield the index of each item and the result of its task, in the order in which the tasks end.

        Args:
            task: a function of one item.
            items: the items.

        Raises:
            LamellaError: if a task cannot be sent to another process, or a process ends without a result. An error in a
                task is raised unchanged, and the other tasks are stopped.
        """
        ...


class SerialPool:
    """A pool that runs tasks one after the other in this process."""

    size = 1

    def each(self, task: Callable[[Item], Found], items: Sequence[Item]) -> Iterator[tuple[int, Found]]:
        """Yield the index of each item and the result of its task.

        Args:
            task: function of one item.
            items: the items, which run in their order.
        """
        for number, item in enumerate(items):
            yield number, task(item)


class ProcessPool:
    """A pool of processes on this machine, which are spawned: a fork of a process with torch threads may hang."""

    def __init__(self, size: int) -> None:
        self.size = size

    def each(self, task: Callable[[Item], Found], items: Sequence[Item]) -> Iterator[tuple[int, Found]]:
        """Yield the index of each item and the result of its task.

        Args:
            task: function of one item, defined at the top of a module so that it can be pickled.
            items: the items, which must be picklable; their results come in the order of completion.
        """
        before = set(active_children())
        workers = max(1, min(self.size, len(items)))
        with ProcessPoolExecutor(workers, get_context("spawn"), initializer=_begin, initargs=(task,)) as pool:
            try:
                numbers = {pool.submit(_do, item): number for number, item in enumerate(items)}
                for future in as_completed(numbers):
                    yield numbers[future], future.result()
            except BaseException as error:
                for process in set(active_children()) - before:
                    process.terminate()  # a task has failed, or the caller has stopped iterating
                if isinstance(error, BrokenProcessPool):
                    fix = "start it from a script, under `if __name__ == '__main__':`, check that memory is sufficient"
                    raise LamellaError(f"a worker process ended without a result; {fix}, or use one process") from error
                if isinstance(error, PicklingError | AttributeError | TypeError) and "pickle" in str(error).lower():
                    fix = "define what it uses at the top of a module, or use one process"
                    raise LamellaError(f"the job cannot be sent to other processes ({error}); {fix}") from error
                raise


_task: Any = None  # of this worker process


def _begin(task: Callable[[Any], Any]) -> None:
    global _task
    end_with_parent()
    _task = task


def _do(item: Any) -> Any:
    return _task(item)


class _Ray:
    """A pool of actors on a Ray cluster, each with a copy of the task."""

    def __init__(self, ray: Any, size: int, needs: dict[str, Any]) -> None:
        self.ray, self.size, self.needs = ray, size, needs

    def each(self, task: Callable[[Item], Found], items: Sequence[Item]) -> Iterator[tuple[int, Found]]:
        """Yield the index of each item and the result of its task."""
        pool_of = require("ray.util", "cluster", "work on a Ray cluster").ActorPool
        actor, held = self.ray.remote(**self.needs)(_Actor), self.ray.put(task)
        pool = pool_of([actor.remote(held) for _ in range(max(1, min(self.size, len(items))))])
        yield from pool.map_unordered(lambda worker, job: worker.do.remote(*job), list(enumerate(items)))


class _Actor:
    def __init__(self, task: Callable[[Any], Any]) -> None:
        self.task = task

    def do(self, number: int, item: Any) -> tuple[int, Any]:
        return number, self.task(item)


@contextmanager
def on_ray(address: str | None, most: int | None, cores: int, memory: int) -> Iterator[Pool]:
    """Yield a pool on a Ray cluster, which keeps running afterwards if it was running before.

    Args:
        address: see :class:`lamella.workers.Workers`.
        most: maximum number of workers; None for as many as the cluster has resources for.
        cores: CPU cores of each worker.
        memory: memory of each core, in bytes.

    Raises:
        LamellaError: if ray is not installed, or there is no cluster at the address.
    """
    ray = require("ray", "cluster", "work on a Ray cluster")
    started = not ray.is_initialized()
    if started:
        try:
            ray.init(address=address, log_to_driver=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise LamellaError(
                f"no Ray cluster at '{address}': give its address, or 'local' to start one here ({reason})"
            ) from None
    try:
        resources = ray.cluster_resources()
        available = min(int(resources.get("CPU", 1)) // cores, int(resources.get("memory", 0)) // (cores * memory))
        yield _Ray(ray, max(1, available if most is None else most), {"num_cpus": cores, "memory": cores * memory})
    finally:
        if started:
            ray.shutdown()
