"""The effect of ``q8_0`` on a model's weights and size, computed without writing a GGUF file."""

from __future__ import annotations

from typing import Any

import gguf
import torch
from gguf import GGMLQuantizationType
from torch import Tensor, nn

from lamella.stack import share

BLOCK, BYTES = gguf.GGML_QUANT_SIZES[GGMLQuantizationType.Q8_0]  # values per block, and bytes per block


def q8_0_copy(model: Any) -> Any:
    """Return a copy of a model or view with the weights of its ``q8_0`` file, in the model's own precision."""
    return share(model, keep={id(each): nn.Parameter(_round_trip(each), requires_grad=False)
                              for each in model.parameters()})  # fmt: skip


def _round_trip(values: Tensor) -> Tensor:
    """Return ``values`` after a round trip through ``q8_0`` blocks: 32 integers that share a 16-bit scale."""
    values = values.detach()
    if values.ndim < 2 or values.shape[-1] % BLOCK:
        return values
    blocks = values.float().reshape(-1, BLOCK)
    scale = blocks.abs().amax(dim=1, keepdim=True) / 127
    scaled = blocks * torch.where(scale == 0, 0, 1 / scale)
    whole = scaled.sign() * (scaled.abs() + 0.5).floor()  # halves are rounded away from zero
    return (whole * scale.half().float()).reshape(values.shape).to(values.dtype)


def q8_0_bytes(model: Any) -> int:
    """Return the size of a model's weights as ``q8_0``, in bytes."""
    return sum(_stored_bytes(each) for each in model.parameters())


def _stored_bytes(values: Tensor) -> int:
    if values.ndim < 2:
        return 4 * values.numel()
    return 2 * values.numel() if values.shape[-1] % BLOCK else BYTES * values.numel() // BLOCK
