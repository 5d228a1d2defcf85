"""Gap sentences: a source without its most telling sentences, which are to be written back (stage 1).

    r = ROUGE-1 F1(s, summary)     b = BLEU(s, summary)     score = 2 r b / (r + b)
    m = min(3, n - 2), at least 1, of n sentences

    The heart is large. <extra_id_0>. The bones are intact. <extra_id_1>.      masks in order of position
    Small left effusion is seen. No fracture                                   sentences in order of *score*

Sentences are known by where they stand, not by what they say: one that is said twice, or within another, is masked
where it was chosen. The authors join what is to be written by a full stop alone; here a space follows it, so that words
stay apart.
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
from lamella.methods.cstrl.summaries import Pair

Score = Literal["rouge-bleu", "self", "random"]
Scorer = Callable[[str, str], float]
END = re.compile(r"[.!?]+(?:\s+|\Z)")  # of a sentence
MASK = "<extra_id_{}>"
PREFIX = "fill in the blank: "


class Gap(NamedTuple):
    """One source with gaps, and what stood there.

    Attributes:
        text: the source with masks.
        wanted: the sentences that were masked, in order of their score.
        scores: of all sentences, in order of position.
        masked: which of them are masked, in order of their score.
    """

    text: str
    wanted: str
    scores: tuple[float, ...]
    masked: tuple[int, ...]


@dataclass(frozen=True)
class Gaps:
    """Which sentences are masked.

    Attributes:
        score: ``rouge-bleu``, overlap with the summary; ``self``, with the rest of the source, as for sources without
            a summary (PEGASUS, arXiv 1912.08777); or ``random``, a control.
        max_gaps: masks in a source at most.
        keep: sentences that are left of a longer source at least.
    """

    score: Score = "rouge-bleu"
    max_gaps: Annotated[int, Ge(1)] = 3
    keep: Annotated[int, Ge(0)] = 2

    def count(self, sentences: int) -> int:
        """m: how many of so many sentences are masked."""
        return max(1, min(self.max_gaps, sentences - self.keep))


def spans(text: str) -> list[tuple[int, int]]:
    """Where the sentences of a text are, without the marks that end them.

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
    """The score of a sentence against a reference: the harmonic mean of ROUGE-1 F1 and BLEU; 0 where there is none."""
    of_words, of_phrases = rouge("rouge1", stems=False), sentence_bleu()

    def score(sentence: str, reference: str) -> float:
        r = of_words(sentence, reference)["rouge1"] if reference.strip() else 0.0
        b = of_phrases(sentence, reference) if r else 0.0  # no word in common, no phrase
        return 2 * r * b / (r + b) if r + b else 0.0

    return score


def masked(text: str, scores: Sequence[float], count: int) -> Gap:
    """A source without its best sentences; of equal ones, the earlier is the better.

    Args:
        scores: of its sentences, in their order.
        count: how many are masked.
    """
    where = spans(text)
    best = sorted(range(len(where)), key=lambda place: -scores[place])[:count]
    parts, start = [], 0
    for number, place in enumerate(sorted(best)):
        begin, end = where[place]
        parts += [text[start:begin], MASK.format(number)]
        start = end
    wanted = ". ".join(text[slice(*where[place])] for place in best)
    return Gap("".join([*parts, text[start:]]), wanted, tuple(scores), tuple(best))


@dataclass(frozen=True)
class GapData:
    """Gap sentences of many sources.

    Attributes:
        gaps: of the sources that have some.
        single: how many sources had one sentence only, of which nothing would be left, and were left out.
        unlabelled: how many had no summary.
    """

    gaps: list[Gap]
    single: int
    unlabelled: int

    def described(self) -> dict[str, Any]:
        """As JSON values."""
        share = [len(each.masked) / len(each.scores) for each in self.gaps]
        best = [max(each.scores) for each in self.gaps]
        return {
            "sources": len(self.gaps),
            "unlabelled": self.unlabelled,
            "single": self.single,
            "masked": sum(share) / len(share),
            "best score": sum(best) / len(best),
        }


def gap_sentences(pairs: Sequence[Pair], reports: Sequence[str] = (), gaps: Gaps = Gaps(), seed: int = 0) -> GapData:
    """Mask the most telling sentences of sources.

    Args:
        pairs: sources with summaries, of the training split alone: the summary decides what is masked.
        reports: sources without; each of their sentences is scored against the others.
        gaps: which sentences.
        seed: of the score ``random``.

    Raises:
        CalibrationError: when no source has two sentences.
    """
    drawn = random.Random(seed)
    overlap = None if gaps.score == "random" else harmonic()
    found, single = [], 0
    for text, summary in [*pairs, *((text, None) for text in reports)]:
        sentences = [text[start:end] for start, end in spans(text)]
        if len(sentences) < 2:
            single += 1
            continue
        if overlap is None:
            scores = [drawn.random() for _ in sentences]
        elif gaps.score == "self" or summary is None:
            others = [" ".join(sentences[:place] + sentences[place + 1 :]) for place in range(len(sentences))]
            scores = [overlap(each, rest) for each, rest in zip(sentences, others, strict=True)]
        else:
            scores = [overlap(each, summary) for each in sentences]
        found.append(masked(text, scores, gaps.count(len(sentences))))
    if not found:
        raise CalibrationError(
            f"{single} sources have one sentence only, so nothing is left around a gap: give sources of several"
        )
    return GapData(found, single, len(reports))
