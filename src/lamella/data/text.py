"""Windows of a text, with the source that they were cut from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import LongTensor, Tensor

from lamella.data.context import InputContext
from lamella.data.sources import PLAIN, Source, Split, check_text, load_text, windows


class Text(Mapping[str, Tensor]):
    """Windows of a text. It can be used wherever token ids are expected.

    Args:
        tokens: token ids [sequences, time], without padding.
        source: the split of the text that the windows are cut from.
        context: the context that they were opened in.

    Attributes:
        tokens: token ids [sequences, time], without padding.
        source: the split of the text that the windows are cut from.
        context: the context that they were opened in.
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
        """Cut windows from a text.

        Args:
            name: the text; see :func:`lamella.load_text`.
            context: gives the tokenizer, the split and the random seed.
            sequences: number of windows.
            length: tokens in each window.

        Raises:
            CalibrationError: if the text does not exist or is too short.
        """
        source = load_text(name, context.split)
        return cls(windows(context.tokenizer, source, sequences, length, context.seed), source, context)

    @staticmethod
    def check(name: str | Path) -> None:
        """Check that the text exists; see :func:`lamella.data.sources.check_text`."""
        check_text(name)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that the windows were cut with."""
        return self.context.tokenizer

    @property
    def strings(self) -> list[str]:
        """The windows as text, without a token that begins them and without characters that they divide."""
        begin = self.tokenizer.bos_token_id
        rows = [row[1:] if row[0] == begin else row for row in self.tokens.tolist()]
        return [self.tokenizer.decode(row, clean_up_tokenization_spaces=False).strip("\ufffd") for row in rows]

    def cut(self, sequences: int, length: int) -> Text:
        """Cut other windows from the same split.

        Args:
            sequences: number of windows.
            length: tokens in each window.
        """
        tokens = windows(self.tokenizer, self.source, sequences, length, self.context.seed)
        return Text(tokens, self.source, self.context)

    def part(self, split: Split) -> Text:
        """Cut as many windows from another split."""
        source = load_text(self.source.name, split)
        sequences, length = self.tokens.shape
        return Text(windows(self.tokenizer, source, sequences, length, self.context.seed), source, self.context)

    def more(self, sequences: int) -> Text:
        """Cut more windows from the same split, none of which is among these.

        Args:
            sequences: number of windows.

        Raises:
            CalibrationError: if the text is too short.
        """
        had, length = self.tokens.shape
        tokens = windows(self.tokenizer, self.source, sequences, length, self.context.seed, after=had)
        return Text(tokens, self.source, self.context)

    def describe(self) -> dict[str, Any]:
        """Return the description of the text, for provenance."""
        return self.source.provenance(self.tokens)

    def __getitem__(self, name: str) -> Tensor:
        return {"input_ids": self.tokens}[name]

    def __iter__(self) -> Iterator[str]:
        yield "input_ids"

    def __len__(self) -> int:
        return 1
