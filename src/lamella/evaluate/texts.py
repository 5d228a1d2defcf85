"""Text metrics: ROUGE, BLEU, and the n-gram precisions of BLEU.

    BLEU = exp(min(0, 1 - reference length / candidate length)) (p_1 p_2 p_3 p_4)^(1/4)

Some papers report p_1 to p_4 as "BLEU-1" to "BLEU-4". They have no brevity penalty, so a single constant word can score
far above any BLEU; here they are called precisions and are reported separately. All scores are multiplied by 100.
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
    """The scores of some texts, each against one reference.

    Attributes:
        rouge1, rouge2, rougeL: mean F1 over texts, with stemming.
        bleu: corpus BLEU with brevity penalty, as computed by sacrebleu.
        bleu1_precision, bleu2_precision, bleu3_precision, bleu4_precision: corpus n-gram precisions, without brevity
            penalty. None of them is a BLEU.
        length: mean length of the scored texts in words.
        distinct: number of distinct texts.
        texts: number of texts.
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
            written: the texts to score.
            wanted: a reference for each.

        Raises:
            CalibrationError: for no texts, or a different number of references.
            LamellaError: if rouge-score or sacrebleu is missing.
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
        """Return the scores as JSON values."""
        return asdict(self)


def rouge(*kinds: str, stems: bool = True) -> Callable[[str, str], dict[str, float]]:
    """Return a function from a text and its reference to F1 scores by kind, such as ``rouge1`` or ``rougeL``.

    Args:
        *kinds: names of the scores.
        stems: compare words by their stems.

    Raises:
        LamellaError: if rouge-score is missing.
    """
    scorer = require("rouge_score.rouge_scorer", EXTRA, "ROUGE").RougeScorer(list(kinds), use_stemmer=stems)

    def score(written: str, wanted: str) -> dict[str, float]:
        return {kind: 100 * float(found.fmeasure) for kind, found in scorer.score(wanted, written).items()}

    return score


def sentence_bleu() -> Callable[[str, str], float]:
    """Return a function from a sentence and its reference to a BLEU.

    Counts of n-grams without a match are smoothed, and n-grams longer than the sentence are ignored: otherwise a
    sentence without four consecutive words of its reference would have a score of 0.

    Raises:
        LamellaError: if sacrebleu is missing.
    """
    bleu = require("sacrebleu.metrics", EXTRA, "BLEU").BLEU(effective_order=True)
    return lambda written, wanted: float(bleu.sentence_score(written, [wanted]).score)
