"""The effect of a kind of GGUF file on a model's weights and size, computed without writing the file."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import gguf
import torch
from gguf import GGMLQuantizationType, quants
from torch import Tensor, nn

from lamella.plan.quantize.families import FAMILIES
from lamella.plan.quantize.kinds import to_blocks, type_of
from lamella.progress import track
from lamella.stack import share

Q8_0 = GGMLQuantizationType.Q8_0
BLOCK, _ = gguf.GGML_QUANT_SIZES[Q8_0]  # values per block


def gguf_copy(model: Any, kind: str) -> Any:
    """Return a copy of a model or view with the weights of its GGUF file, in the model's own precision.

    Args:
        model: the model; for ``q4_k_m`` of a family in :data:`FAMILIES`, without removed layers.
        kind: kind of the file, a key of :data:`KINDS`.
    """
    found = track(list(_stored(model, kind)), f"weights in {kind}")
    return share(
        model,
        keep={
            id(each): nn.Parameter(_round_trip(each.detach(), stored), requires_grad=False) for each, stored in found
        },
    )


def gguf_bytes(model: Any, kind: str, without: Collection[Tensor] = ()) -> int:
    """Return the bytes of a model's weights in its GGUF file.

    Args:
        model: the model.
        kind: kind of the file, a key of :data:`KINDS`.
        without: parameters that the file does not contain.
    """
    gone = {id(each) for each in without}
    return sum(_bytes(each, stored) for each, stored in _stored(model, kind) if id(each) not in gone)


def _stored(model: Any, kind: str) -> Iterator[tuple[Tensor, GGMLQuantizationType]]:
    """Yield the parameters of a model with the types in which a file stores them."""
    config = model.config
    layers = config.get_text_config().num_hidden_layers
    family = FAMILIES.get(config.model_type)
    names = None if family is None else gguf.get_tensor_name_map(family.arch, layers)
    for name, each in model.named_parameters():
        stem, _, what = name.rpartition(".")
        theirs = f"{names.get_name(stem)}.{what}" if names else name
        yield each, type_of(kind, theirs, each.shape, layers, config.tie_word_embeddings)


def _bytes(values: Tensor, stored: GGMLQuantizationType) -> int:
    block, size = gguf.GGML_QUANT_SIZES[stored]
    return int(values.numel() // block * size)


def _round_trip(values: Tensor, stored: GGMLQuantizationType) -> Tensor:
    """Return ``values`` as a file gives them back."""
    if values.ndim < 2:
        return values
    if stored == Q8_0:
        return _in_8_bits(values)
    back = quants.dequantize(to_blocks(values.float().numpy(force=True), stored), stored)
    return torch.from_numpy(back).reshape(values.shape).to(values)


def _in_8_bits(values: Tensor) -> Tensor:
    """Return ``values`` after a round trip through ``q8_0`` blocks: 32 integers that share a 16-bit scale."""
    blocks = values.float().reshape(-1, BLOCK)
    scale = blocks.abs().amax(dim=1, keepdim=True) / 127
    scaled = blocks * torch.where(scale == 0, 0, 1 / scale)
    whole = scaled.sign() * (scaled.abs() + 0.5).floor()  # halves are rounded away from zero
    return (whole * scale.half().float()).reshape(values.shape).to(values.dtype)
