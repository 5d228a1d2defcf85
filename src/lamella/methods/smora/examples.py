"""Examples of several tasks: one file per task, or rows that name their task, which is only used in the report."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lamella.data import Examples, InputContext, Passages, Rows, Sample
from lamella.data.samples import NO_LOSS
from lamella.reading import read_rows
from lamella.signature import Fixture

ROWS = (("capital", "France?", "Paris"), ("capital", "Italy?", "Rome"), ("capital", "Spain?", "Madrid"),
        ("capital", "Japan?", "Tokyo"), ("plural", "dog", "dogs"), ("plural", "box", "boxes"), ("plural", "ox", "oxen"),
        ("plural", "cat", "cats"))  # fmt: skip


class TaskExamples(Examples):
    """Examples of several tasks, with loss on their answers.

    Attributes:
        tasks: the name of the task of each example.
    """

    many = True
    metavar = "FILE|TEXT"
    reads_text = True
    source_help = (
        'a .jsonl file per task, with one example per line: {"prompt": "...", "completion": "..."}, or '
        '{"messages": [...]} whose last message is the answer; or one file whose lines have a "task". Or a text: '
        "pydoc, stdlib, another file or a datasets name. Can be repeated"
    )
    example = Fixture(
        "tasks.jsonl",
        "".join(
            f'{{"task": "{task}", "prompt": "{prompt}", "completion": "{answer}"}}\n' for task, prompt, answer in ROWS
        ),
    )

    def __init__(
        self, items: Sequence[Sample], tokenizer: Any = None, metadata: Any = None, tasks: Sequence[str] = ()
    ) -> None:
        super().__init__(items, tokenizer, metadata)
        self.tasks = list(tasks) or ["all"] * len(self)

    @classmethod
    def open(
        cls,
        names: str | Path | Sequence[str | Path],
        context: InputContext,
        *,
        max_length: int = 2048,
        sequences: int = 64,
        length: int = 256,
    ) -> TaskExamples:
        """Load the files of one or several tasks.

        Args:
            names: the files; a task is named after its file, unless its lines name it.
            context: the context of the model, with its tokenizer.
            max_length: maximum number of tokens per example; longer answers are truncated. The paper uses 2048.
            sequences: number of blocks of a text.
            length: tokens per block.

        Raises:
            CalibrationError: for a file that is missing, empty or malformed, with its line.
        """
        files = [names] if isinstance(names, str | Path) else list(names)
        samples: list[Sample] = []
        tasks, metadata = [], []
        for file in files:
            if Path(file).suffix == ".jsonl":
                found: Rows[Sample] = Examples.open(file, context, max_length=max_length)
                tasks += [_task_of(row, Path(file).stem) for _, row in read_rows(file)]
            else:
                found = Passages.open(str(file), context, sequences=sequences, length=length)
                tasks += [Path(file).stem] * len(found)
            samples += found.items
            metadata.append(found.metadata)
        return cls(samples, context.tokenizer, metadata[0] if len(metadata) == 1 else {"files": metadata}, tasks)

    def by_task(self) -> dict[str, list[Sample]]:
        """Return the examples of each task, in order."""
        found: dict[str, list[Sample]] = {}
        for task, sample in zip(self.tasks, self.items, strict=True):
            found.setdefault(task, []).append(sample)
        return found

    def split(self, share: float, seed: int) -> tuple[list[Sample], dict[str, list[Sample]]]:
        """Return the training examples of all tasks, and the held-out ones of each task, at least one of two.

        Args:
            share: fraction of each task to hold out.
            seed: random seed.
        """
        train, held_out = [], {}
        rng = random.Random(seed)
        for task, samples in self.by_task().items():
            samples = rng.sample(samples, len(samples))
            count = max(1, round(share * len(samples))) if share and len(samples) > 1 else 0
            train += samples[count:]
            held_out[task] = samples[:count]
        return train, held_out


def _task_of(row: Any, default: str) -> str:
    task = row.get("task")
    return task if isinstance(task, str) and task.strip() else default


def with_prompts(sample: Sample) -> Sample:
    """Return the example with loss on its prompt, too."""
    labels = sample["input_ids"].clone()
    labels[0] = NO_LOSS  # nothing predicts the first token
    return dict(sample) | {"labels": labels}
