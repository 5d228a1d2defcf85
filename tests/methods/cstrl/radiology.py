"""Synthetic chest reports with ground truth: a random grammar of findings, and the impressions that summarise them.

    14 slots (heart, pleura, ...) with 4 states: normal, in 6 phrasings, or one of 3 findings, with a severity and, for
    paired organs, a side. A report has 6 to 9 sentences, including negations ("no focal consolidation") and distractors
    ("comparison is made with an earlier study"). The impression lists the findings in the order of the slots, whatever
    the order of the sentences; if all is normal (30 %), it is one fixed sentence.

Impressions are parsed exactly, so invented findings are detected.
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
from lamella.methods.cstrl.summaries import SummaryPair

NORMAL = "no acute cardiopulmonary process."
NORMALS = 0.3  # fraction of normal reports
MASKS = 4  # number of mask tokens in the vocabulary
SEVERITIES = ("mild", "moderate", "severe")
SIDES = ("left", "right", "bilateral")
SLOTS: tuple[tuple[str, tuple[str, str, str], bool], ...] = (  # name, its three findings, and whether it has sides
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
SLOT_OF = {finding: slot for slot, (_, findings, _) in enumerate(SLOTS) for finding in findings}
NORMAL_PHRASES = (  # phrasings of a normal slot; {0} and {1} are findings that are absent
    "the {where} is normal",
    "the {where} is unremarkable",
    "no {0} is seen",
    "there is no {0} or {1}",
    "no evidence of {0}",
    "the {where} is within normal limits without {0}",
)
FINDING_PHRASES = (  # phrasings of a finding
    "there is {severity} {side} {finding}",
    "{severity} {side} {finding} is seen",
    "{finding} is present {at} and it is {severity}",
    "the {where} shows {severity} {side} {finding}",
)
DISTRACTORS = (
    "comparison is made with an earlier study",
    "the patient is rotated",
    "the image is of good quality",
    "a line ends in the vena cava",
    "the inspiration is shallow",
    "wires of an earlier operation are intact",
)


class Finding(NamedTuple):
    """One finding; without a side for organs that are not paired.

    Attributes:
        finding: name of the finding.
        severity: one of :data:`SEVERITIES`.
        side: one of :data:`SIDES`, or empty.
    """

    finding: str
    severity: str
    side: str = ""

    def __str__(self) -> str:
        return " ".join(part for part in (self.severity, self.side, self.finding) if part)


class Report(NamedTuple):
    """One report with its impression and its ground truth.

    Attributes:
        source: text of the report.
        summary: text of the impression.
        findings: the true findings, in the order of the slots.
    """

    source: str
    summary: str
    findings: tuple[Finding, ...]

    @property
    def pair(self) -> SummaryPair:
        """The report and its impression as a pair."""
        return SummaryPair(self.source, self.summary)


def reports(count: int, seed: int) -> list[Report]:
    """Generate distinct random reports.

    Args:
        count: number of reports.
        seed: random seed.

    >>> reports(1, 0)[0].summary
    'severe right lower lobe infiltrate.'
    """
    generator, found = random.Random(seed), dict[str, Report]()
    while len(found) < count:
        report = _report(generator)
        found.setdefault(report.source, report)
    return list(found.values())


def _report(generator: random.Random) -> Report:
    sick = (
        []
        if generator.random() < NORMALS
        else sorted(generator.sample(range(len(SLOTS)), generator.choice((1, 2, 2, 3))))
    )
    findings = tuple(_finding(slot, generator) for slot in sick)
    sentences = [_found(each, generator) for each in findings]
    length, count = generator.randint(6, 9), generator.randint(0, 2)
    sentences += generator.sample(DISTRACTORS, count)
    well = generator.sample([slot for slot in range(len(SLOTS)) if slot not in sick], length - len(sentences))
    sentences += [_fine(slot, generator) for slot in well]
    generator.shuffle(sentences)
    summary = ", ".join(map(str, findings)) + "." if findings else NORMAL
    return Report(" ".join(f"{each}." for each in sentences), summary, findings)


# Parsing impressions
def _finding(slot: int, generator: random.Random) -> Finding:
    _, names, sided = SLOTS[slot]
    return Finding(generator.choice(names), generator.choice(SEVERITIES), generator.choice(SIDES) if sided else "")


def _found(each: Finding, generator: random.Random) -> str:
    at = {"": "", "bilateral": "on both sides"}.get(each.side, f"on the {each.side}")
    phrase = generator.choice(FINDING_PHRASES).format(**each._asdict(), at=at, where=SLOTS[SLOT_OF[each.finding]][0])
    return " ".join(phrase.split())


def _fine(slot: int, generator: random.Random) -> str:
    where, names, _ = SLOTS[slot]
    return generator.choice(NORMAL_PHRASES).format(*generator.sample(names, 2), where=where)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer of the reports' vocabulary, with masks, end token ``</s>`` and padding 0."""
    texts = [
        NORMAL,
        PREFIX,
        "summarize:",
        ",",
        *DISTRACTORS,
        *SEVERITIES,
        *SIDES,
        "on both sides",
        "on the",
        *NORMAL_PHRASES,
        *FINDING_PHRASES,
    ]
    texts += [text for where, findings, _ in SLOTS for text in (where, *findings)]
    words = sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s{}]", text)})
    special = ["<pad>", "</s>", "<unk>", *(MASK.format(number) for number in range(MASKS))]
    names = {word: index for index, word in enumerate([*special, *words])}
    tokenizer = Tokenizer(WordLevel(names, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


# Reading back


@dataclass(frozen=True)
class ParsedImpression:
    """The content of an impression.

    Attributes:
        findings: the findings that it names.
        other: phrases that are not findings.
        normal: whether it is the sentence for a normal report.
    """

    findings: tuple[Finding, ...]
    other: tuple[str, ...]
    normal: bool

    @classmethod
    def of(cls, text: str) -> ParsedImpression:
        """Parse an impression, regardless of spaces around punctuation."""
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
    valid = named in SLOT_OF and severity in SEVERITIES and bool(side) == SLOTS[SLOT_OF[named]][2]
    return Finding(named, severity, side) if valid else None


def score_impressions(texts: Sequence[str], target: Sequence[Report]) -> dict[str, Any]:
    """Score impressions by their parsed findings, not by word overlap.

    Args:
        texts: generated impressions.
        target: the reports with their ground truth.

    Returns:
        ``recall``: fraction of true findings that are named, including severity and side; ``invented``: fraction of
        named findings and other phrases that are not in the report; ``exact``: fraction of texts that are entirely
        correct.
    """
    true = named = right = exact = 0
    for text, report in zip(texts, target, strict=True):
        phrase = ParsedImpression.of(text)
        true += len(report.findings)
        named += len(phrase.findings) + len(phrase.other)
        right += len(set(phrase.findings) & set(report.findings))
        whole = phrase.normal if not report.findings else phrase.findings == report.findings
        exact += whole and not phrase.other
    return {
        "recall": right / true if true else 1.0,
        "invented": 1 - right / named if named else 0.0,
        "exact": exact / len(target),
    }
