"""Instructions with responses: what is chosen from, and what was chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lamella.errors import CalibrationError
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


@dataclass(frozen=True)
class Selection:
    """What was chosen, and why.

    Attributes:
        examples: the chosen ones, in the order in which they were accepted.
        report: clusters, scores of every sample, refusals with their reasons; JSON values.
    """

    examples: list[Example]
    report: dict[str, Any]

    def samples(self, tokenizer: Any, max_length: int | None = 256) -> list[Sample]:
        """Training samples whose responses carry loss; the paper cuts rows at 256 tokens."""
        return pairs([(each.prompt, each.response) for each in self.examples], tokenizer, max_length=max_length)


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
