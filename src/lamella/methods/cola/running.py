"""How a CoLa study runs: with a journal, in this process or over a Ray cluster."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path as File
from typing import Any

import torch

from lamella.errors import LamellaError
from lamella.extras import require
from lamella.files import Journal
from lamella.methods.cola.paths import ProblemStudy, Settings
from lamella.methods.cola.samples import Path, Problem, text_digest
from lamella.plan import fingerprint
from lamella.stack import Stack


class KnownAnswers:
    """Answers that were already computed, one JSON line each, so that an interrupted study goes on where it was."""

    def __init__(self, file: str | File | None, stack: Stack) -> None:
        self.known: dict[str, dict[Path, str]] = {}
        self.journal = Journal(None if file is None else File(file), _is_answer)
        if self.journal.path is not None:
            self.model = fingerprint.tensors(stack.model)
        for key, path, answer in self.journal.found:
            self.known.setdefault(key, {})[tuple(path)] = answer

    def of(self, sample: Problem, settings: Settings) -> tuple[dict[Path, str], Callable[[Path, str], None]]:
        """What is known of a sample, and what to call with each new answer."""
        if self.journal.path is None:
            return {}, lambda path, answer: None
        reading = [settings.tokens, settings.chat, sample.options]
        key = text_digest(json.dumps([sample.id, text_digest(sample.prompt), reading, self.model]))
        return self.known.get(key, {}), lambda path, answer: self.journal.add([key, path, answer])


def _is_answer(line: Any) -> bool:
    """Whether a line of a journal is the answer to some question along some path."""
    match line:
        case [str(), list(path), str()]:
            return all(isinstance(layer, int) for layer in path)
    return False


StudyOne = Callable[..., ProblemStudy]  # of (stack, tokenizer, sample, settings, known answers, what takes new ones)


def here(
    study: StudyOne, stack: Stack, tokenizer: Any, samples: list[Problem], settings: Settings, answers: KnownAnswers
) -> Iterator[ProblemStudy]:
    """Sample by sample in this process."""
    for sample in samples:
        yield study(stack, tokenizer, sample, settings, *answers.of(sample, settings))


def over_cluster(
    address: str,
    study: StudyOne,
    stack: Stack,
    tokenizer: Any,
    samples: list[Problem],
    settings: Settings,
    answers: KnownAnswers,
) -> Iterator[ProblemStudy]:
    """Spread samples over a Ray cluster: one model per worker, one sample per task, in the order in which they finish.

    A sample's study depends on nothing but the sample, so it does not depend on who runs it, or when.

    Args:
        address: of the cluster; ``auto`` for the one that runs, ``local`` to start one here.

    Raises:
        LamellaError: without ray, or when the cluster does not answer.
    """
    ray = require("ray", "cluster", "searching over a cluster")
    pool_of = require("ray.util", "cluster", "searching over a cluster").ActorPool
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
        threads = torch.get_num_threads()  # the same in each worker: the last bit of a sum depends on them
        workers = max(1, min(len(samples), int(ray.cluster_resources().get("CPU", 1)) // threads))
        model = ray.put((stack.model, stack.path, stack.name, tokenizer))
        worker = ray.remote(num_cpus=threads)(_Worker)
        pool = pool_of([worker.remote(model, study, threads) for _ in range(workers)])
        jobs = [(sample, settings, answers.of(sample, settings)[0]) for sample in samples]
        for done, new in pool.map_unordered(lambda worker, job: worker.run.remote(*job), jobs):
            note = answers.of(done.sample, settings)[1]
            for path, answer in new.items():
                note(path, answer)
            yield done
    finally:
        if started:
            ray.shutdown()


class _Worker:
    """A process of the cluster, with the model."""

    def __init__(self, model: tuple[Any, File | None, str, Any], study: StudyOne, threads: int) -> None:
        torch.set_num_threads(threads)
        self.stack, self.tokenizer, self.study = Stack(*model[:3]), model[3], study

    def run(self, sample: Problem, settings: Settings, known: dict[Path, str]) -> tuple[ProblemStudy, dict[Path, str]]:
        new: dict[Path, str] = {}
        return self.study(self.stack, self.tokenizer, sample, settings, known, new.__setitem__), new
