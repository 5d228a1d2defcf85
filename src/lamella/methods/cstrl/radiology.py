"""A world of chest reports whose truth is known: a seeded grammar of findings, and what an impression says of them.

    14 slots (heart, pleura, ...) of 4 states: normal, in 6 phrasings, or one of 3 findings, with a severity and, where
    there are two of a thing, a side. A report has 6 to 9 sentences, among them negations ("no focal consolidation") and
    distractors ("comparison is made with an earlier study"). The impression merges its findings in the order of the
    slots, whatever the order of the sentences; where all is normal (30 %), it is one fixed sentence.

What a text says is read back exactly, so a finding that was invented is known as such.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from lamella.methods.cstrl.gaps import MASK, PREFIX
from lamella.methods.cstrl.summaries import Pair

NORMAL = "no acute cardiopulmonary process."
NORMALS = 0.3  # of the reports
MASKS = 4  # that the tokenizer knows
SEVERITIES = ("mild", "moderate", "severe")
SIDES = ("left", "right", "bilateral")
SLOTS: tuple[tuple[str, tuple[str, str, str], bool], ...] = (  # where, its three findings, and whether it has sides
    ("heart", ("cardiomegaly", "pericardial effusion", "ventricular enlargement"), False),
    ("mediastinum", ("mediastinal widening", "mediastinal mass", "mediastinal shift"), False),
    ("aorta", ("aortic calcification", "aortic aneurysm", "aortic tortuosity"), False),
    ("hilum", ("hilar enlargement", "hilar calcification", "hilar adenopathy"), True),
    ("upper lobe", ("upper lobe consolidation", "upper lobe nodule", "upper lobe scarring"), True),
    ("lower lobe", ("lower lobe consolidation", "lower lobe atelectasis", "lower lobe infiltrate"), True),
    ("pleura", ("pleural effusion", "pneumothorax", "pleural thickening"), True),
    ("diaphragm", ("diaphragmatic elevation", "diaphragmatic flattening", "diaphragmatic hernia"), True),
    ("vasculature", ("pulmonary edema", "vascular congestion", "pulmonary hypertension"), False),
    ("airway", ("bronchial wall thickening", "bronchiectasis", "tracheal deviation"), False),
    ("rib cage", ("rib fracture", "rib lesion", "rib deformity"), True),
    ("spine", ("vertebral compression", "scoliosis", "spondylosis"), False),
    ("shoulder", ("clavicle fracture", "shoulder dislocation", "shoulder arthropathy"), True),
    ("soft tissue", ("subcutaneous emphysema", "soft tissue swelling", "soft tissue mass"), True),
)
PLACES = {finding: slot for slot, (_, findings, _) in enumerate(SLOTS) for finding in findings}
FINE = (  # phrasings of a normal slot; {0} and {1} are findings that are not there
    "the {where} is normal",
    "the {where} is unremarkable",
    "no {0} is seen",
    "there is no {0} or {1}",
    "no evidence of {0}",
    "the {where} is within normal limits without {0}",
)
FOUND = (  # phrasings of a finding
    "there is {severity} {side} {finding}",
    "{severity} {side} {finding} is seen",
    "{finding} is present {at} and it is {severity}",
    "the {where} shows {severity} {side} {finding}",
)
BESIDE = (
    "comparison is made with an earlier study",
    "the patient is rotated",
    "the image is of good quality",
    "a line ends in the vena cava",
    "the inspiration is shallow",
    "wires of an earlier operation are intact",
)


class Finding(NamedTuple):
    """What is wrong somewhere; without a side where there is only one of the thing."""

    finding: str
    severity: str
    side: str = ""

    def __str__(self) -> str:
        return " ".join(part for part in (self.severity, self.side, self.finding) if part)


class Report(NamedTuple):
    """One report with its impression, and what is truly in it, in the order of the slots."""

    source: str
    summary: str
    findings: tuple[Finding, ...]

    @property
    def pair(self) -> Pair:
        return Pair(self.source, self.summary)


def reports(count: int, seed: int) -> list[Report]:
    """So many different reports.

    >>> reports(1, 0)[0].summary
    'severe right lower lobe infiltrate.'
    """
    drawn, found = random.Random(seed), dict[str, Report]()
    while len(found) < count:
        made = _report(drawn)
        found.setdefault(made.source, made)
    return list(found.values())


def _report(drawn: random.Random) -> Report:
    sick = [] if drawn.random() < NORMALS else sorted(drawn.sample(range(len(SLOTS)), drawn.choice((1, 2, 2, 3))))
    findings = tuple(_finding(slot, drawn) for slot in sick)
    sentences = [_found(each, drawn) for each in findings]
    length, beside = drawn.randint(6, 9), drawn.randint(0, 2)
    sentences += drawn.sample(BESIDE, beside)
    well = drawn.sample([slot for slot in range(len(SLOTS)) if slot not in sick], length - len(sentences))
    sentences += [_fine(slot, drawn) for slot in well]
    drawn.shuffle(sentences)
    summary = ", ".join(map(str, findings)) + "." if findings else NORMAL
    return Report(" ".join(f"{each}." for each in sentences), summary, findings)


def _finding(slot: int, drawn: random.Random) -> Finding:
    _, known, sided = SLOTS[slot]
    return Finding(drawn.choice(known), drawn.choice(SEVERITIES), drawn.choice(SIDES) if sided else "")


def _found(each: Finding, drawn: random.Random) -> str:
    at = {"": "", "bilateral": "on both sides"}.get(each.side, f"on the {each.side}")
    said = drawn.choice(FOUND).format(**each._asdict(), at=at, where=SLOTS[PLACES[each.finding]][0])
    return " ".join(said.split())


def _fine(slot: int, drawn: random.Random) -> str:
    where, known, _ = SLOTS[slot]
    return drawn.choice(FINE).format(*drawn.sample(known, 2), where=where)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of all words that reports have, with masks; a text ends with ``</s>``, and padding is 0."""
    texts = [NORMAL, PREFIX, "summarize:", ",", *BESIDE, *SEVERITIES, *SIDES, "on both sides", "on the", *FINE, *FOUND]
    texts += [text for where, findings, _ in SLOTS for text in (where, *findings)]
    words = sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s{}]", text)})
    special = ["<pad>", "</s>", "<unk>", *(MASK.format(number) for number in range(MASKS))]
    known = {word: place for place, word in enumerate([*special, *words])}
    made = Tokenizer(WordLevel(known, unk_token="<unk>"))
    made.pre_tokenizer = Whitespace()
    made.add_special_tokens(special)
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


