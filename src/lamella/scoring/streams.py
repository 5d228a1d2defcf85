"""Measurements on the stream of hidden states: how far each layer moves it.

All are reduced while the model runs, in float32, so memory does not grow with the amount of calibration text.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lamella.errors import CalibrationError
from lamella.progress import track
from lamella.scoring.scores import Scores
from lamella.stack import Context, Stack, join

POSITIONS = ("all", "last")


def describe(tokens: Tensor) -> dict[str, Any]:
    """What provenance says of calibration tokens: their shape and a hash of their numbers."""
    digest = hashlib.sha256(tokens.cpu().numpy().tobytes()).hexdigest()
    return {"shape": list(tokens.shape), "sha256": digest}


def sequences(tokens: Tensor) -> list[Tensor]:
    """The rows of a token matrix [sequences, time], one batch of one each.

    Raises:
        CalibrationError: for an empty or too short matrix.
    """
    if tokens.ndim != 2 or tokens.shape[0] == 0 or tokens.shape[1] < 2:
        raise CalibrationError(
            f"calibration tokens must be [sequences, time >= 2], not {list(tokens.shape)}: give more text"
        )
    return [row.unsqueeze(0) for row in tokens]


@torch.no_grad()
def angular_distance(stack: Stack, tokens: Tensor, positions: str = "all") -> Scores:
    """The angle between the stream before layer i and before layer i + n, for every i and n, as a share of pi.

    Args:
        tokens: calibration tokens [sequences, time].
        positions: ``all`` positions, or the ``last`` of each sequence as Gromov et al. do (arXiv 2403.17887, eq. 6).

    Returns:
        ``("start", "length")`` scores [layers + 1, layers + 1]; NaN where start + length passes the end.
    """
    count = len(stack) + 1
    total, seen = torch.zeros(count, count, dtype=torch.float64), 0
    for row in track(sequences(tokens), "angular distances"):
        context = stack.context(row)
        points = [_unit(context.h, context, positions)]
        for half, h in stack.walk(context.h, 0, 2 * len(stack), context):
            if half % 2:
                stack.check_finite(half, h)
                points.append(_unit(join(h), context, positions))
        seen += points[0].shape[0]
        units = torch.stack(points)  # [layers + 1, positions, hidden]
        for start in range(count):
            cosine = torch.einsum("ph,lph->lp", units[start], units[start:])
            total[start, : count - start] += (torch.arccos(cosine.clamp(-1, 1)) / torch.pi).sum(-1).double()
    values = (total / seen).numpy()
    values[np.add.outer(np.arange(count), np.arange(count)) >= count] = np.nan
    return Scores("angular distance (share of pi)", ("start", "length"), values, {"positions": positions})


@torch.no_grad()
def block_influence(stack: Stack, tokens: Tensor) -> Scores:
    """ShortGPT's block influence: 1 - mean cosine between a layer's input and output (arXiv 2403.03853, eq. 1).

    Cosines are clamped to [0, 1].

    Args:
        tokens: calibration tokens [sequences, time].

    Returns:
        ``("layer",)`` scores [layers], 0 where a layer does not turn the stream.
    """
    return Scores("block influence", ("layer",), _influence(stack, tokens, step=2))


@torch.no_grad()
def half_influence(stack: Stack, tokens: Tensor) -> Scores:
    """Block influence of each half alone: ``("half",)`` scores [2 * layers]."""
    return Scores("half influence", ("half",), _influence(stack, tokens, step=1))


@torch.no_grad()
def stream_norms(stack: Stack, tokens: Tensor) -> Scores:
    """The mean L2 norm of the stream at every layer's input and at the end, position 0 (the attention sink) left out.

    Returns:
        ``("point",)`` scores [layers + 1].
    """
    total, seen = torch.zeros(len(stack) + 1, dtype=torch.float64), 0
    for row in track(sequences(tokens), "stream norms"):
        context = stack.context(row)
        total[0] += _norms(context.h)
        for half, h in stack.walk(context.h, 0, 2 * len(stack), context):
            if half % 2:
                total[half // 2 + 1] += _norms(join(h))
        seen += row.shape[1] - 1
    return Scores("stream norm", ("point",), (total / seen).numpy(), {"positions": "all but the first"})


def _norms(h: Tensor) -> Tensor:
    return h[:, 1:].float().norm(dim=-1).sum().double().cpu()


def _influence(stack: Stack, tokens: Tensor, step: int) -> np.ndarray:
    """1 - mean cosine of the stream before and after each group of ``step`` halves."""
    total, seen = torch.zeros(2 * len(stack) // step, dtype=torch.float64), 0
    for row in track(sequences(tokens), "block influence"):
        context = stack.context(row)
        before = _unit(context.h, context, "all")
        for half, h in stack.walk(context.h, 0, 2 * len(stack), context):
            if (half + 1) % step == 0:
                stack.check_finite(half, h)
                after = _unit(join(h), context, "all")
                total[half // step] += (before * after).sum(-1).clamp(0, 1).sum().double().cpu()
                before = after
        seen += before.shape[0]
    return (1 - total / seen).numpy()


def _unit(h: Tensor, context: Context, positions: str) -> Tensor:
    """The stream at real positions, at unit length, float32 [positions, hidden]."""
    h = h[:, -1] if positions == "last" else h[context.real]
    return torch.nn.functional.normalize(h.float(), dim=-1)
