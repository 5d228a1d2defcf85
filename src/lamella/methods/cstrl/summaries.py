"""What is learnt from: sources with their summaries, and sources without any."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lamella.data import InputContext, Rows, read_examples, read_records
from lamella.data.records import PROMPTS, RESPONSES
from lamella.errors import CalibrationError, MethodError
from lamella.signature import Fixture

SOURCES = ("source", "document", "article", "findings", "dialogue", *PROMPTS, "text")
SUMMARIES = ("summary", "impression", "highlights", *RESPONSES)
HINT = 'write {"source": "...", "summary": "..."}, or {"messages": [...]} whose last one is the summary'
HELD_OUT = TESTED = 0.1  # of the pairs: the paper's 80/10/10
ROWS = (
    ("The heart is large. The lungs are clear. No effusion is seen.", "Large heart."),
    ("There is a small left effusion. The heart is normal. No fracture.", "Small left effusion."),
    ("The lungs are clear. The heart is normal. The bones are intact.", "Nothing acute."),
    ("A rib is broken on the right. The lungs are clear. The heart is normal.", "Broken right rib."),
    ("The heart is normal. The lungs are clear. No fracture is seen.", "Nothing acute."),
    ("There is a large right effusion. The bones are intact.", "Large right effusion."),
    ("A nodule is seen on the left. The heart is normal. The bones are intact.", "Left nodule."),
    ("The heart is large. A rib is broken on the left.", "Large heart, broken left rib."),
    ("No effusion is seen. The heart is normal. The lungs are clear.", "Nothing acute."),
    ("The lungs are clear. A nodule is seen on the right. No fracture.", "Right nodule."),
)


class Pair(NamedTuple):
    """One source with its summary, as text."""

    source: str
    summary: str


class Summaries(Rows[Pair]):
    """Pairs as text, with the tokenizer that they are to be read with."""

    metavar = "FILE"
    source_help = (
        'a .jsonl file with a pair in each line: {"source": "...", "summary": "..."} (findings and impression, article '
        'and highlights, prompt and completion are understood too), or {"messages": [...]} whose last one is the '
        "summary"
    )
    example = Fixture(
        "reports.jsonl", "".join(f"{json.dumps({'source': source, 'summary': said})}\n" for source, said in ROWS)
    )

    @classmethod
    def open(cls, name: str | Path, context: InputContext) -> Summaries:
        """Read pairs; of a conversation, all that comes before the last answer is the source.

        Args:
            name: the file.

        Raises:
            CalibrationError: for a file that is missing, empty or malformed, or a line without one of the two.
        """
        read = read_examples(name, prompts=SOURCES, answers=SUMMARIES, hint=HINT)
        pairs = [Pair("\n".join(each["content"] for each in before), said) for before, said in read]
        for number, pair in enumerate(pairs, start=1):
            if not pair.source.strip():
                raise CalibrationError(f"{name}: pair {number} has an empty source: {HINT}")
        content = Path(name).expanduser().read_bytes()
        told = {"data": str(name), "pairs": len(pairs), "sha256": hashlib.sha256(content).hexdigest()}
        return cls(pairs, context.tokenizer, told)


class Reports(Rows[str]):
    """Sources without a summary."""

    metavar = "FILE"
    source_help = "a file of texts parted by blank lines, else by lines; or .jsonl with a text in each line"
    example = Fixture("unlabelled.txt", "".join(f"{source}\n" for source, _ in ROWS[:4]))

    @classmethod
    def open(cls, name: str | Path, context: InputContext) -> Reports:
        """Read texts.

        Args:
            name: the file; see :func:`lamella.data.read_records`.

        Raises:
            CalibrationError: for a file that is missing, empty or malformed.
        """
        texts = [record.text for record in read_records(name)]
        content = Path(name).expanduser().read_bytes()
        told = {"data": str(name), "texts": len(texts), "sha256": hashlib.sha256(content).hexdigest()}
        return cls(texts, context.tokenizer, told)


@dataclass(frozen=True)
class Splits:
    """The pairs, parted once: nothing of one part enters another.

    Attributes:
        train: to learn from, gap sentences too.
        held_out: to watch by.
        test: to judge by.
        set_aside: whether the test was taken from the pairs, since none was given.
    """

    train: Sequence[Pair]
    held_out: Sequence[Pair]
    test: Sequence[Pair]
    set_aside: bool

    @classmethod
    def of(cls, pairs: Sequence[Pair], test: Sequence[Pair] | None, seed: int) -> Splits:
        """Part the pairs at random.

        Raises:
            MethodError: when there are too few.
        """
        if len(pairs) < 3:
            raise MethodError(f"{len(pairs)} pairs of source and summary: give 3 or more, better hundreds")
        order = list(pairs)
        random.Random(seed).shuffle(order)
        set_aside = test is None
        if test is None:
            count = max(1, round(TESTED * len(order)))
            test, order = order[:count], order[count:]
        count = max(1, round(HELD_OUT * len(order)))
        return cls(order[count:], order[:count], test, set_aside)

    @property
    def shared(self) -> int:
        """How many sources of the test are among those that are learnt from."""
        known = {pair.source for pair in (*self.train, *self.held_out)}
        return sum(pair.source in known for pair in self.test)
