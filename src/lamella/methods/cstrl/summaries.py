"""The data: sources with their summaries, sources without summaries, and the splits."""

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
EXPECTED_FORMAT = 'write {"source": "...", "summary": "..."}, or {"messages": [...]} whose last one is the summary'
HELD_OUT = TESTED = 0.1  # fractions of the pairs: the paper's split is 80/10/10
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


class SummaryPair(NamedTuple):
    """One source with its summary, as text.

    Attributes:
        source: the source.
        summary: its summary.
    """

    source: str
    summary: str


class Summaries(Rows[SummaryPair]):
    """Pairs of source and summary as text, with a tokenizer."""

    metavar = "FILE"
    source_help = (
        'a .jsonl file with one pair per line: {"source": "...", "summary": "..."} (findings and impression, article '
        'and highlights, prompt and completion are accepted too), or {"messages": [...]} whose last message is the '
        "summary"
    )
    example = Fixture(
        "reports.jsonl", "".join(f"{json.dumps({'source': source, 'summary': summary})}\n" for source, summary in ROWS)
    )

    @classmethod
    def open(cls, name: str | Path, context: InputContext) -> Summaries:
        """Read pairs; in a conversation, everything before the last answer is the source.

        Args:
            name: the file.
            context: provides the tokenizer.

        Raises:
            CalibrationError: if the file is missing, empty or malformed, or a line lacks source or summary.
        """
        read = read_examples(name, prompts=SOURCES, answers=SUMMARIES, hint=EXPECTED_FORMAT)
        pairs = [SummaryPair("\n".join(each["content"] for each in before), summary) for before, summary in read]
        for number, pair in enumerate(pairs, start=1):
            if not pair.source.strip():
                raise CalibrationError(f"{name}: pair {number} has an empty source: {EXPECTED_FORMAT}")
        content = Path(name).expanduser().read_bytes()
        provenance = {"data": str(name), "pairs": len(pairs), "sha256": hashlib.sha256(content).hexdigest()}
        return cls(pairs, context.tokenizer, provenance)


class Reports(Rows[str]):
    """Sources without a summary."""

    metavar = "FILE"
    source_help = (
        "a text file with texts separated by blank lines, or one per line; or a .jsonl file with one text per line"
    )
    example = Fixture("unlabelled.txt", "".join(f"{source}\n" for source, _ in ROWS[:4]))

    @classmethod
    def open(cls, name: str | Path, context: InputContext) -> Reports:
        """Read texts.

        Args:
            name: the file; see :func:`lamella.data.read_records`.
            context: provides the tokenizer.

        Raises:
            CalibrationError: if the file is missing, empty or malformed.
        """
        texts = [record.text for record in read_records(name)]
        content = Path(name).expanduser().read_bytes()
        provenance = {"data": str(name), "texts": len(texts), "sha256": hashlib.sha256(content).hexdigest()}
        return cls(texts, context.tokenizer, provenance)


@dataclass(frozen=True)
class SummarySplits:
    """Disjoint splits of the pairs.

    Attributes:
        train: training pairs, also for gap sentences.
        held_out: held-out pairs.
        test: test pairs.
        set_aside: whether the test pairs were taken from the given pairs, since no test set was given.
    """

    train: Sequence[SummaryPair]
    held_out: Sequence[SummaryPair]
    test: Sequence[SummaryPair]
    test_from_pairs: bool

    @classmethod
    def of(cls, pairs: Sequence[SummaryPair], test: Sequence[SummaryPair] | None, seed: int) -> SummarySplits:
        """Split the pairs at random.

        Args:
            pairs: the pairs.
            test: test pairs, if given.
            seed: random seed.

        Raises:
            MethodError: if there are too few.
        """
        if len(pairs) < 3:
            raise MethodError(f"{len(pairs)} pairs of source and summary: give at least 3, better hundreds")
        order = list(pairs)
        random.Random(seed).shuffle(order)
        test_from_pairs = test is None
        if test is None:
            count = max(1, round(TESTED * len(order)))
            test, order = order[:count], order[count:]
        count = max(1, round(HELD_OUT * len(order)))
        return cls(order[count:], order[:count], test, test_from_pairs)

    @property
    def shared(self) -> int:
        """The number of test sources that also occur in the training or held-out pairs."""
        known = {pair.source for pair in (*self.train, *self.held_out)}
        return sum(pair.source in known for pair in self.test)
