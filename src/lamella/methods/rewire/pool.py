"""Step 1: the pool of documents that pass the rules, without near-duplicates.

The rules are those of MassiveText and RefinedWeb that need no language model: on length, words, symbols and lines.
Near-duplicates are found by datatrove's MinHash, with a word tokenizer that needs no further package.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Gt, Le

from lamella.data import Document, Lazy
from lamella.data.lazy import at, mapped
from lamella.extras import require
from lamella.workers import Workers

BULLETS, ELLIPSES = ("-", "*", "\u2022"), ("...", "\u2026")


@dataclass(frozen=True)
class PoolRules:
    """Rules for the documents of the pool.

    Attributes:
        words_least: minimum number of words of a document.
        words_most: maximum number of words of a document.
        word_least: minimum mean length of words in characters.
        word_most: maximum mean length of words in characters.
        symbols: maximum ratio of # and ellipses to words.
        letters: minimum fraction of words with a letter.
        bullets: maximum fraction of lines that start with a bullet.
        ellipses: maximum fraction of lines that end with an ellipsis.
        repeated: maximum fraction of repeated lines.
        near_duplicates: whether near-duplicates are removed.
    """

    words_least: Annotated[int, Ge(0)] = 50
    words_most: Annotated[int, Ge(1)] = 100_000
    word_least: Annotated[float, Ge(0)] = 3.0
    word_most: Annotated[float, Gt(0)] = 10.0
    symbols: Annotated[float, Ge(0)] = 0.1
    letters: Annotated[float, Ge(0), Le(1)] = 0.8
    bullets: Annotated[float, Ge(0), Le(1)] = 0.9
    ellipses: Annotated[float, Ge(0), Le(1)] = 0.3
    repeated: Annotated[float, Ge(0), Le(1)] = 0.3
    near_duplicates: bool = True


def broken_rule(text: str, rules: PoolRules) -> str | None:
    """Return the rule that a document breaks, or None.

    Args:
        text: the document.
        rules: the rules of the pool.
    """
    words = text.split()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not rules.words_least <= len(words) <= rules.words_most or not lines:
        return "words"
    if not rules.word_least <= sum(map(len, words)) / len(words) <= rules.word_most:
        return "length of words"
    if (text.count("#") + sum(map(text.count, ELLIPSES))) / len(words) > rules.symbols:
        return "symbols"
    if sum(any(map(str.isalpha, word)) for word in words) / len(words) < rules.letters:
        return "letters"
    if sum(line.startswith(BULLETS) for line in lines) / len(lines) > rules.bullets:
        return "bullets"
    if sum(line.endswith(ELLIPSES) for line in lines) / len(lines) > rules.ellipses:
        return "ellipses"
    return "repeated lines" if 1 - len(set(lines)) / len(lines) > rules.repeated else None


def pool_of(
    documents: Sequence[Document], rules: PoolRules, folder: Path, workers: Workers
) -> tuple[Lazy[Document], dict[str, int]]:
    """Return the documents of the pool in their order, and the number of excluded documents by reason.

    Args:
        documents: the documents.
        rules: the rules.
        folder: folder for MinHash signatures.
        workers: where the signatures are computed.
    """
    reasons = [broken_rule(each.text, rules) for each in documents]
    kept = at(documents, [number for number, why in enumerate(reasons) if why is None])
    counts = dict(Counter(why for why in reasons if why is not None))
    if rules.near_duplicates:
        duplicates = near_duplicates(texts_of(kept), folder, workers)
        counts |= {"near-duplicates": len(duplicates)} if duplicates else {}
        return at(kept, [number for number in range(len(kept)) if number not in duplicates]), counts
    return kept, counts


def texts_of(documents: Sequence[Document]) -> Lazy[str]:
    """Return the texts of documents, read on access."""
    return mapped(documents, lambda document: document.text)


def near_duplicates(texts: Sequence[str], folder: Path, workers: Workers = Workers()) -> set[int]:  # noqa: B008, frozen
    """Return the indices of near-duplicates to remove; one text of each group is kept.

    Args:
        texts: the texts.
        folder: folder for signatures; existing content is replaced.
        workers: where the signatures are computed.
    """
    require("datatrove", "rewrite", "the search for near-duplicates")
    from lamella.methods.rewire.minhash import duplicate_indices

    return duplicate_indices(texts, folder, workers)


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case."""
    return re.findall(r"\w+", text.lower())
