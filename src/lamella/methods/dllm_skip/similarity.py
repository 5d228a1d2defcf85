"""Similarity of the residual stream between layers and between tokens, at every noise level.

Cosines are those of the residual stream before the final norm. Tokens at the front are excluded: the first one is an
attention sink, whose cosine is near 1 in every middle layer. Masked and visible tokens are measured separately, since a
layer treats them differently.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from lamella.errors import CalibrationError
from lamella.measure import Draw, Scores
from lamella.progress import track
from lamella.stack import Hidden, Stack, join

KINDS = ("masked", "visible")


@dataclass(frozen=True)
class Similarity:
    """The result of :func:`similarity`.

    Attributes:
        table: mean cosine of a layer's input and output (layer, ratio, kind); NaN if there was no such token. For an
            autoregressive model there is only the ratio 0 and visible tokens.
        ratios: fractions of masked tokens, along the second axis.
        spread: standard deviation over all tokens (layer).
        points: mean cosine of the residual stream at two points (point, point), L + 1 of them.
        recency: mean cosine of a token with an earlier one (point, lag), lags from 1 on.
    """

    table: Scores
    ratios: tuple[float, ...]
    spread: Scores
    points: Scores
    recency: Scores

    @property
    def by_layer(self) -> np.ndarray:
        """sim_l: the mean over ratios and kinds with equal weights [layers]."""
        mean: np.ndarray = np.nanmean(self.table.values, axis=(1, 2))
        return mean

    def of(self, kind: str) -> np.ndarray:
        """Return the mean over ratios for ``masked`` or ``visible`` tokens [layers]; NaN if there are none."""
        part = self.table.values[:, :, KINDS.index(kind)]
        known = ~np.isnan(part)
        total = np.where(known, part, 0).sum(axis=1)
        mean: np.ndarray = np.where(known.any(axis=1), total / np.maximum(known.sum(axis=1), 1), np.nan)
        return mean

    @property
    def recency_index(self) -> np.ndarray:
        """R(1) minus the mean of R over the larger half of the lags [points]."""
        lags = self.recency.values.shape[1]
        index: np.ndarray = self.recency.values[:, 0] - self.recency.values[:, lags // 2 - 1 :].mean(axis=1)
        return index

    def as_dict(self) -> dict[str, Any]:
        """Return all values for JSON."""
        scores = {"table": self.table, "spread": self.spread, "points": self.points, "recency": self.recency}
        by_kind = {kind: [_finite(each) for each in self.of(kind)] for kind in KINDS}
        return {
            "by_layer": self.by_layer.tolist(),
            **by_kind,
            "ratios": list(self.ratios),
            "recency_index": self.recency_index.tolist(),
            **{name: each.as_dict() for name, each in scores.items()},
        }


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


@torch.no_grad()
def similarity(stack: Stack, noised: Sequence[Draw], *, front: int = 1, lags: int = 32) -> Similarity:
    """Measure the residual stream of a model on noisy text, or on clean text for an autoregressive model.

    Args:
        stack: the model.
        noised: the samples that :func:`lamella.measure.draws` returned for it.
        front: number of tokens at the front of each sequence that are ignored.
        lags: K, the maximum lag between compared tokens; limited by the length of the sequences.

    Raises:
        CalibrationError: if a sequence has fewer than two tokens after the front.
        NumericsError: for activations that are not finite, named by site.
    """
    layers, ratios = len(stack), tuple(dict.fromkeys(draw.ratio for draw in noised))
    shortest = min(int(draw.inputs["input_ids"].shape[1]) for draw in noised)
    lags = min(lags, shortest - front - 1)
    if lags < 1:
        raise CalibrationError(f"sequences of {shortest} tokens, {front} of which are ignored: give longer text")
    sums, counts = np.zeros((2, layers, len(ratios), len(KINDS)))
    moments = np.zeros((2, layers))
    points, seen = np.zeros((layers + 1, layers + 1)), 0
    recency, compared = np.zeros((layers + 1, lags)), np.zeros(lags)
    for draw in track(noised, "similarity of layers"):
        units, counted, masks = _points(stack, draw, front)  # [layers + 1, tokens, hidden], [tokens], [tokens]
        before, after = units[:-1, counted], units[1:, counted]
        cosines = (before * after).sum(dim=-1).double()  # [layers, tokens]
        for kind, chosen in enumerate((masks[counted], ~masks[counted])):
            index = (slice(None), ratios.index(draw.ratio), kind)
            sums[index] += cosines[:, chosen].sum(dim=1).cpu().numpy()
            counts[index] += int(chosen.sum())
        moments += np.stack([(cosines**power).sum(dim=1).cpu().numpy() for power in (1, 2)])
        flat = units[:, counted].flatten(1)
        points += (flat @ flat.T).double().cpu().numpy()
        seen += int(counted.sum())
        for lag in range(1, lags + 1):
            both = counted[lag:] & counted[:-lag]
            pairs = (units[:, lag:] * units[:, :-lag]).sum(dim=-1)[:, both]
            recency[:, lag - 1] += pairs.sum(dim=1).double().cpu().numpy()
            compared[lag - 1] += int(both.sum())
    mean, square = moments / seen
    return Similarity(
        Scores("cosine of a layer's input and output", ("layer", "ratio", "kind"), _ratio(sums, counts)),
        ratios,
        Scores("standard deviation over tokens", ("layer",), np.sqrt(np.maximum(square - mean**2, 0))),
        Scores("cosine of the residual stream at two points", ("point", "point"), points / seen),
        Scores("cosine of a token with an earlier one", ("point", "lag"), _ratio(recency, compared)),
    )


def _ratio(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    known: np.ndarray = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    return known


def _points(stack: Stack, draw: Draw, front: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the normalised residual stream at every point, the mask of counted tokens, and that of masked tokens."""
    context = stack.context(draw.inputs)
    h: Hidden = context.h
    points = [context.h]
    for layer in range(len(stack)):
        h = stack.run(h, layer, layer + 1, context)
        stack.check_finite((layer, stack.architecture.names[-1]), h)
        points.append(join(h))
    real = context.real[0]
    counted = real & (real.long().cumsum(dim=0) > front)
    masks = draw.scored[0] if draw.ratio else torch.zeros_like(real)
    return normalize(torch.stack(points)[:, 0].float(), dim=-1), counted, masks
