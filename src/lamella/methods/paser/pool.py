"""Instructions with responses: the pool that PASER selects from, and its selection."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lamella.data import InputContext, Rows
from lamella.errors import CalibrationError
from lamella.reading import read_rows
from lamella.results import Corpus
from lamella.signature import Fixture
from lamella.train import Sample, pairs


@dataclass(frozen=True)
class InstructionExample:
    """One instruction with its response.

    Attributes:
        id: unique identifier, by which ties are broken.
        instruction: the instruction.
        response: the response to it.
        context: the input that the instruction refers to, if it is separate.
    """

    id: str
    instruction: str
    response: str
    context: str = ""

    @property
    def prompt(self) -> str:
        """The instruction with its context, each followed by a newline."""
        return f"{self.instruction}\n{self.context}\n" if self.context else f"{self.instruction}\n"


@dataclass(kw_only=True)
class Selection(Corpus):
    """The chosen instructions in their original form, with clusters, sample scores and refusals as findings.

    Attributes:
        examples: the chosen instructions, in the order in which they were accepted.
    """

    examples: list[InstructionExample]

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the rows in Alpaca's format."""
        for each in self.examples:
            yield {"instruction": each.instruction, "input": each.context, "output": each.response}

    def samples(self, tokenizer: Any, max_length: int | None = 256) -> list[Sample]:
        """Return training samples whose responses carry the loss; the paper truncates rows at 256 tokens.

        Args:
            tokenizer: the tokenizer of the model to train.
            max_length: maximum number of tokens per row, as in the paper by default; None for no limit.
        """
        return pairs([(each.prompt, each.response) for each in self.examples], tokenizer, max_length=max_length)


class InstructionPool(Rows[InstructionExample]):
    """Instructions to select from, with the tokenizer of their model."""

    metavar = "FILE"
    source_help = "a .jsonl file of instructions with the fields instruction, output and optionally input"
    example = Fixture(
        "instructions.jsonl",
        '{"instruction": "Name a colour.", "output": "Blue."}\n'
        '{"instruction": "Name an animal.", "output": "A heron."}\n'
        '{"instruction": "Add the numbers.", "input": "2 and 3", "output": "5"}\n'
        '{"instruction": "Add the numbers.", "input": "4 and 5", "output": "9"}\n'
        '{"instruction": "Say it shorter.", "input": "It is raining a lot today.", "output": "It pours."}\n',
    )

    @classmethod
    def open(cls, name: str | Path, context: InputContext) -> InstructionPool:
        """Read the instructions of a .jsonl file.

        Args:
            name: path of the .jsonl file.
            context: the context of the inputs, with the tokenizer of the model.

        Raises:
            CalibrationError: for a file that cannot be read, or a row without instruction or output.
        """
        rows = [row for _, row in read_rows(name, instead="paser chooses from a .jsonl file of instructions")]
        content = Path(name).expanduser().read_bytes()
        metadata = {"data": str(name), "samples": len(rows), "sha256": hashlib.sha256(content).hexdigest()}
        return cls(read_pool(rows), context.tokenizer, metadata)


def read_pool(rows: Sequence[Any]) -> list[InstructionExample]:
    """Convert rows in Alpaca's format (``instruction``, ``input``, ``output``) to examples; their ids are row indices.

    Raises:
        CalibrationError: for a row without instruction or output.
    """
    examples = []
    for index, row in enumerate(rows):
        fields = row if isinstance(row, Mapping) else {}
        texts = [fields.get(name) or "" for name in ("instruction", "output", "input")]
        if not all(isinstance(text, str) for text in texts) or not texts[0] or not texts[1]:
            raise CalibrationError(
                f"row {index} of the pool needs 'instruction' and 'output' texts, and may have 'input'"
            )
        examples.append(InstructionExample(f"{index:08d}", *texts))
    return examples
