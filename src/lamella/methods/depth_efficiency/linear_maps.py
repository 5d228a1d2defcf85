"""Linear maps from every layer of one model to every layer of another: does a deeper model compute something new?

For each pair of points, i of the source and j of the target, a ridge regression predicts the target's residual stream
from the source's at the same token (arXiv 2505.13898, section on linear maps):

    W = (Xᵀ X + λ I)⁻¹ Xᵀ Y,     λ = ridge · trace(Xᵀ X) / d,     X, Y centred

If the deeper model only spreads the same computation over more layers, points of equal relative depth predict each
other best: the lowest errors lie on the diagonal.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lamella.errors import CalibrationError
from lamella.measure import Scores, Tokens, describe, spearman
from lamella.measure.hidden_states import sequences
from lamella.methods.depth_efficiency.contributions import run_once
from lamella.progress import track
from lamella.stack import Stack

ENOUGH = 20  # training tokens per channel of the source needed for meaningful held-out errors
HELD_OUT = 0.2  # fraction of the sequences that is held out, the last ones


@dataclass(frozen=True)
class LinearMaps:
    """Errors of predicting the residual stream at each point of one model from each point of another.

    Attributes:
        errors: mean of ``||Y - X W - b|| / ||Y||`` over held-out tokens, ``("source", "target")``
            [source layers + 1, target layers + 1].
        few: whether there were fewer than 20 training tokens per channel of the source.
    """

    errors: Scores
    few: bool

    @property
    def best(self) -> np.ndarray:
        """The source point that predicts each target point best [target layers + 1]."""
        return self.errors.values.argmin(axis=0)

    @property
    def correlation(self) -> float:
        """Rank correlation of target points and their best source points; 0 if one is best for all."""
        return spearman(self.best, np.arange(len(self.best))) or 0.0

    @property
    def offset(self) -> float:
        """Mean difference of relative depth between target points and their best source points."""
        source, target = (size - 1 for size in self.errors.values.shape)
        return float(np.abs(self.best / source - np.arange(target + 1) / target).mean())

    def along(self, *, reverse: bool = False) -> float:
        """Return the mean error on the diagonal of equal relative depth, or on the reverse diagonal."""
        source, target = (size - 1 for size in self.errors.values.shape)
        positions = np.arange(target + 1)
        rows = np.rint(positions * source / target).astype(int)
        return float(self.errors.values[source - rows if reverse else rows, positions].mean())

    def as_dict(self) -> dict[str, Any]:
        """Return errors and measures as JSON values."""
        measures = {"correlation": self.correlation, "offset": self.offset, "few": self.few}
        return {"errors": self.errors.as_dict(), "best": self.best.tolist()} | measures


def linear_maps(source: Stack, target: Stack, tokens: Tokens, *, ridge: float = 1e-3, front: int = 1) -> LinearMaps:
    """Fit all linear maps between two models with the same tokenizer.

    The hidden states are stored in a temporary file, so that only a few points are in memory at a time.

    Args:
        source: the model to predict from; the paper maps the shallow model to the deep one.
        target: the model to predict.
        tokens: token ids [sequences, time]; the last fifth of the sequences is held out.
        ridge: λ, relative to the mean variance of the source's channels.
        front: number of tokens at the front of each sequence that are ignored.

    Raises:
        CalibrationError: if there are too few sequences to hold some out, or a token unknown to one model.
    """
    rows = sequences(tokens)
    held_out = max(1, round(HELD_OUT * len(rows)))
    if len(rows) < 2:
        raise CalibrationError("one sequence cannot be split into training and held-out data: give at least two")
    known = min(stack.config.vocab_size for stack in (source, target))
    maximum = max(int(row["input_ids"].max()) for row in rows)
    if maximum >= known:
        raise CalibrationError(f"token {maximum} is unknown to one of the models: linear maps need a common tokenizer")
    with _hidden_states(source, rows, front) as (x, lengths), _hidden_states(target, rows, front) as (y, _):
        fit = sum(lengths[:-held_out])
        errors = np.empty((len(x), len(y)))
        for i in track(range(len(x)), f"linear maps from {source.name}"):
            errors[i] = _map(torch.from_numpy(x[i]), y, fit, ridge)
        few = fit < ENOUGH * x.shape[-1]
    about = {"tokens": describe(tokens), "ridge": ridge, "front": front, "fitted": fit, "held_out": sum(lengths) - fit}
    return LinearMaps(Scores("relative error of the best linear map", ("source", "target"), errors, about), few)


def _map(x: torch.Tensor, targets: np.ndarray, fit: int, ridge: float) -> list[float]:
    """Return the held-out errors of the maps from one point [tokens, channels] to all points of the target."""
    mean = x[:fit].mean(0)
    seen, other = (x[:fit] - mean).double(), (x[fit:] - mean).double()
    gram = seen.T @ seen
    gram.diagonal().add_(ridge * gram.trace() / len(gram))
    factor = torch.linalg.cholesky(gram)
    errors = []
    for point in targets:
        y = torch.from_numpy(point).double()
        centre = y[:fit].mean(0)
        w = torch.cholesky_solve(seen.T @ (y[:fit] - centre), factor)
        left = y[fit:] - centre - other @ w
        errors.append(float((left.norm(dim=-1) / y[fit:].norm(dim=-1)).mean()))
    return errors


@contextmanager
def _hidden_states(
    stack: Stack, rows: list[dict[str, torch.Tensor]], front: int
) -> Iterator[tuple[np.ndarray, list[int]]]:
    """Store the hidden states at every point on disk [layers + 1, tokens, hidden]; also yield the lengths."""
    reals = [row.get("attention_mask", torch.ones_like(row["input_ids"])).bool() for row in rows]
    lengths = [int(real.sum()) - front for real in reals]
    with tempfile.TemporaryDirectory() as folder:
        shape = (len(stack) + 1, sum(lengths), stack.unembedding.weight.shape[1])
        kept = np.memmap(Path(folder) / "hidden_states", np.float32, "w+", shape=shape)
        start = 0
        for row, real, length in zip(track(rows, f"hidden states of {stack.name}"), reals, lengths, strict=True):
            h = run_once(stack, row["input_ids"][real].to(stack.device)).h
            kept[:, start : start + length] = h[:, front:].float().cpu().numpy()
            start += length
        yield kept, lengths
