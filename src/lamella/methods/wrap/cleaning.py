"""Step 4: remove text around the rephrase, and drop outputs that are no rephrases, with a reason that is counted.

The paper filters unwanted prefixes; the other filters and all thresholds are ours.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from lamella.methods.wrap.styles import Style

ABOUT = r"\b(?:text|passage|version|paraphras\w*|rephras\w*|rewrit\w*|conversation)\b"
CLAUSE = rf"\b[^\n:]{{0,150}}?(?:{ABOUT}[^\n:]{{0,150}}:|:[^\S\n]*(?=\n|\Z))"  # mentions the rephrase, or ends its line
PREAMBLE = re.compile(
    r"\s*(?:"
    rf"(?:sure|certainly|of course|absolutely|okay|ok|great)(?:[!.]+|,? (?:here|i|this){CLAUSE})"
    rf"|here(?:'s|\u2019s| is| are){CLAUSE}"
    r"|\**(?:paraphrase[d]?|rephrase[d]?|rewritten|simplified)(?: (?:text|version|passage))?\**:\**"
    r")\s*",
    re.IGNORECASE,
)
NOTE = re.compile(
    r"\n+\s*[(\[*]*(?:note\b|please note|please let me know|let me know|i hope|"
    r"this (?:paraphrase|rephrase|version|text)\b)"
    r"[^\n]*\s*\Z",
    re.IGNORECASE,
)
REFUSAL = re.compile(
    r"\s*(?:i(?:'|\u2019)?m sorry|i am sorry|sorry,|i apologi[sz]e|i can(?:no|'|\u2019)?t\b|i am (?:un|not )able|"
    r"i(?:'|\u2019)m (?:un|not )able|as an? (?:ai|language model)|unfortunately, i)",
    re.IGNORECASE,
)
SENTENCE = re.compile(r"[.!?][\"')\]\u201d]*(?=\s|\Z)")
PAIR = re.compile(r"question\s*\d*\s*:.+?answer\s*\d*\s*:\s*\S", re.IGNORECASE | re.DOTALL)
MIN_WORDS = 4  # shorter evaluation texts are ignored, since they occur anywhere
REASONS = ("empty", "refusal", "unfinished", "format", "length", "repetition", "copy", "evaluation", "similarity")


@dataclass(frozen=True)
class Filters:
    """The filters.

    Attributes:
        ratio_least: minimum ratio of the tokens of a rephrase to those of its passage.
        ratio_most: maximum of that ratio; if omitted, that of the style: 2.5, and 3 for ``qa``.
        repetition: maximum fraction of repeated 4-grams.
        copy: maximum fraction of 8-grams that also occur in the passage.
        similarity: minimum cosine similarity to the passage.
        embedder: embedder of the cosine: minilm, a sentence embedder, or words, which only counts words.
        ngram: number of consecutive words that must not be shared with an evaluation set; a shorter text of the set
            must not occur as a whole.
    """

    ratio_least: Annotated[float, Ge(0)] = 0.3
    ratio_most: Annotated[float, Gt(0)] | None = None
    repetition: Annotated[float, Ge(0), Le(1)] = 0.3
    copy: Annotated[float, Ge(0), Le(1)] = 0.9
    similarity: Annotated[float, Ge(-1), Le(1)] = 0.5
    embedder: Literal["minilm", "words"] = "minilm"
    ngram: Annotated[int, Ge(1)] = 13


def clean_rephrase(text: str, finished: bool) -> str:
    """Remove preambles, notes and quotes around a rephrase, and an incomplete last sentence.

    Args:
        text: the output of the rephraser.
        finished: whether the output ended before its limit.
    """
    text = text.strip()
    while match := PREAMBLE.match(text):
        text = text[match.end() :]
    while match := NOTE.search(text):
        text = text[: match.start()]
    if not finished:
        ends = [match.end() for match in SENTENCE.finditer(text)]
        text = text[: ends[-1]] if ends else ""
    text = text.strip()
    quoted = len(text) > 1 and text[0] == text[-1] == '"' and '"' not in text[1:-1]
    return text[1:-1].strip() if quoted else text


def drop_reason(
    text: str, output: str, passage: str, style: Style, ratio: float, filters: Filters, evaluations: Evaluations
) -> str | None:
    """Return the reason to drop a rephrase, except for its similarity; None if there is none.

    Args:
        text: the cleaned rephrase.
        output: the output of the rephraser.
        passage: the source.
        style: the style.
        ratio: ratio of the tokens of the rephrase to those of the passage.
        filters: the filters.
        evaluations: the evaluation sets.
    """
    ratio_limit = style.longest if filters.ratio_most is None else filters.ratio_most
    words = words_of(text)
    if not output.strip():
        return "empty"
    if REFUSAL.match(output) or REFUSAL.match(text):  # also after a preamble
        return "refusal"
    if not text:
        return "unfinished"
    if style.answers and not PAIR.search(text):
        return "format"
    if not filters.ratio_least <= ratio <= ratio_limit:
        return "length"
    if repeated_fraction(words, 4) > filters.repetition:
        return "repetition"
    if copied_fraction(words, words_of(passage), 8) > filters.copy:
        return "copy"
    return "evaluation" if evaluations.overlaps(words) else None


def words_of(text: str) -> list[str]:
    """Return the lower-case words of a text."""
    return re.findall(r"\w+", text.lower())


def grams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """Return all n-grams of the words; for fewer words a single one of all of them.

    Args:
        words: the words.
        n: the number of words per n-gram.
    """
    return list(zip(*(words[start:] for start in range(min(n, len(words)))), strict=False))


def repeated_fraction(words: Sequence[str], n: int) -> float:
    """Return the fraction of n-grams that occurred before.

    Args:
        words: the words.
        n: the number of words per n-gram.
    """
    found = grams(words, n)
    return 1 - len(set(found)) / len(found) if found else 0.0


def copied_fraction(words: Sequence[str], source: Sequence[str], n: int) -> float:
    """Return the fraction of n-grams that also occur in the source.

    Args:
        words: the words.
        source: the words of the source.
        n: the number of words per n-gram.
    """
    own = grams(words, n)
    theirs = set(grams(source, min(n, len(words))))
    return sum(map(theirs.__contains__, own)) / len(own) if own else 0.0


class Evaluations:
    """Texts of evaluation sets, which must not be trained on.

    Args:
        texts: the texts of the sets.
        n: number of consecutive words that identify a text; a shorter text counts as a whole.

    Attributes:
        short: the number of texts with fewer than :data:`MIN_WORDS` words, which are ignored.
    """

    def __init__(self, texts: Iterable[str], n: int) -> None:
        tokenised = [words for text in texts if (words := words_of(text))]
        usable = [words for words in tokenised if len(words) >= min(MIN_WORDS, n)]
        self.n, self.short = n, len(tokenised) - len(usable)
        self.known = {gram for words in usable for gram in grams(words, n)}
        self.lengths = sorted({len(gram) for gram in self.known})

    @property
    def digest(self) -> str:
        """A digest of all n-grams."""
        return hashlib.sha256("\n".join(sorted(map(" ".join, self.known))).encode()).hexdigest()

    def overlaps(self, words: Sequence[str]) -> bool:
        """Return whether a text shares an n-gram with one of them."""
        return any(gram in self.known for n in self.lengths if n <= len(words) for gram in grams(words, n))

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Return the character ranges of a text that are shared with one of them."""
        if not self.known:
            return []
        found = [(match.group().lower(), match.start(), match.end()) for match in re.finditer(r"\w+", text)]
        words = [word for word, _, _ in found]
        return [
            (found[first][1], found[first + n - 1][2])
            for n in self.lengths
            for first in range(len(words) - n + 1)
            if tuple(words[first : first + n]) in self.known
        ]
