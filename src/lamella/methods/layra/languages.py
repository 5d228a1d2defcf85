"""Languages: text to learn from, text to judge by, and the matrix of what learning each of them did to all.

Losses per token say nothing across languages, since a tokenizer may cut one of them into words and another into bytes.
Everything here is in bits per byte of UTF-8 text::

    bits = nats per token * tokens / (bytes * ln 2)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from scipy.stats import rankdata
from torch import Tensor

from lamella.data import PLAIN, InputContext, load_text, windows
from lamella.errors import CalibrationError, MethodError
from lamella.signature import Fixture
from lamella.train import NO_LOSS, Sample, blocks, mean_loss


@dataclass(frozen=True)
class Language:
    """One language.

    Attributes:
        samples: to learn from, such as :func:`lamella.train.blocks` makes; none for a language that is only watched.
        held_out: to judge by; nothing trains on them.
        size: bytes of UTF-8 text that the held-out labels stand for.
        source: where the text comes from, for provenance.
    """

    samples: Sequence[Sample]
    held_out: Sequence[Sample]
    size: int
    source: Mapping[str, Any] = field(default_factory=dict, compare=False)

    metavar: ClassVar[str] = "NAME=TEXT"
    reads_text: ClassVar[bool] = True
    source_help: ClassVar[str] = "pydoc, stdlib, a file or a datasets name"
    example: ClassVar[Fixture] = replace(PLAIN, settings={"sequences": 8, "length": 16, "held_out_sequences": 4})

    def __post_init__(self) -> None:
        if not self.held_out or self.size < 1:
            raise CalibrationError("a language has no held-out text: give some, since forgetting is measured on it")

    @classmethod
    def open(
        cls, name: str, context: InputContext, *, sequences: int = 256, length: int = 256, held_out_sequences: int = 16
    ) -> Language:
        """A language from a text: its calibration split is learnt, its test split judges.

        Args:
            name: see :func:`lamella.load_text`.
            sequences: windows of text to learn from.
            length: tokens in each.
            held_out_sequences: windows to judge by.

        Raises:
            CalibrationError: for a text that is missing, or too short.
        """
        text, test = load_text(name, "calibration"), load_text(name, "test")
        learnt = windows(context.tokenizer, text, sequences, length, context.seed)
        judged = windows(context.tokenizer, test, held_out_sequences, length, context.seed)
        source = {"learnt": text.provenance(learnt), "held out": test.provenance(judged)}
        return replace(cls.of(context.tokenizer, judged, learnt), source=source)

    @classmethod
    def of(cls, tokenizer: Any, held_out: Tensor, samples: Tensor | None = None) -> Language:
        """A language from blocks of tokens, such as :func:`lamella.data.windows` cuts.

        Args:
            tokenizer: says how many bytes the held-out tokens are.
            held_out: blocks to judge by [n, time].
            samples: blocks to learn from [n, time].
        """
        judged = blocks(held_out, loss_on="all")
        learnt = [] if samples is None else blocks(samples, loss_on="all")
        return cls(learnt, judged, sum(_bytes(tokenizer, row) for row in held_out.tolist()))

    def describe(self) -> dict[str, Any]:
        """What provenance says of it."""
        return {"samples": len(self.samples), "held out": len(self.held_out), "bytes": self.size, **self.source}

    @property
    def labels(self) -> int:
        """How many held-out tokens are predicted."""
        return sum(int((sample["labels"] != NO_LOSS).sum()) for sample in self.held_out)

    def bits(self, nats: float) -> float:
        """Bits per byte, from the mean nats per held-out token."""
        return nats * self.labels / (self.size * math.log(2))


def _bytes(tokenizer: Any, row: list[int]) -> int:
    """Of a row's text behind its first token, which nothing predicts."""
    whole, first = (tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in (row, row[:1]))
    return len(whole.encode()) - len(first.encode())


def measure(model: Any, languages: Mapping[str, Language], batch: int = 8) -> dict[str, float]:
    """Held-out bits per byte of every language."""
    was_training = model.training
    model.eval()
    try:
        return {name: each.bits(mean_loss(model, each.held_out, batch=batch)) for name, each in languages.items()}
    finally:
        model.train(was_training)


@dataclass
class Matrix:
    """R[k][j]: held-out bits per byte of language j after learning step k; step 0 is the model as it was given.

    Attributes:
        old: the languages that the model had, by which forgetting is measured.
        new: those that it learns, in their order.
        steps: what each row comes after.
        rows: of all languages.
    """

    old: tuple[str, ...]
    new: tuple[str, ...]
    steps: list[str] = field(default_factory=list)
    rows: list[dict[str, float]] = field(default_factory=list)

    def add(self, step: str, bits: Mapping[str, float]) -> None:
        """One more row."""
        self.steps.append(step)
        self.rows.append(dict(bits))

    def learning(self, name: str, step: int = -1) -> float:
        """G: by how much a new language got cheaper, in bits per byte."""
        return self.rows[0][name] - self.rows[step][name]

    def forgetting(self, step: int = -1, names: Iterable[str] | None = None) -> float:
        """F: by how much old languages got dearer on average, in bits per byte; negative when they got cheaper.

        Args:
            step: after which row.
            names: of which languages; all old ones when left out.

        Raises:
            MethodError: when there are none.
        """
        names = self.old if names is None else tuple(names)
        if not names:
            raise MethodError("forgetting is measured on old languages, and there are none: give some, English first")
        return sum(self.rows[step][name] - self.rows[0][name] for name in names) / len(names)

    def tradeoff(self, step: int = -1) -> float:
        """G - F, with the mean of G over the new languages."""
        return sum(self.learning(name, step) for name in self.new) / len(self.new) - self.forgetting(step)

    def retention(self) -> dict[str, float]:
        """By how much each new language got dearer again after its own turn, in bits per byte."""
        last, turns = self.rows[-1], dict(zip(self.steps, self.rows, strict=True))
        return {name: last[name] - turns[name][name] for name in self.new if name in turns}


def average_ranks(scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The mean place of each method over tasks, 1 for the lowest score; ties share their places.

    Args:
        scores: by method and task; lower is better, as bits per byte are.

    >>> average_ranks({"a": {"x": 1.0, "y": 2.0}, "b": {"x": 1.0, "y": 1.0}})
    {'a': 1.75, 'b': 1.25}
    """
    tasks = list(next(iter(scores.values())))
    places = rankdata([[row[task] for task in tasks] for row in scores.values()], axis=0).mean(1)
    return dict(zip(scores, places.tolist(), strict=True))
