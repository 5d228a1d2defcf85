"""Measurements on hidden states: how far each layer moves the residual stream.

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

NOT_INPUTS = ("labels", "prompt_lengths")  # entries of a batch of rows that no model takes


class Batches(Protocol):
    """Rows that a model's own processor groups into batches, such as images with text."""

    def batches(self, size: int) -> Iterator[dict[str, Tensor]]:
        """Yield batches of at most ``size`` rows."""
        ...

    def describe(self) -> Any:
        """Return what provenance records of the rows."""
        ...


Tokens = Tensor | Mapping[str, Tensor] | Batches


def by_name(tokens: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return calibration tokens as the inputs of a model."""
    return {"input_ids": tokens} if isinstance(tokens, Tensor) else dict(tokens)


def describe(tokens: Tokens) -> dict[str, Any]:
    """Return what provenance records of calibration tokens: their shape and hash, or the description of rows."""
    found: dict[str, Any] = described(by_name(tokens)) if isinstance(tokens, Tensor | Mapping) else tokens.describe()
    return found


def sequences(tokens: Tokens) -> list[dict[str, Tensor]]:
    """Return the rows of calibration tokens, each as the inputs of a batch of one.

    Args:
        tokens: token ids [sequences, time], or ``input_ids`` with an ``attention_mask`` if there is padding; or rows of
            images with text, each with its answer.

    Raises:
        CalibrationError: for an empty or too short matrix, or a row that is all padding.
    """
    if not isinstance(tokens, Tensor | Mapping):
        return [{name: each for name, each in row.items() if name not in NOT_INPUTS} for row in tokens.batches(1)]
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
    """Return the angle between the residual stream before layer i and before layer i + n, as a fraction of pi.

    Args:
        stack: the stack.
        tokens: calibration tokens [sequences, time].
        positions: ``all`` positions, or the ``last`` of each sequence as in Gromov et al. (arXiv 2403.17887, eq. 6).
        front: number of tokens at the front of each sequence that are ignored.

    Returns:
        ``("start", "length")`` scores [layers + 1, layers + 1]; NaN if start + length exceeds the number of layers.
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
        "angular distance (fraction of pi)", ("start", "length"), values, {"positions": positions, "front": front}
    )


@torch.no_grad()
def block_influence(stack: Stack, tokens: Tokens, *, front: int = 0) -> Scores:
    """Return ShortGPT's block influence: 1 - mean cosine of a layer's input and output (arXiv 2403.03853, eq. 1).

    Cosines are clamped to [0, 1].

    Args:
        stack: the stack.
        tokens: calibration tokens [sequences, time].
        front: number of tokens at the front of each sequence that are ignored.

    Returns:
        ``("layer",)`` scores [layers], 0 if a layer does not change the direction of the residual stream.
    """
    values = _influence(stack, tokens, groups_at("block", stack.positions), front)
    return Scores("block influence", ("layer",), values, {"front": front})


@torch.no_grad()
def sublayer_influence(stack: Stack, tokens: Tokens, *, front: int = 0) -> Scores:
    """Return the block influence of each sublayer: ``("sublayer",)`` scores, in the order of ``stack.positions``.

    Args:
        stack: the stack.
        tokens: calibration tokens [sequences, time].
        front: number of tokens at the front of each sequence that are ignored.
    """
    values = _influence(stack, tokens, groups_at("sublayer", stack.positions), front)
    return Scores("sublayer influence", ("sublayer",), values, {"front": front})


@torch.no_grad()
def hidden_norms(stack: Stack, tokens: Tokens, *, front: int = 1) -> Scores:
    """Return the mean L2 norm of the residual stream at every layer's input and at the end.

    Args:
        stack: the stack.
        tokens: calibration tokens [sequences, time].
        front: number of tokens at the front of each sequence that are ignored; the first is the attention sink.

    Returns:
        ``("point",)`` scores [layers + 1].
    """
    total, seen = torch.zeros(len(stack) + 1, dtype=torch.float64), 0
    for row in track(sequences(tokens), "hidden norms"):
        context = stack.context(row)
        real = _counted(context, front)
        total[0] += _norms(context.h, real)
        h: Hidden = context.h
        for layer in range(len(stack)):
            h = stack.run(h, layer, layer + 1, context)
            total[layer + 1] += _norms(join(h), real)
        seen += int(real.sum())
    return Scores("hidden norm", ("point",), (total / seen).numpy(), {"front": front})


def _counted(context: Context, front: int) -> Tensor:
    """Return which positions count [batch, time] bool: tokens other than padding and the front of each sequence.

    Args:
        context: the context of the sequences.
        front: number of tokens at the front of each sequence that are ignored.

    Raises:
        CalibrationError: for a sequence without such a position.
    """
    real = context.real & (context.real.cumsum(-1) > front)
    if not real.any(-1).all():
        raise CalibrationError(
            f"front {front} leaves no token of a sequence of {int(context.real.sum(-1).min())} tokens: give a smaller "
            "front, or longer sequences"
        )
    return real


def _norms(h: Tensor, real: Tensor) -> Tensor:
    return h[real].float().norm(dim=-1).sum().double().cpu()


def _influence(stack: Stack, tokens: Tokens, groups: list[Group], front: int) -> np.ndarray:
    """Return 1 - mean cosine of the residual stream before and after each group of positions."""
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
    """Return the hidden states at the positions that count, at unit length, float32 [positions, hidden]."""
    return torch.nn.functional.normalize(h[real].float(), dim=-1)
