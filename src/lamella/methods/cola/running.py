"""How a CoLa study runs: with a journal, by this process, several or a Ray cluster."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path as File
from typing import Any

import torch

from lamella.files import Journal
from lamella.methods.cola.paths import ProblemStudy, Settings
from lamella.methods.cola.samples import Path, Problem, text_digest
from lamella.plan import fingerprint
from lamella.stack import Stack
from lamella.workers import Pool, SerialPool


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


def studied(
    pool: Pool,
    study: StudyOne,
    stack: Stack,
    tokenizer: Any,
    samples: list[Problem],
    settings: Settings,
    answers: KnownAnswers,
) -> Iterator[ProblemStudy]:
    """The studies of samples, as they end.

    A sample's study depends on nothing but the sample, so it does not depend on who runs it, or when.
    """
    if isinstance(pool, SerialPool):  # where each answer is kept at once
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
        threads: of torch: the same in each process, since the last bit of a sum depends on them.
    """

    study: StudyOne
    model: tuple[Any, File | None, str]
    tokenizer: Any
    settings: Settings
    threads: int

    @cached_property
    def stack(self) -> Stack:
        torch.set_num_threads(self.threads)
        return Stack(*self.model)

    def __call__(self, given: tuple[Problem, dict[Path, str]]) -> tuple[ProblemStudy, dict[Path, str]]:
        (sample, known), new = given, dict[Path, str]()
        return self.study(self.stack, self.tokenizer, sample, self.settings, known, new.__setitem__), new
