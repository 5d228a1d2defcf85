"""Concepts of a text and their co-occurrence, by which a selection refuses samples that contradict it.

Concepts are phrases between stop words (RAKE: Rose et al., 2010, "Automatic keyword extraction from individual
documents"), ranked by how connected their words are. The consistency graph is that of PASER, arXiv 2502.12594.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations

CONCEPTS = 8  # per sample, at most
COMMON = 0.1  # concepts in more than this fraction of the samples do not characterise any of them
LONGEST = 3  # words per phrase


def concepts(texts: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the concepts of each text: lower case, without plural endings and without those that are too common.

    Args:
        texts: the texts of all samples, since what is common depends on all of them.
    """
    phrases = [_phrases(text) for text in texts]
    found = Counter(phrase for each in phrases for phrase in set(each))
    most = max(COMMON * len(texts), 1)
    return [tuple(phrase for phrase in _ranked(each) if found[phrase] <= most)[:CONCEPTS] for each in phrases]


def _phrases(text: str) -> list[str]:
    """Return runs of words between stop words and punctuation."""
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    phrases: list[str] = []
    for part in re.split(r"[^\w\s'-]+|\n", text.lower()):
        run: list[str] = []
        for word in [*part.split(), ""]:
            word = word.strip("'-_")
            if word and word not in ENGLISH_STOP_WORDS:
                run.append(_singular(word))
            elif run:
                phrases.append(" ".join(run[:LONGEST]))
                run = []
    return phrases


def _singular(word: str) -> str:
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")) else word


def _ranked(phrases: list[str]) -> list[str]:
    """Sort phrases by the sum of degree / frequency of their words, the best first; ties are sorted alphabetically."""
    frequency: Counter[str] = Counter()
    degree: Counter[str] = Counter()
    for phrase in phrases:
        words = phrase.split()
        frequency.update(words)
        degree.update({word: len(words) for word in words})
    score = {phrase: sum(degree[word] / frequency[word] for word in phrase.split()) for phrase in set(phrases)}
    return sorted(score, key=lambda phrase: (-score[phrase], phrase))


@dataclass
class ConceptGraph:
    """Concepts of accepted samples; two are joined when one accepted sample has both.

    Attributes:
        joined: for each concept the concepts joined with it.
    """

    joined: dict[str, set[str]] = field(default_factory=dict)

    def conflicts(self, concepts: Iterable[str]) -> list[tuple[str, str]]:
        """Return the pairs of known concepts that no accepted sample has together."""
        known = [concept for concept in dict.fromkeys(concepts) if concept in self.joined]
        return [(u, v) for u, v in combinations(known, 2) if v not in self.joined[u]]

    def add(self, concepts: Iterable[str]) -> None:
        """Accept a sample: its concepts become a clique."""
        clique = set(concepts)
        for concept in clique:
            self.joined.setdefault(concept, set()).update(clique - {concept})