# Reading back


@dataclass(frozen=True)
class Said:
    """What an impression says.

    Attributes:
        findings: that it names.
        other: phrases that are no finding of this world.
        normal: whether it is the sentence for a normal report.
    """

    findings: tuple[Finding, ...]
    other: tuple[str, ...]
    normal: bool

    @classmethod
    def of(cls, text: str) -> Said:
        """Read an impression, however its marks are spaced."""
        plain = re.sub(r"\s+([,.])", r"\1", " ".join(text.lower().split()))
        if plain == NORMAL:
            return cls((), (), True)
        phrases = [phrase.strip() for phrase in plain.rstrip(".").split(",") if phrase.strip()]
        read = [_read(phrase) for phrase in phrases]
        other = tuple(phrase for phrase, each in zip(phrases, read, strict=True) if each is None)
        return cls(tuple(each for each in read if each is not None), other, False)


def _read(phrase: str) -> Finding | None:
    severity, _, rest = phrase.partition(" ")
    side, _, named = rest.partition(" ")
    if side not in SIDES:
        side, named = "", rest
    known = named in PLACES and severity in SEVERITIES and bool(side) == SLOTS[PLACES[named]][2]
    return Finding(named, severity, side) if known else None


def judged(texts: Sequence[str], wanted: Sequence[Report]) -> dict[str, Any]:
    """Exact figures of impressions: no words are compared, but what they say.

    Returns:
        ``recall``: the share of true findings that are named, side and severity included; ``invented``: the share of
        what is named (phrases that say nothing among it) that is not in the report; ``exact``: the share of texts that
        say all of it in order and nothing else.
    """
    true = named = right = exact = 0
    for text, report in zip(texts, wanted, strict=True):
        said = Said.of(text)
        true += len(report.findings)
        named += len(said.findings) + len(said.other)
        right += len(set(said.findings) & set(report.findings))
        whole = said.normal if not report.findings else said.findings == report.findings
        exact += whole and not said.other
    return {
        "recall": right / true if true else 1.0,
        "invented": 1 - right / named if named else 0.0,
        "exact": exact / len(wanted),
    }
