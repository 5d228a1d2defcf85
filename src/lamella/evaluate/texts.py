"""How close texts that were written are to those that were wanted: ROUGE, BLEU, and the precisions BLEU is made of.

    BLEU = exp(min(0, 1 - wanted/written)) (p_1 p_2 p_3 p_4)^(1/4)

Some papers report p_1 to p_4 as "BLEU-1" to "BLEU-4". They know no brevity penalty, so one constant word can score far
above any BLEU; here they are called precisions, and stand apart. All scores are in points of 100.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from lamella.errors import CalibrationError
from lamella.extras import require

EXTRA = "text-metrics"
KINDS = ("rouge1", "rouge2", "rougeL")


@dataclass(frozen=True)
class TextScores:
    """What some texts score against one reference each.

    Attributes:
        rouge1, rouge2, rougeL: F1, the mean over texts, of stems.
        bleu: of all texts together, with brevity penalty, as sacrebleu computes it.
        bleu1_precision, bleu2_precision, bleu3_precision, bleu4_precision: of all texts together: the share of their
            n-grams that the references have, without brevity penalty. None of them is a BLEU.
        length: of the texts that were written, in words, the mean.
        distinct: how many of them differ.
        texts: how many there are.
    """

    rouge1: float
    rouge2: float
    rougeL: float
    bleu: float
    bleu1_precision: float
    bleu2_precision: float
    bleu3_precision: float
    bleu4_precision: float
    length: float
    distinct: int
    texts: int

    @classmethod
    def of(cls, written: Sequence[str], wanted: Sequence[str]) -> TextScores:
        """Score texts.

        Args:
            written: what is scored.
            wanted: a reference for each.

        Raises:
            CalibrationError: for no texts, or not as many references.
            LamellaError: when rouge-score or sacrebleu is missing.
        """
        if not written or len(written) != len(wanted):
            raise CalibrationError(
                f"{len(written)} texts are scored against {len(wanted)} references: give one for each"
            )
        score = rouge(*KINDS)
        each = [score(ours, theirs) for ours, theirs in zip(written, wanted, strict=True)]
        bleu = require("sacrebleu", EXTRA, "BLEU").corpus_bleu(list(written), [list(wanted)])
        rouge1, rouge2, rouge_l = (fmean(scores[kind] for scores in each) for kind in KINDS)
        p1, p2, p3, p4 = map(float, bleu.precisions)
        length = fmean(len(text.split()) for text in written)
        return cls(rouge1, rouge2, rouge_l, float(bleu.score), p1, p2, p3, p4, length, len(set(written)), len(written))

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def rouge(*kinds: str, stems: bool = True) -> Callable[[str, str], dict[str, float]]:
    """A function from a text and its reference to F1 scores by kind, such as ``rouge1`` or ``rougeL``.

    Args:
        stems: compare words by their stems.

    Raises:
        LamellaError: when rouge-score is missing.
    """
    scorer = require("rouge_score.rouge_scorer", EXTRA, "ROUGE").RougeScorer(list(kinds), use_stemmer=stems)

    def score(written: str, wanted: str) -> dict[str, float]:
        return {kind: 100 * float(found.fmeasure) for kind, found in scorer.score(wanted, written).items()}

    return score


def sentence_bleu() -> Callable[[str, str], float]:
    """A function from one sentence and its reference to a BLEU.

    Of n-grams without a match the count is smoothed, and those longer than the sentence do not count: without that, a
    sentence with no four words in a row of its reference would score nothing.

    Raises:
        LamellaError: when sacrebleu is missing.
    """
    bleu = require("sacrebleu.metrics", EXTRA, "BLEU").BLEU(effective_order=True)
    return lambda written, wanted: float(bleu.sentence_score(written, [wanted]).score)
