"""The numbers of ``q8_0``: what a GGUF file of a model gives back, and how large it is, without writing one."""

from __future__ import annotations

from typing import Any

import gguf
import torch
from gguf import GGMLQuantizationType
from torch import Tensor, nn

from lamella.stack import share

BLOCK, BYTES = gguf.GGML_QUANT_SIZES[GGMLQuantizationType.Q8_0]  # numbers of a block, and the bytes that they take


def q8_0_copy(model: Any) -> Any:
    """A copy of a model, or of a view, with the weights that a ``q8_0`` file of it gives back, in its own precision."""
    return share(model, keep={id(each): nn.Parameter(_given_back(each), requires_grad=False)
                              for each in model.parameters()})  # fmt: skip


def _given_back(values: Tensor) -> Tensor:
    """What is read where ``values`` were stored in the blocks of ``q8_0``: 32 integers and their scale in 16 bits."""
    values = values.detach()
    if values.ndim < 2 or values.shape[-1] % BLOCK:
        return values
    blocks = values.float().reshape(-1, BLOCK)
    scale = blocks.abs().amax(dim=1, keepdim=True) / 127
    scaled = blocks * torch.where(scale == 0, 0, 1 / scale)
    whole = scaled.sign() * (scaled.abs() + 0.5).floor()  # halves are rounded away from 0
    return (whole * scale.half().float()).reshape(values.shape).to(values.dtype)


def q8_0_bytes(model: Any) -> int:
    """The bytes that the weights of a model take as ``q8_0``."""
    return sum(_stored(each) for each in model.parameters())


def _stored(values: Tensor) -> int:
    if values.ndim < 2:
        return 4 * values.numel()
    return 2 * values.numel() if values.shape[-1] % BLOCK else BYTES * values.numel() // BLOCK
