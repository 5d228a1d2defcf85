"""Step 4: what a rephraser says beside the rephrase goes; what is no rephrase is dropped, for a reason that is counted.

The paper filters unwanted prefixes; the other filters and all thresholds are ours.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from lamella.methods.wrap.styles import Style

ABOUT = r"\b(?:text|passage|version|paraphras\w*|rephras\w*|rewrit\w*|conversation)\b"
CLAUSE = rf"\b[^\n:]{{0,150}}?(?:{ABOUT}[^\n:]{{0,150}}:|:[^\S\n]*(?=\n|\Z))"  # names the rephrase, or ends its line
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
LEAST = 4  # words of a text that is looked for: fewer stand anywhere
REASONS = ("empty", "refusal", "unfinished", "format", "length", "repetition", "copy", "evaluation", "similarity")


@dataclass(frozen=True)
class Filters:
    """What is dropped.

    Attributes:
        ratio_least: tokens of a rephrase for one of its passage, at least.
        ratio_most: the same at most; left out, that of the style: 2.5, and 3 for ``qa``.
        repetition: the largest share of 4-grams that came before.
        copy: the largest share of 8-grams that the passage has.
        similarity: the smallest cosine to the passage.
        embedder: of the cosine: minilm, a sentence embedder, or words, which counts words alone.
        ngram: words in a row that an evaluation set and a text must not share; a shorter text of the set counts as a
            whole.
    """

    ratio_least: Annotated[float, Ge(0)] = 0.3
    ratio_most: Annotated[float, Gt(0)] | None = None
    repetition: Annotated[float, Ge(0), Le(1)] = 0.3
    copy: Annotated[float, Ge(0), Le(1)] = 0.9
    similarity: Annotated[float, Ge(-1), Le(1)] = 0.5
    embedder: Literal["minilm", "words"] = "minilm"
    ngram: Annotated[int, Ge(1)] = 13


def cleaned(text: str, finished: bool) -> str:
    """A rephrase without what stands around it, and without a last sentence that its limit has cut."""
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


def dropped_for(
    text: str, said: str, passage: str, style: Style, ratio: float, filters: Filters, evaluations: Evaluations
) -> str | None:
    """Why a rephrase is dropped, as far as that can be told without an embedder; None where it is not.

    Args:
        text: the cleaned rephrase.
        said: what the rephraser said.
        passage: the source.
        ratio: tokens of the rephrase for one of the passage.
    """
    most = style.longest if filters.ratio_most is None else filters.ratio_most
    words = words_of(text)
    if not said.strip():
        return "empty"
    if REFUSAL.match(said) or REFUSAL.match(text):  # also behind a preamble
        return "refusal"
    if not text:
        return "unfinished"
    if style.answers and not PAIR.search(text):
        return "format"
    if not filters.ratio_least <= ratio <= most:
        return "length"
    if repeated(words, 4) > filters.repetition:
        return "repetition"
    if copied(words, words_of(passage), 8) > filters.copy:
        return "copy"
    return "evaluation" if evaluations.meet(words) else None


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def grams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """Words in a row; a text of fewer words has one, of all of them."""
    n = min(n, len(words))
    return [tuple(words[place : place + n]) for place in range(len(words) - n + 1)] if n else []


def repeated(words: Sequence[str], n: int) -> float:
    """The share of n-grams that came before."""
    counts = Counter(grams(words, n))
    return 1 - len(counts) / counts.total() if counts else 0.0


def copied(words: Sequence[str], source: Sequence[str], n: int) -> float:
    """The share of n-grams that the source has, too."""
    own = grams(words, n)
    theirs = set(grams(source, min(n, len(words))))
    return sum(each in theirs for each in own) / len(own) if own else 0.0


class Evaluations:
    """Texts that a model will be judged on, of which none may be learnt.

    Args:
        texts: of the sets.
        n: words in a row that give a text away; a shorter text counts as a whole.

    Attributes:
        short: how many texts have fewer than :data:`LEAST` words, for which nothing is looked for.
    """

    def __init__(self, texts: Iterable[str], n: int) -> None:
        given = [words for text in texts if (words := words_of(text))]
        told = [words for words in given if len(words) >= min(LEAST, n)]
        self.n, self.short = n, len(given) - len(told)
        self.known = {gram for words in told for gram in grams(words, n)}
        self.lengths = sorted({len(gram) for gram in self.known})

    @property
    def digest(self) -> str:
        """Of all that is known of them."""
        return hashlib.sha256("\n".join(sorted(map(" ".join, self.known))).encode()).hexdigest()

    def meet(self, words: Sequence[str]) -> bool:
        """Whether a text has words in a row of one of them."""
        return any(gram in self.known for n in self.lengths if n <= len(words) for gram in grams(words, n))

    def places(self, text: str) -> list[tuple[int, int]]:
        """Where a text has words in a row of one of them: from which character to which."""
        found = [(match.group().lower(), match.start(), match.end()) for match in re.finditer(r"\w+", text)]
        words = [word for word, _, _ in found]
        return [
            (found[first][1], found[first + n - 1][2])
            for n in self.lengths
            for first in range(len(words) - n + 1)
            if tuple(words[first : first + n]) in self.known
        ]
