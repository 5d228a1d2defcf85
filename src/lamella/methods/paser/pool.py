"""Instructions with responses: what is chosen from, and what was chosen."""

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
class Example:
    """One instruction with its response.

    Attributes:
        id: its name; ties are broken by it.
        instruction, response: what is asked, and the answer.
        context: what the instruction is about, if that stands apart from it.
    """

    id: str
    instruction: str
    response: str
    context: str = ""

    @property
    def prompt(self) -> str:
        return f"{self.instruction}\n{self.context}\n" if self.context else f"{self.instruction}\n"


@dataclass(kw_only=True)
class Selection(Corpus):
    """What was chosen: the instructions as they were, and as findings clusters, scores of every sample and refusals.

    Attributes:
        examples: the chosen ones, in the order in which they were accepted.
    """

    examples: list[Example]

    def rows(self) -> Iterator[dict[str, Any]]:
        for each in self.examples:
            yield {"instruction": each.instruction, "input": each.context, "output": each.response}

    def samples(self, tokenizer: Any, max_length: int | None = 256) -> list[Sample]:
        """Training samples whose responses carry loss; the paper cuts rows at 256 tokens."""
        return pairs([(each.prompt, each.response) for each in self.examples], tokenizer, max_length=max_length)


class Pool(Rows[Example]):
    """The instructions that are chosen from, with the tokenizer that their model reads them with."""

    metavar = "FILE"
    source_help = "a .jsonl file of instructions: instruction, output, and input where there is one"
    example = Fixture(
        "instructions.jsonl",
        '{"instruction": "Name a colour.", "output": "Blue."}\n'
        '{"instruction": "Name an animal.", "output": "A heron."}\n'
        '{"instruction": "Add the numbers.", "input": "2 and 3", "output": "5"}\n'
        '{"instruction": "Add the numbers.", "input": "4 and 5", "output": "9"}\n'
        '{"instruction": "Say it shorter.", "input": "It is raining a lot today.", "output": "It pours."}\n',
    )

    @classmethod
    def open(cls, name: str | Path, context: InputContext) -> Pool:
        """The instructions of a file.

        Raises:
            CalibrationError: for a file that cannot be read, or a row without instruction or output.
        """
        rows = [row for _, row in read_rows(name, instead="paser chooses from a .jsonl file of instructions")]
        content = Path(name).expanduser().read_bytes()
        said = {"data": str(name), "samples": len(rows), "sha256": hashlib.sha256(content).hexdigest()}
        return cls(read_pool(rows), context.tokenizer, said)


def read_pool(rows: Sequence[Any]) -> list[Example]:
    """Rows as Alpaca has them (``instruction``, ``input``, ``output``) as examples; ids are their numbers.

    Raises:
        CalibrationError: for a row without instruction or output.
    """
    examples = []
    for number, row in enumerate(rows):
        fields = row if isinstance(row, Mapping) else {}
        texts = [fields.get(name) or "" for name in ("instruction", "output", "input")]
        if not all(isinstance(text, str) for text in texts) or not texts[0] or not texts[1]:
            raise CalibrationError(
                f"row {number} of the pool needs 'instruction' and 'output' texts, and may have 'input'"
            )
        examples.append(Example(f"{number:08d}", *texts))
    return examples
