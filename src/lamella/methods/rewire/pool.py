"""Step 1: the pool: documents that rules let pass, of which near-duplicates are gone.

The rules are those of MassiveText and RefinedWeb that need no language model: on length, words, symbols and lines.
Near-duplicates are found by datatrove's MinHash, over words that need no further package.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Gt, Le

from lamella.data import Document
from lamella.extras import require

BULLETS, ELLIPSES = ("-", "*", "\u2022"), ("...", "\u2026")


@dataclass(frozen=True)
class Rules:
    """What a document must be like to be in the pool.

    Attributes:
        words_least, words_most: of a document.
        word_least, word_most: letters of a word, the mean.
        symbols: the largest share of # and ellipses among words.
        letters: the smallest share of words with a letter.
        bullets: the largest share of lines that begin with a bullet.
        ellipses: the largest share of lines that end with an ellipsis.
        repeated: the largest share of lines that came before.
        near_duplicates: whether near-duplicates are looked for.
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


def refused(text: str, rules: Rules) -> str | None:
    """The rule that a document breaks; None where it breaks none."""
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


def pool_of(documents: Sequence[Document], rules: Rules, folder: Path) -> tuple[list[Document], dict[str, int]]:
    """The documents of the pool in their order, and how many were left out for which reason.

    Args:
        folder: of MinHash's signatures.
    """
    reasons = [refused(each.text, rules) for each in documents]
    left = [each for each, why in zip(documents, reasons, strict=True) if why is None]
    said = dict(Counter(why for why in reasons if why is not None))
    if rules.near_duplicates:
        again = near_duplicates([each.text for each in left], folder)
        said |= {"near-duplicates": len(again)} if again else {}
        left = [each for number, each in enumerate(left) if number not in again]
    return left, said


def near_duplicates(texts: Sequence[str], folder: Path) -> set[int]:
    """The numbers of the texts that nearly repeat another one, of which one of each kind stays.

    Args:
        folder: for signatures; what lies there is written anew.
    """
    require("datatrove", "rewrite", "the search for near-duplicates")
    from lamella.methods.rewire.minhash import repeated

    return repeated(texts, folder)


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
