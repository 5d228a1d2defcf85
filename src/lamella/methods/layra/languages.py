"""Languages: training text, held-out text, and the matrix of losses on all languages after learning each of them.

Losses per token are not comparable across languages, because a tokenizer may cut one into words and another into bytes.
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
        samples: training samples, such as from :func:`lamella.train.blocks`; empty for a language that is only
            measured.
        held_out: test samples.
        size: number of UTF-8 bytes of the text of the held-out labels.
        source: origin of the text, for provenance.
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
            raise CalibrationError("a language has no held-out text, on which forgetting is measured: give some")

    @classmethod
    def open(
        cls, name: str, context: InputContext, *, sequences: int = 256, length: int = 256, held_out_sequences: int = 16
    ) -> Language:
        """Open a text as a language: its calibration split for training, its test split for evaluation.

        Args:
            name: see :func:`lamella.load_text`.
            context: tokenizer and seed to use.
            sequences: number of training windows.
            length: tokens per window.
            held_out_sequences: number of test windows.

        Returns:
            The language.

        Raises:
            CalibrationError: for a text that is missing, or too short.
        """
        text, test = load_text(name, "calibration"), load_text(name, "test")
        training = windows(context.tokenizer, text, sequences, length, context.seed)
        held_out_tokens = windows(context.tokenizer, test, held_out_sequences, length, context.seed)
        source = {"training": text.provenance(training), "held_out": test.provenance(held_out_tokens)}
        return replace(cls.of(context.tokenizer, held_out_tokens, training), source=source)

    @classmethod
    def of(cls, tokenizer: Any, held_out: Tensor, samples: Tensor | None = None) -> Language:
        """Create a language from blocks of tokens, such as from :func:`lamella.data.windows`.

        Args:
            tokenizer: determines the number of bytes of the held-out tokens.
            held_out: test blocks [n, time].
            samples: training blocks [n, time].
        """
        held_out_tokens = blocks(held_out, loss_on="all")
        training = [] if samples is None else blocks(samples, loss_on="all")
        return cls(training, held_out_tokens, sum(_bytes(tokenizer, row) for row in held_out.tolist()))

    def describe(self) -> dict[str, Any]:
        """Metadata for provenance."""
        return {"samples": len(self.samples), "held_out": len(self.held_out), "bytes": self.size, **self.source}

    @property
    def labels(self) -> int:
        """Number of held-out tokens that are predicted."""
        return sum(int((sample["labels"] != NO_LOSS).sum()) for sample in self.held_out)

    def bits(self, nats: float) -> float:
        """Convert the mean nats per held-out token to bits per byte."""
        return nats * self.labels / (self.size * math.log(2))


def _bytes(tokenizer: Any, row: list[int]) -> int:
    """Bytes of a row's text after its first token, which is not predicted."""
    whole, first = (tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in (row, row[:1]))
    return len(whole.encode()) - len(first.encode())


def measure(model: Any, languages: Mapping[str, Language], batch: int = 8) -> dict[str, float]:
    """Measure the held-out bits per byte of every language.

    Args:
        model: the model.
        languages: the languages by name.
        batch: batch size.
    """
    was_training = model.training
    model.eval()
    try:
        return {name: each.bits(mean_loss(model, each.held_out, batch=batch)) for name, each in languages.items()}
    finally:
        model.train(was_training)


@dataclass
class Matrix:
    """R[k][j]: held-out bits per byte of language j after learning step k; step 0 is the original model.

    Attributes:
        old: languages that the model had, on which forgetting is measured.
        new: languages to learn, in order.
        steps: name of the step before each row.
        rows: bits per byte of all languages.
    """

    old: tuple[str, ...]
    new: tuple[str, ...]
    steps: list[str] = field(default_factory=list)
    rows: list[dict[str, float]] = field(default_factory=list)

    def add(self, step: str, bits: Mapping[str, float]) -> None:
        """Append a row.

        Args:
            step: name of the step.
            bits: bits per byte of all languages.
        """
        self.steps.append(step)
        self.rows.append(dict(bits))

    def learning(self, name: str, step: int = -1) -> float:
        """G: decrease of a new language's loss, in bits per byte.

        Args:
            name: the language.
            step: index of the row.
        """
        return self.rows[0][name] - self.rows[step][name]

    def forgetting(self, step: int = -1, names: Iterable[str] | None = None) -> float:
        """F: mean increase of the loss on old languages, in bits per byte; negative if it decreased.

        Args:
            step: index of the row.
            names: languages; defaults to all old ones.

        Raises:
            MethodError: if there are none.
        """
        names = self.old if names is None else tuple(names)
        if not names:
            raise MethodError("forgetting is measured on old languages, but there are none: give some, English first")
        return sum(self.rows[step][name] - self.rows[0][name] for name in names) / len(names)

    def tradeoff(self, step: int = -1) -> float:
        """G - F, with the mean of G over the new languages."""
        return sum(self.learning(name, step) for name in self.new) / len(self.new) - self.forgetting(step)

    def retention(self) -> dict[str, float]:
        """Increase of each new language's loss since it was learned, in bits per byte."""
        last, turns = self.rows[-1], dict(zip(self.steps, self.rows, strict=True))
        return {name: last[name] - turns[name][name] for name in self.new if name in turns}


def average_ranks(scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Mean rank of each method over tasks, 1 for the lowest score; ties share their ranks.

    Args:
        scores: by method and task; lower is better, as for bits per byte.

    >>> average_ranks({"a": {"x": 1.0, "y": 2.0}, "b": {"x": 1.0, "y": 1.0}})
    {'a': 1.75, 'b': 1.25}
    """
    tasks = list(next(iter(scores.values())))
    places = rankdata([[row[task] for task in tasks] for row in scores.values()], axis=0).mean(1)
    return dict(zip(scores, places.tolist(), strict=True))
