"""Gap sentences: the most informative sentences of a source are masked and must be generated (stage 1).

    r = ROUGE-1 F1(s, summary)     b = BLEU(s, summary)     score = 2 r b / (r + b)
    m = min(3, n - 2), at least 1, of n sentences

    The heart is large. <extra_id_0>. The bones are intact. <extra_id_1>.      masks in order of position
    Small left effusion is seen. No fracture                                   sentences in order of *score*

Sentences are identified by position, not by content: a sentence that occurs twice, or within another, is masked only
where it was chosen. The authors join the target sentences by a full stop only; here a space follows it, so that words
stay separate.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

from annotated_types import Ge

from lamella.errors import CalibrationError
from lamella.evaluate import rouge, sentence_bleu
from lamella.methods.cstrl.summaries import SummaryPair

Score = Literal["rouge-bleu", "self", "random"]
Scorer = Callable[[str, str], float]
END = re.compile(r"[.!?]+(?:\s+|\Z)")  # end of a sentence
MASK = "<extra_id_{}>"
PREFIX = "fill in the blank: "


class Gap(NamedTuple):
    """One source with masked sentences, and the target.

    Attributes:
        text: the source with masks.
        target: the masked sentences, in order of score.
        scores: scores of all sentences, in order of position.
        masked: indices of the masked sentences, in order of score.
    """

    text: str
    target: str
    scores: tuple[float, ...]
    masked: tuple[int, ...]


@dataclass(frozen=True)
class Gaps:
    """Selection of the masked sentences.

    Attributes:
        score: ``rouge-bleu``, overlap with the summary; ``self``, overlap with the rest of the source, as for sources
            without a summary (PEGASUS, arXiv 1912.08777); or ``random``, a control.
        max_gaps: maximum number of masked sentences per source.
        keep: minimum number of sentences left, for sources that are long enough.
    """

    score: Score = "rouge-bleu"
    max_gaps: Annotated[int, Ge(1)] = 3
    keep: Annotated[int, Ge(0)] = 2

    def count(self, sentences: int) -> int:
        """Return m, the number of sentences to mask.

        Args:
            sentences: n, the number of sentences.
        """
        return max(1, min(self.max_gaps, sentences - self.keep))


def spans(text: str) -> list[tuple[int, int]]:
    """Return start and end of the sentences of a text, without their final punctuation.

    Args:
        text: the text.

    >>> [("The heart is large. No effusion")[a:b] for a, b in spans("The heart is large. No effusion")]
    ['The heart is large', 'No effusion']
    """
    found, start = [], 0
    for end in [*END.finditer(text), None]:
        piece = text[start : None if end is None else end.start()]
        if piece.strip():
            begin = start + len(piece) - len(piece.lstrip())
            found.append((begin, begin + len(piece.strip())))
        start = len(text) if end is None else end.end()
    return found


def harmonic() -> Scorer:
    """Return a scorer of a sentence against a reference: the harmonic mean of ROUGE-1 F1 and BLEU."""
    of_words, of_phrases = rouge("rouge1", stems=False), sentence_bleu()

    def score(sentence: str, reference: str) -> float:
        r = of_words(sentence, reference)["rouge1"] if reference.strip() else 0.0
        b = of_phrases(sentence, reference) if r else 0.0  # without a common word BLEU is 0
        return 2 * r * b / (r + b) if r + b else 0.0

    return score


def mask_sentences(text: str, scores: Sequence[float], count: int) -> Gap:
    """Mask the sentences with the highest scores; ties are resolved by position.

    Args:
        text: the source.
        scores: scores of its sentences, in order.
        count: number of sentences to mask.
    """
    where = spans(text)
    best = sorted(range(len(where)), key=lambda index: -scores[index])[:count]
    parts, start = [], 0
    for number, index in enumerate(sorted(best)):
        begin, end = where[index]
        parts += [text[start:begin], MASK.format(number)]
        start = end
    target = ". ".join(text[slice(*where[index])] for index in best)
    return Gap("".join([*parts, text[start:]]), target, tuple(scores), tuple(best))


@dataclass(frozen=True)
class GapData:
    """Gap sentences of many sources.

    Attributes:
        gaps: the masked sources.
        single: number of excluded sources with a single sentence, of which nothing would be left.
        unlabelled: number of sources without a summary.
    """

    gaps: list[Gap]
    single: int
    unlabelled: int

    def as_dict(self) -> dict[str, Any]:
        """Return statistics as JSON values."""
        share = [len(each.masked) / len(each.scores) for each in self.gaps]
        best = [max(each.scores) for each in self.gaps]
        return {
            "sources": len(self.gaps),
            "unlabelled": self.unlabelled,
            "single": self.single,
            "masked": sum(share) / len(share),
            "best score": sum(best) / len(best),
        }


def gap_sentences(
    pairs: Sequence[SummaryPair], reports: Sequence[str] = (), gaps: Gaps = Gaps(), seed: int = 0
) -> GapData:
    """Mask the most informative sentences of sources.

    Args:
        pairs: sources with summaries, of the training split only, since the summary decides what is masked.
        reports: sources without summaries; each of their sentences is scored against the others.
        gaps: selection of the sentences.
        seed: random seed of the score ``random``.

    Raises:
        CalibrationError: if no source has two sentences.
    """
    generator = random.Random(seed)
    overlap = None if gaps.score == "random" else harmonic()
    found, single = [], 0
    for text, summary in [*pairs, *((text, None) for text in reports)]:
        sentences = [text[start:end] for start, end in spans(text)]
        if len(sentences) < 2:
            single += 1
            continue
        if overlap is None:
            scores = [generator.random() for _ in sentences]
        elif gaps.score == "self" or summary is None:
            others = [" ".join(sentences[:index] + sentences[index + 1 :]) for index in range(len(sentences))]
            scores = [overlap(each, rest) for each, rest in zip(sentences, others, strict=True)]
        else:
            scores = [overlap(each, summary) for each in sentences]
        found.append(mask_sentences(text, scores, gaps.count(len(sentences))))
    if not found:
        raise CalibrationError(
            f"all {single} sources have a single sentence, so nothing is left around a gap: give sources with several"
        )
    return GapData(found, single, len(reports))
