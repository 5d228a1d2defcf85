"""Left-padded batches, at once and step by step: what the exactness claims of methods that skip are checked on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def padded(ids: Tensor, pads: Sequence[int]) -> Tensor:
    """The mask of a batch whose rows begin with these numbers of padding tokens [batch, time]."""
    mask = torch.ones_like(ids)
    for row, pad in enumerate(pads[: len(ids)]):
        mask[row, :pad] = 0
    return mask


def positions(mask: Tensor) -> Tensor:
    """Positions from the first real token on, as ``generate`` counts them [batch, time]."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def stepped(model: Any, ids: Tensor, mask: Tensor, prompt: int) -> tuple[Tensor, Any]:
    """The logits of a prompt and then of one token at a time [batch, time, vocab], and the cache that they leave."""
    parts, cache, begin, where = [], None, 0, positions(mask)
    for end in range(prompt, ids.shape[1] + 1):
        given = {"input_ids": ids[:, begin:end], "position_ids": where[:, begin:end]}
        out = model(**given, attention_mask=mask[:, :end], cache=cache, use_cache=True)
        parts.append(out.logits)
        cache, begin = out.cache, end
    return torch.cat(parts, dim=1), cache
