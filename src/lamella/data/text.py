"""Text as an input: windows of tokens, which know where they come from and can be cut anew."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import LongTensor, Tensor

from lamella.data.context import InputContext
from lamella.data.sources import PLAIN, Source, Split, check_text, load_text, windows


class Text(Mapping[str, Tensor]):
    """Some windows of a text. Wherever token ids are wanted, it stands for them.

    Attributes:
        tokens: [sequences, time], without padding.
        source: the split of the text that they are cut from.
        context: what they were read with.
    """

    default = "pydoc"
    metavar = "TEXT"
    reads_text = True
    source_help = "pydoc, stdlib, a file or a datasets name"
    example = replace(PLAIN, settings={"sequences": 2, "length": 16})

    def __init__(self, tokens: LongTensor, source: Source, context: InputContext) -> None:
        self.tokens, self.source, self.context = tokens, source, context

    @classmethod
    def open(cls, name: str, context: InputContext, *, sequences: int = 4, length: int = 256) -> Text:
        """Windows of a text.

        Args:
            name: see :func:`lamella.load_text`.
            sequences: windows of text.
            length: tokens in each.

        Raises:
            CalibrationError: for a text that is missing, or too short.
        """
        source = load_text(name, context.split)
        return cls(windows(context.tokenizer, source, sequences, length, context.seed), source, context)

    @staticmethod
    def check(name: str | Path) -> None:
        """See :func:`lamella.data.sources.check_text`."""
        check_text(name)

    @property
    def tokenizer(self) -> Any:
        """That of the model that reads it."""
        return self.context.tokenizer

    def cut(self, sequences: int, length: int) -> Text:
        """Other windows of the same split."""
        tokens = windows(self.tokenizer, self.source, sequences, length, self.context.seed)
        return Text(tokens, self.source, self.context)

    def part(self, split: Split) -> Text:
        """As many windows of another split."""
        source = load_text(self.source.name, split)
        sequences, length = self.tokens.shape
        return Text(windows(self.tokenizer, source, sequences, length, self.context.seed), source, self.context)

    def further(self, sequences: int) -> Text:
        """So many more windows of the same split, none of which is among these.

        Raises:
            CalibrationError: when the text has not so many more.
        """
        had, length = self.tokens.shape
        tokens = windows(self.tokenizer, self.source, sequences, length, self.context.seed, after=had)
        return Text(tokens, self.source, self.context)

    def describe(self) -> dict[str, Any]:
        """What provenance says of it."""
        return self.source.provenance(self.tokens)

    def __getitem__(self, name: str) -> Tensor:
        return {"input_ids": self.tokens}[name]

    def __iter__(self) -> Iterator[str]:
        yield "input_ids"

    def __len__(self) -> int:
        return 1
