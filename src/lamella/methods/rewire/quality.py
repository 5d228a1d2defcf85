"""Steps 2 and 5: the similarity of a text to good ones; one interface, two classifiers to train, or a given one.

For those that are trained a text is one line of at most a thousand words in lower case, since fastText's scores depend
on newlines and length. A given classifier reads whole texts as they are, in one line, as DCLM's is applied.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Sequence
from heapq import nsmallest
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from lamella.data import Documents, InputContext, seed_of
from lamella.data.lazy import at
from lamella.errors import CalibrationError
from lamella.extras import require

Kind = Literal["hashed", "fasttext"]
WORDS = 1000  # maximum number of words of a text
TOGETHER = 1024  # texts that are scored together
FEATURES = 2**18  # hash buckets of words and bigrams
GOOD, OTHER = "__label__good", "__label__other"
FASTTEXT = {"lr": 0.5, "epoch": 25, "dim": 64, "wordNgrams": 2, "minCount": 1, "thread": 1, "verbose": 0}


class Positives(Documents):
    """Good texts, whose file may have other fields than that of the pool."""

    @classmethod
    def open(cls, name: str | Path, context: InputContext, *, positives_column: str = "text") -> Positives:  # type: ignore[override]
        """Read all good texts.

        Args:
            name: see :meth:`Documents.open`.
            context: see :meth:`Documents.open`.
            positives_column: field of a row with the text.

        Raises:
            CalibrationError: for a file that is missing, has no document, or is truncated.
        """
        found = Documents.open(name, context, column=positives_column)
        return cls(found, found.metadata, found.broken)


class Quality(Protocol):
    """A trained quality classifier."""

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Return P(good) of each text [n]."""
        ...


def line_of(text: str) -> str:
    """Return a text in the form for both classifiers."""
    return " ".join(re.findall(r"\w+|[^\w\s]", text.lower())[:WORDS])


def fit_quality(good: Sequence[str], others: Sequence[str], kind: Kind = "hashed", seed: int = 0) -> Quality:
    """Train a classifier of good texts against others.

    Args:
        good: good texts.
        others: other texts; one class may be larger.
        kind: ``hashed``, a linear classifier on hashed words and bigrams; or ``fasttext``, the paper's.
        seed: random seed of fastText's training.

    Raises:
        CalibrationError: when one of the classes is empty.
    """
    if not good or not others:
        raise CalibrationError(f"{len(good)} good and {len(others)} other texts: give at least one of both")
    lines = [line_of(text) for text in (*good, *others)]
    labels = np.array([True] * len(good) + [False] * len(others))
    if kind == "hashed":
        return Hashed(lines, labels)
    return FastText(lines, labels, seed)


