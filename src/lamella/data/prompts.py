"""Prompts with what follows them, one sequence for each row of a user's file: a sample of the user's traffic."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from annotated_types import Ge
from torch import Tensor

from lamella.data.context import InputContext
from lamella.data.examples import ChatExample, conversation
from lamella.data.lazy import Lazy
from lamella.data.rows import Rows
from lamella.data.sources import CUTS, Split, check_text, split_rows
from lamella.errors import CalibrationError
from lamella.progress import track
from lamella.reading import RowFile
from lamella.signature import Fixture
from lamella.stack import Model

HINT = (
    'write {"messages": [{"role": "user", "content": "..."}, ...]}, {"prompt": "..."} with or without a "response", or '
    '{"text": "..."}'
)


ANSWER = 64  # maximum tokens that the original writes after a prompt without an answer


class ContinuedPrompt(NamedTuple):
    """A prompt with what follows it.

    Attributes:
        tokens: token ids of both [time].
        length: number of tokens of the prompt; all of them if nothing follows.
    """

    tokens: Tensor
    length: int


class Prompts(Rows[ContinuedPrompt]):
    """Prompts of any lengths, each with what follows it; rows are read and tokenized on access.

    A conversation is a prompt up to its last answer, in the model's chat template; nothing follows one that ends with a
    question. Of a text, the first quarter is the prompt.
    """

    metavar = "FILE"
    source_help = (
        'a .jsonl file with one prompt in each line: {"messages": [...]}, {"prompt": "..."} with or without a '
        '"response", or {"text": "..."}'
    )
    example = Fixture(
        "prompts.jsonl",
        '{"prompt": "Who keeps the key?", "response": "The eldest of the bell ringers keeps it."}\n'
        '{"prompt": "What hangs behind the third bell?"}\n'
        '{"text": "A kettle needs four minutes to boil a litre of water. With its lid off it needs five."}\n',
    )

    def __init__(
        self,
        items: Sequence[ContinuedPrompt],
        tokenizer: Any = None,
        metadata: Mapping[str, Any] | None = None,
        opened: Any = None,
    ) -> None:
        super().__init__(items, tokenizer, metadata)
        self._opened = opened

    @classmethod
    def open(
        cls,
        name: str | Path,
        context: InputContext,
        *,
        prompts: Annotated[int, Ge(1)] | None = None,
        max_length: Annotated[int, Ge(2)] = 2048,
    ) -> Prompts:
        """Read prompts.

        Args:
            name: a ``.jsonl`` file with one prompt in each line.
            context: gives the tokenizer, the split and the random seed.
            prompts: maximum number of prompts of a .jsonl file, chosen at random; all if omitted.
            max_length: maximum number of tokens of a prompt with what follows it, which is truncated.

        Raises:
            CalibrationError: if the file is missing, empty or malformed; the message names the line.
        """
        file = RowFile(Path(name).expanduser(), HINT)
        if len(file.lines) < (1 if context.split == "whole" else 2):
            raise CalibrationError(f"{name} holds {len(file.lines)} prompts, too few for two splits: give more")
        lines = file.lines[split_rows(len(file.lines), context.split)]
        if prompts is not None and prompts < len(lines):
            drawn = torch.randperm(len(lines), generator=torch.Generator().manual_seed(context.seed))
            lines = [lines[each] for each in sorted(drawn[:prompts].tolist())]
        items = Lazy(lines, partial(_tokenized, file, context.tokenizer, max_length))
        unanswered = sum(len(tokens) == length for tokens, length in track(items, "reading prompts"))
        metadata = {"data": str(name), "split": context.split, "prompts": len(lines), "unanswered": unanswered}
        metadata |= {"cut": CUTS[context.split]} if context.split in CUTS else {}
        metadata["sha256"] = hashlib.sha256(file.path.read_bytes()).hexdigest()
        return cls(items, context.tokenizer, metadata, (name, context, {"prompts": prompts, "max_length": max_length}))

    @staticmethod
    def check(name: str | Path) -> None:
        """Check that the file exists; see :func:`lamella.data.sources.check_text`."""
        check_text(name)

    @classmethod
    def fits(cls, model: Model | None, given: Any) -> bool:
        """Return whether an input that may be a text or prompts is opened as prompts: a file of rows is.

        Args:
            model: the model of the command, if it has one.
            given: the value of the input: a name, or prompts.
        """
        return isinstance(given, cls) or (isinstance(given, str | Path) and Path(given).suffix == ".jsonl")

    def part(self, split: Split) -> Prompts:
        """Read another split of the same file.

        Args:
            split: the split.
        """
        name, context, settings = self._opened
        return type(self).open(name, replace(context, split=split), **settings)


def _parsed(row: Any, where: str) -> ChatExample | str:
    """Return the conversation in a row, with an empty answer if it has none, or the text."""
    example, messages = ChatExample.of(row), conversation(row)
    text = row.get("text") if isinstance(row, dict) else row
    if example is not None:
        return example
    if isinstance(text, str) and text.strip():
        return text
    if messages and messages[-1]["role"] == "user":
        return ChatExample(messages, "")
    raise CalibrationError(f"{where} holds neither a prompt nor a text: {HINT}")


def _tokenized(file: RowFile, tokenizer: Any, max_length: int, line: tuple[int, int, int]) -> ContinuedPrompt:
    number, row = file.read(line)
    where = f"{file.path} line {number}"
    found = _parsed(row, where)
    if isinstance(found, str):
        ids = tokenizer(found, verbose=False)["input_ids"][:max_length]
        if len(ids) < 2:
            raise CalibrationError(f"{where} is a text of {len(ids)} tokens: give at least 2")
        return ContinuedPrompt(torch.tensor(ids), max(1, len(ids) // 4))
    question, answer = found.tokenized_by(tokenizer)
    room = max_length - len(question)
    if room < (1 if found.answer else ANSWER):
        raise CalibrationError(
            f"{where} has a prompt of {len(question)} tokens, too long for {max_length} with its answer: leave it out, "
            "or give a larger max_length"
        )
    return ContinuedPrompt(torch.tensor([*question, *answer[:room]] if found.answer else question), len(question))
