"""Steps 2 and 5: how much a text is like the good ones; one interface, two classifiers.

A text is one line of at most a thousand words in small letters, whichever classifies it: fastText's own scores change
with newlines and length.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from lamella.data import Documents, InputContext, seed_of
from lamella.errors import CalibrationError
from lamella.extras import require

Kind = Literal["hashed", "fasttext"]
WORDS = 1000  # of a text, that are looked at
PLACES = 2**18  # of hashed words and pairs of words
GOOD, OTHER = "__label__good", "__label__other"
FASTTEXT = {"lr": 0.5, "epoch": 25, "dim": 64, "wordNgrams": 2, "minCount": 1, "thread": 1, "verbose": 0}


class Positives(Documents):
    """Good texts, whose file may have other fields than that of the pool."""

    @classmethod
    def open(cls, name: str | Path, context: InputContext, *, positives_column: str = "text") -> Positives:  # type: ignore[override]
        """Read all of them.

        Args:
            name: see :meth:`Documents.open`.
            positives_column: the field of a row that holds a good text.

        Raises:
            CalibrationError: for what is not there, holds no document, or ends early.
        """
        found = Documents.open(name, context, column=positives_column)
        return cls(found, found.metadata, found.broken)


class Quality(Protocol):
    """A classifier that has learnt what is good."""

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """P(good) of each text [n]."""
        ...


def line_of(text: str) -> str:
    """A text as both classifiers read it."""
    return " ".join(re.findall(r"\w+|[^\w\s]", text.lower())[:WORDS])


def fit_quality(good: Sequence[str], others: Sequence[str], kind: Kind = "hashed", seed: int = 0) -> Quality:
    """Learn to tell good texts from others.

    Args:
        good, others: texts; one class may be larger.
        kind: ``hashed``, a linear classifier on hashed words and pairs of words; or ``fasttext``, the paper's.
        seed: of fastText's training.

    Raises:
        CalibrationError: when there are no texts of one kind.
    """
    if not good or not others:
        raise CalibrationError(f"{len(good)} good and {len(others)} other texts: give some of both")
    lines = [line_of(text) for text in (*good, *others)]
    labels = np.array([True] * len(good) + [False] * len(others))
    if kind == "hashed":
        return Hashed(lines, labels)
    return FastText(lines, labels, seed)


class Hashed:
    """A linear classifier on hashed words and pairs of words."""

    def __init__(self, lines: Sequence[str], labels: NDArray[np.bool_]) -> None:
        text = require("sklearn.feature_extraction.text", "rewrite", "the quality classifier")
        linear = require("sklearn.linear_model", "rewrite", "the quality classifier")
        self.counts = text.HashingVectorizer(
            ngram_range=(1, 2), n_features=PLACES, alternate_sign=False, token_pattern=r"\S+", lowercase=False
        )
        self.model = linear.LogisticRegression(C=100.0, class_weight="balanced", max_iter=1000)
        self.model.fit(self.counts.transform(lines), labels)

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float64]:
        if not texts:
            return np.zeros(0)
        scores: NDArray[np.float64] = self.model.predict_proba(self.counts.transform(map(line_of, texts)))[:, 1]
        return scores


class FastText:
    """fastText, as DCLM's classifier is, with words and pairs of words."""

    def __init__(self, lines: Sequence[str], labels: NDArray[np.bool_], seed: int) -> None:
        fasttext = require("fasttext", "fasttext", "classifier='fasttext'")
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "lines.txt"
            rows = [f"{GOOD if label else OTHER} {line}\n" for label, line in zip(labels, lines, strict=True)]
            file.write_text("".join(rows), encoding="utf-8")
            self.model: Any = fasttext.train_supervised(input=str(file), seed=seed % 2**31, **FASTTEXT)

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float64]:
        # of the inner model, since the outer one asks NumPy for what its second version refuses
        said = [dict(map(reversed, self.model.f.predict(f"{line_of(text)}\n", 2, 0.0, "strict"))) for text in texts]
        return np.array([each.get(GOOD, 0.0) for each in said])


def cross_fitted(
    good: Sequence[str], ids: Sequence[str], texts: Sequence[str], most: int, kind: Kind, seed: int
) -> NDArray[np.float64]:
    """Scores of texts by classifiers that have not learnt from them: each half is scored by one fitted on the other.

    Args:
        good: positives of both.
        ids: of the texts; a hash of them decides who is in which half.
        most: texts of each class that one classifier takes: the first of the good ones, and others as a hash of their
            ids draws them.
    """
    half = np.array([seed_of("half", seed, each) % 2 for each in ids])
    if len(set(half.tolist())) < 2:  # very few texts
        half = np.arange(len(ids)) % 2
    scores = np.zeros(len(texts))
    for which in (0, 1):
        inside, outside = (np.flatnonzero(each).tolist() for each in (half == which, half != which))
        drawn = sorted(outside, key=lambda n: seed_of("negative", seed, ids[n]))[:most]
        quality = fit_quality(good[:most], [texts[n] for n in drawn], kind, seed)
        scores[inside] = quality([texts[n] for n in inside])
    return scores


def top(scores: Sequence[float], ids: Sequence[str], sizes: Sequence[int], wanted: float) -> list[int]:
    """The best texts, as many as it takes to reach a size, in their order; a hash of the id decides between equals.

    Args:
        sizes: 1 of each text to count documents, or their tokens.
        wanted: the size, which the last one that is taken reaches.
    """
    order = sorted(range(len(ids)), key=lambda n: (-scores[n], seed_of("tie", ids[n])))
    taken: list[int] = []
    reached = 0
    for number in order:
        if reached >= wanted - 1e-9:
            break
        taken.append(number)
        reached += sizes[number]
    return sorted(taken)
