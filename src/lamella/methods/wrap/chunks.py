"""Step 1: passages of at most 300 tokens, since a rephraser loses content of longer ones.

No text is lost: the concatenation of a document's passages is the document.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import pairwise

Count = Callable[[str], int]
BREAKS = (r"\n[^\S\n]*\n\s*", r"(?<=[.!?])[\"')\]]*\s+|\n", r"\s+", "")  # paragraphs, sentences, words, characters


def passages(text: str, count: Count, max_tokens: int) -> list[str]:
    """Split a text between paragraphs, otherwise between sentences, otherwise between words or characters.

    Args:
        text: the text.
        count: returns the number of tokens of a text.
        max_tokens: maximum number of tokens per passage.
    """
    found: list[str] = []
    for piece in _pieces(text, count, max_tokens):
        if found and count(found[-1] + piece) <= max_tokens:
            found[-1] += piece
        else:
            found.append(piece)
    return found


def _pieces(text: str, count: Count, max_tokens: int, level: int = 0) -> Iterator[str]:
    """Yield short enough parts of the text, split at the coarsest possible level."""
    if count(text) <= max_tokens or len(text) == 1:
        if text:
            yield text
        return
    for part in _cut(text, BREAKS[level]):
        yield from _pieces(part, count, max_tokens, min(level + 1, len(BREAKS) - 1))


def _cut(text: str, pattern: str) -> list[str]:
    """Split the text after each match; in two halves if the pattern is empty."""
    if not pattern:
        return [text[: len(text) // 2], text[len(text) // 2 :]]
    ends = [0, *(match.end() for match in re.finditer(pattern, text)), len(text)]
    return [text[start:end] for start, end in pairwise(ends) if start < end]