class Hashed:
    """A linear classifier on hashed words and bigrams."""

    def __init__(self, lines: Sequence[str], labels: NDArray[np.bool_]) -> None:
        text = require("sklearn.feature_extraction.text", "rewrite", "the quality classifier")
        linear = require("sklearn.linear_model", "rewrite", "the quality classifier")
        self.counts = text.HashingVectorizer(
            ngram_range=(1, 2), n_features=FEATURES, alternate_sign=False, token_pattern=r"\S+", lowercase=False
        )
        self.model = linear.LogisticRegression(C=100.0, class_weight="balanced", max_iter=1000)
        self.model.fit(self.counts.transform(lines), labels)

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Return P(good) of each text [n]."""
        if not texts:
            return np.zeros(0)
        parts = [texts[start : start + TOGETHER] for start in range(0, len(texts), TOGETHER)]
        counts = (self.counts.transform(map(line_of, part)) for part in parts)
        return np.concatenate([self.model.predict_proba(each)[:, 1] for each in counts])


class FastText:
    """fastText with words and bigrams, as DCLM's classifier."""

    def __init__(self, lines: Sequence[str], labels: NDArray[np.bool_], seed: int) -> None:
        fasttext = require("fasttext", "fasttext", "classifier='fasttext'")
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "lines.txt"
            rows = [f"{GOOD if label else OTHER} {line}\n" for label, line in zip(labels, lines, strict=True)]
            file.write_text("".join(rows), encoding="utf-8")
            self.model: Any = fasttext.train_supervised(input=str(file), seed=seed % 2**31, **FASTTEXT)

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Return P(good) of each text [n]."""
        return probabilities(self.model, map(line_of, texts), GOOD)


class TrainedFastText:
    """A fastText classifier from a file, such as DCLM's, which the paper applies to raw text.

    Args:
        file: the file of the model (.bin).
        good: its label of good texts: ``__label__hq`` in DCLM's, where other texts have ``__label__cc``.

    Raises:
        LamellaError: if fastText is not installed.
        CalibrationError: for a missing file, one that is no fastText model, or a model without that label.
    """

    def __init__(self, file: str | Path, good: str) -> None:
        fasttext = require("fasttext", "fasttext", "a trained fastText classifier")
        path = Path(file).expanduser()
        if not path.is_file():
            raise CalibrationError(f"there is no file {file}: give a fastText model (.bin)")
        try:
            self.model: Any = fasttext.load_model(str(path))
        except ValueError as error:
            raise CalibrationError(f"{file}: no fastText model ({error}): give the .bin file of one") from None
        labels = self.model.get_labels()
        if good not in labels:
            raise CalibrationError(f"{file} has no label {good}: choose one of {', '.join(sorted(labels)[:9])}")
        self.good = good

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Return P(good) of each text [n]."""
        return probabilities(self.model, (" ".join(text.strip().splitlines()) for text in texts), self.good)


def probabilities(model: Any, lines: Iterable[str], label: str) -> NDArray[np.float64]:
    """Return the probability of a label for each line [n].

    Args:
        model: a fastText model.
        lines: the lines, without newlines.
        label: the label.
    """
    # the inner model, since the outer one uses an API that NumPy 2 removed in some packages
    predictions = ({each: p for p, each in model.f.predict(f"{line}\n", -1, 0.0, "strict")} for line in lines)
    found = np.fromiter((each.get(label, 0.0) for each in predictions), np.float64)
    return found.clip(0, 1)  # fastText rounds to slightly above 1


def cross_fitted(
    good: Sequence[str], ids: Sequence[str], texts: Sequence[str], most: int, kind: Kind, seed: int
) -> NDArray[np.float64]:
    """Score texts by classifiers that were not trained on them: each half is scored by one trained on the other half.

    Args:
        good: positives of both classifiers.
        ids: ids of the texts; a hash of them determines the half.
        texts: the texts.
        most: maximum number of texts of each class per classifier: the first of the good ones, and others selected by a
            hash of their ids.
        kind: kind of classifier.
        seed: random seed.
    """
    half = np.fromiter((seed_of("half", seed, each) % 2 for each in ids), int, len(ids))
    if len(set(half.tolist())) < 2:  # very few texts
        half = np.arange(len(ids)) % 2
    scores = np.zeros(len(texts))
    for which in (0, 1):
        inside, outside = (np.flatnonzero(each).tolist() for each in (half == which, half != which))
        negatives = nsmallest(most, outside, key=lambda n: seed_of("negative", seed, ids[n]))
        quality = fit_quality(good[:most], [texts[n] for n in negatives], kind, seed)
        scores[inside] = quality(at(texts, inside))
    return scores


def top(scores: Sequence[float], ids: Sequence[str], sizes: Sequence[int], target: float) -> list[int]:
    """Return the indices of the best texts that together reach a size, in their order.

    Ties are broken by a hash of the id.

    Args:
        scores: scores of the texts.
        ids: ids of the texts.
        sizes: 1 for each text to count documents, or their tokens.
        target: the size to reach.
    """
    ties = np.fromiter((seed_of("tie", each) for each in ids), np.int64, len(ids))
    order = np.lexsort((ties, -np.asarray(scores)))
    reached = np.cumsum(np.asarray(sizes)[order])
    count = 1 + np.searchsorted(reached, target - 1e-9) if target > 1e-9 else 0
    selected: list[int] = np.sort(order[:count]).tolist()
    return selected
