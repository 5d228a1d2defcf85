"""Examples of several tasks: a file for each, or one whose rows say which. What they are called is for the report."""

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
    """Examples, whose answers carry loss, of several tasks.

    Attributes:
        tasks: what the task of each is called, in their order.
    """

    many = True
    metavar = "FILE|TEXT"
    reads_text = True
    source_help = (
        'a .jsonl file for each task, with an example in each line: {"prompt": "...", "completion": "..."}, or '
        '{"messages": [...]} whose last one is the answer; or one file whose lines name their "task". Or a text: '
        "pydoc, stdlib, another file or a datasets name. Repeat it for several"
    )
    example = Fixture(
        "tasks.jsonl",
        "".join(
            f'{{"task": "{task}", "prompt": "{prompt}", "completion": "{answer}"}}\n' for task, prompt, answer in ROWS
        ),
    )

    def __init__(
        self, items: Sequence[Sample], tokenizer: Any = None, said: Any = None, tasks: Sequence[str] = ()
    ) -> None:
        super().__init__(items, tokenizer, said)
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
        """Read the files of one task or several.

        Args:
            names: the files; a task is called as its file, where its lines do not name it.
            max_length: tokens of an example; longer answers are cut at their end. The paper's 2048.
            sequences: blocks of a text.
            length: tokens in each.

        Raises:
            CalibrationError: for a file that is missing, empty or malformed, with its line.
        """
        files = [names] if isinstance(names, str | Path) else list(names)
        samples: list[Sample] = []
        tasks, said = [], []
        for file in files:
            if Path(file).suffix == ".jsonl":
                found: Rows[Sample] = Examples.open(file, context, max_length=max_length)
                tasks += [_named(row, Path(file).stem) for _, row in read_rows(file)]
            else:
                found = Passages.open(str(file), context, sequences=sequences, length=length)
                tasks += [Path(file).stem] * len(found)
            samples += found.items
            said.append(found.metadata)
        return cls(samples, context.tokenizer, said[0] if len(said) == 1 else {"files": said}, tasks)

    def by_task(self) -> dict[str, list[Sample]]:
        """The examples of each task, in their order."""
        found: dict[str, list[Sample]] = {}
        for task, sample in zip(self.tasks, self.items, strict=True):
            found.setdefault(task, []).append(sample)
        return found

    def split(self, share: float, seed: int) -> tuple[list[Sample], dict[str, list[Sample]]]:
        """What to train on, and what is held out of each task: that share, and one at least of two."""
        train, held_out = [], {}
        drawn = random.Random(seed)
        for task, samples in self.by_task().items():
            samples = drawn.sample(samples, len(samples))
            count = max(1, round(share * len(samples))) if share and len(samples) > 1 else 0
            train += samples[count:]
            held_out[task] = samples[:count]
        return train, held_out


def _named(row: Any, otherwise: str) -> str:
    named = row.get("task")
    return named if isinstance(named, str) and named.strip() else otherwise


def with_prompts(sample: Sample) -> Sample:
    """The same example with loss on its prompt, too."""
    labels = sample["input_ids"].clone()
    labels[0] = NO_LOSS  # nothing predicts the first token
    return dict(sample) | {"labels": labels}
