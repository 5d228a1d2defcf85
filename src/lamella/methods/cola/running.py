"""Execution of a CoLa study: with a journal, in this process, in several or on a Ray cluster."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path as File
from typing import Any

import torch

from lamella.files import Journal
from lamella.methods.cola.paths import PathSettings, ProblemStudy
from lamella.methods.cola.samples import Path, Problem, text_digest
from lamella.plan import fingerprint
from lamella.stack import Stack
from lamella.workers import Pool, SerialPool


class KnownAnswers:
    """A cache of computed answers, one JSON line each, so that an interrupted study resumes.

    Args:
        file: the journal; None for no cache.
        stack: the opened model, whose weights are part of the keys.
    """

    def __init__(self, file: str | File | None, stack: Stack) -> None:
        self.known: dict[str, dict[Path, str]] = {}
        self.journal = Journal(None if file is None else File(file), _is_answer)
        if self.journal.path is not None:
            self.model = fingerprint.tensors(stack.model)
        for key, path, answer in self.journal.found:
            self.known.setdefault(key, {})[tuple(path)] = answer

    def of(self, sample: Problem, settings: PathSettings) -> tuple[dict[Path, str], Callable[[Path, str], None]]:
        """Return the cached answers of a sample, and a callback for new answers.

        Args:
            sample: the sample.
            settings: settings of the searches.
        """
        if self.journal.path is None:
            return {}, lambda path, answer: None
        reading = [settings.tokens, settings.chat, sample.options]
        key = text_digest(json.dumps([sample.id, text_digest(sample.prompt), reading, self.model]))
        return self.known.get(key, {}), lambda path, answer: self.journal.add([key, path, answer])


def _is_answer(line: Any) -> bool:
    """Return whether a line of a journal is an answer along some path."""
    match line:
        case [str(), list(path), str()]:
            return all(isinstance(layer, int) for layer in path)
    return False


StudyOne = Callable[..., ProblemStudy]  # of (stack, tokenizer, sample, settings, known answers, callback)


def run_studies(
    pool: Pool,
    study: StudyOne,
    stack: Stack,
    tokenizer: Any,
    samples: list[Problem],
    settings: PathSettings,
    answers: KnownAnswers,
) -> Iterator[ProblemStudy]:
    """Yield the studies of samples as they finish.

    The study of a sample depends on nothing but the sample, so it does not depend on the worker or the order.

    Args:
        pool: the workers.
        study: function that studies one sample.
        stack: the opened model.
        tokenizer: its tokenizer.
        samples: the samples.
        settings: settings of the searches.
        answers: the cache of answers.
    """
    if isinstance(pool, SerialPool):  # each answer is saved immediately
        for sample in samples:
            yield study(stack, tokenizer, sample, settings, *answers.of(sample, settings))
        return
    model = (stack.model, stack.path, stack.name)
    task = _Study(study, model, tokenizer, settings, torch.get_num_threads())
    for _, (done, new) in pool.each(task, [(sample, answers.of(sample, settings)[0]) for sample in samples]):
        note = answers.of(done.sample, settings)[1]
        for path, answer in new.items():
            note(path, answer)
        yield done


@dataclass(frozen=True)
class _Study:
    """Study one sample in another process.

    Attributes:
        study: function that studies one sample.
        model: the model, its path and its name.
        tokenizer: its tokenizer.
        settings: settings of the searches.
        threads: number of torch threads, the same in each process, since the last bit of a sum depends on it.
    """

    study: StudyOne
    model: tuple[Any, File | None, str]
    tokenizer: Any
    settings: PathSettings
    threads: int

    @cached_property
    def stack(self) -> Stack:
        """The model as a stack."""
        torch.set_num_threads(self.threads)
        return Stack(*self.model)

    def __call__(self, given: tuple[Problem, dict[Path, str]]) -> tuple[ProblemStudy, dict[Path, str]]:
        (sample, known), new = given, dict[Path, str]()
        return self.study(self.stack, self.tokenizer, sample, self.settings, known, new.__setitem__), new
