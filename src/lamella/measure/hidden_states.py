"""Measurements on the stream of hidden states: how far each layer moves it.

All are reduced while the model runs, in float32, so memory does not grow with the amount of calibration text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lamella.errors import CalibrationError
from lamella.measure.scores import Scores
from lamella.progress import track
from lamella.provenance import describe as described
from lamella.stack import Context, Group, Hidden, Stack, groups_at, join

BESIDE = ("labels", "prompt_lengths")  # what a batch of rows says of itself, and no model takes


class Batches(Protocol):
    """Rows that a model's own processor makes batches of, such as images with text."""

    def batches(self, size: int) -> Iterator[dict[str, Tensor]]: ...

    def describe(self) -> Any: ...


Tokens = Tensor | Mapping[str, Tensor] | Batches


def by_name(tokens: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Calibration tokens as the inputs of a model."""
    return {"input_ids": tokens} if isinstance(tokens, Tensor) else dict(tokens)


def describe(tokens: Tokens) -> dict[str, Any]:
    """What provenance says of calibration tokens: their shape and a hash of their numbers, or what rows say."""
    said: dict[str, Any] = described(by_name(tokens)) if isinstance(tokens, Tensor | Mapping) else tokens.describe()
    return said


def sequences(tokens: Tokens) -> list[dict[str, Tensor]]:
    """The rows of calibration tokens, each as the inputs of a batch of one.

    Args:
        tokens: token ids [sequences, time], or ``input_ids`` with an ``attention_mask`` where some are padding; or rows
            of images with text, each with its answer.

    Raises:
        CalibrationError: for an empty or too short matrix, or a row of padding alone.
    """
    if not isinstance(tokens, Tensor | Mapping):
        return [{name: each for name, each in row.items() if name not in BESIDE} for row in tokens.batches(1)]
    inputs = by_name(tokens)
    ids = inputs["input_ids"]
    if ids.ndim != 2 or ids.shape[0] == 0 or ids.shape[1] < 2:
        raise CalibrationError(
            f"calibration tokens must be [sequences, time >= 2], not {list(ids.shape)}: give more text"
        )
    if "attention_mask" in inputs and not inputs["attention_mask"].any(dim=1).all():
        raise CalibrationError("a calibration sequence is all padding: give text in every row")
    return [{name: value[row : row + 1] for name, value in inputs.items()} for row in range(ids.shape[0])]


@torch.no_grad()
def angular_distance(stack: Stack, tokens: Tokens, positions: str = "all", *, front: int = 0) -> Scores:
    """The angle between the stream before layer i and before layer i + n, for every i and n, as a share of pi.

    Args:
        tokens: calibration tokens [sequences, time].
        positions: ``all`` positions, or the ``last`` of each sequence as Gromov et al. do (arXiv 2403.17887, eq. 6).
        front: tokens at the front of each sequence that do not count.

    Returns:
        ``("start", "length")`` scores [layers + 1, layers + 1]; NaN where start + length passes the end.
    """
    count = len(stack) + 1
    total, seen = torch.zeros(count, count, dtype=torch.float64), 0
    for row in track(sequences(tokens), "angular distances"):
        context = stack.context(row)
        real = _counted(context, front)
        real = real & (real.cumsum(-1) == real.sum()) if positions == "last" else real
        points = [_unit(context.h, real)]
        h: Hidden = context.h
        for layer in range(len(stack)):
            h = stack.run(h, layer, layer + 1, context)
            stack.check_finite((layer, stack.architecture.names[-1]), h)
            points.append(_unit(join(h), real))
        seen += points[0].shape[0]
        units = torch.stack(points)  # [layers + 1, positions, hidden]
        for start in range(count):
            cosine = torch.einsum("ph,lph->lp", units[start], units[start:])
            total[start, : count - start] += (torch.arccos(cosine.clamp(-1, 1)) / torch.pi).sum(-1).double()
    values = (total / seen).numpy()
    values[np.add.outer(np.arange(count), np.arange(count)) >= count] = np.nan
    return Scores(
        "angular distance (share of pi)", ("start", "length"), values, {"positions": positions, "front": front}
    )


@torch.no_grad()
def block_influence(stack: Stack, tokens: Tokens, *, front: int = 0) -> Scores:
    """ShortGPT's block influence: 1 - mean cosine between a layer's input and output (arXiv 2403.03853, eq. 1).

    Cosines are clamped to [0, 1].

    Args:
        tokens: calibration tokens [sequences, time].
        front: tokens at the front of each sequence that do not count.

    Returns:
        ``("layer",)`` scores [layers], 0 where a layer does not turn the stream.
    """
    values = _influence(stack, tokens, groups_at("block", stack.positions), front)
    return Scores("block influence", ("layer",), values, {"front": front})


@torch.no_grad()
def sublayer_influence(stack: Stack, tokens: Tokens, *, front: int = 0) -> Scores:
    """Block influence of each sublayer alone: ``("sublayer",)`` scores, in the order of ``stack.positions``."""
    values = _influence(stack, tokens, groups_at("sublayer", stack.positions), front)
    return Scores("sublayer influence", ("sublayer",), values, {"front": front})


@torch.no_grad()
def hidden_norms(stack: Stack, tokens: Tokens, *, front: int = 1) -> Scores:
    """The mean L2 norm of the stream at every layer's input and at the end.

    Args:
        tokens: calibration tokens [sequences, time].
        front: tokens at the front of each sequence that do not count; the first is the attention sink.

    Returns:
        ``("point",)`` scores [layers + 1].
    """
    total, seen = torch.zeros(len(stack) + 1, dtype=torch.float64), 0
    for row in track(sequences(tokens), "stream norms"):
        context = stack.context(row)
        real = _counted(context, front)
        total[0] += _norms(context.h, real)
        h: Hidden = context.h
        for layer in range(len(stack)):
            h = stack.run(h, layer, layer + 1, context)
            total[layer + 1] += _norms(join(h), real)
        seen += int(real.sum())
    return Scores("stream norm", ("point",), (total / seen).numpy(), {"front": front})


def _counted(context: Context, front: int) -> Tensor:
    """Which positions count [batch, time] bool: tokens that are not padding, without the first of each sequence.

    Args:
        front: how many tokens at the front of each sequence do not count.

    Raises:
        CalibrationError: for a sequence of which nothing is left.
    """
    real = context.real & (context.real.cumsum(-1) > front)
    if not real.any(-1).all():
        raise CalibrationError(
            f"front {front} leaves nothing of a sequence of {int(context.real.sum(-1).min())} tokens: give a smaller "
            "front, or longer sequences"
        )
    return real


def _norms(h: Tensor, real: Tensor) -> Tensor:
    return h[real].float().norm(dim=-1).sum().double().cpu()


def _influence(stack: Stack, tokens: Tokens, groups: list[Group], front: int) -> np.ndarray:
    """1 - mean cosine of the stream before and after each group of positions, which make up the stack."""
    total, seen = torch.zeros(len(groups), dtype=torch.float64), 0
    for row in track(sequences(tokens), "block influence"):
        context = stack.context(row)
        real = _counted(context, front)
        before = _unit(context.h, real)
        h: Hidden = context.h
        for index, group in enumerate(groups):
            h = stack.run(h, group[0], stack.after(group[-1]), context)
            stack.check_finite(group[-1], h)
            after = _unit(join(h), real)
            total[index] += (before * after).sum(-1).clamp(0, 1).sum().double().cpu()
            before = after
        seen += before.shape[0]
    return (1 - total / seen).numpy()


def _unit(h: Tensor, real: Tensor) -> Tensor:
    """The stream at the positions that count, at unit length, float32 [positions, hidden]."""
    return torch.nn.functional.normalize(h[real].float(), dim=-1)
