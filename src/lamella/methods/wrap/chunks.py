"""Step 1: passages of at most 300 tokens, since a rephraser loses what stands in longer ones.

Nothing is lost in cutting: the passages of a document, one after the other, are the document.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import pairwise

Count = Callable[[str], int]
BREAKS = (r"\n[^\S\n]*\n\s*", r"(?<=[.!?])[\"')\]]*\s+|\n", r"\s+", "")  # of paragraphs, sentences, words, characters


def passages(text: str, count: Count, longest: int) -> list[str]:
    """Cut a text between paragraphs, else between sentences, else where it must be.

    Args:
        count: how many tokens a text has.
        longest: tokens of a passage, at most.
    """
    found: list[str] = []
    for piece in _pieces(text, count, longest):
        if found and count(found[-1] + piece) <= longest:
            found[-1] += piece
        else:
            found.append(piece)
    return found


def _pieces(text: str, count: Count, longest: int, level: int = 0) -> Iterator[str]:
    """The text in parts that are short enough, none of them cut where it need not be."""
    if count(text) <= longest or len(text) == 1:
        if text:
            yield text
        return
    for part in _cut(text, BREAKS[level]):
        yield from _pieces(part, count, longest, min(level + 1, len(BREAKS) - 1))


def _cut(text: str, pattern: str) -> list[str]:
    """The text behind each match; in two halves where the pattern is empty."""
    if not pattern:
        return [text[: len(text) // 2], text[len(text) // 2 :]]
    ends = [0, *(match.end() for match in re.finditer(pattern, text)), len(text)]
    return [text[start:end] for start, end in pairwise(ends) if start < end]
