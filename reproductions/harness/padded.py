"""Left-padded batches, in one pass and step by step, for the exactness claims of methods that skip computation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def padded(ids: Tensor, pads: Sequence[int]) -> Tensor:
    """Return the mask of a batch whose rows begin with the given numbers of padding tokens `[batch, time]`.

    Args:
        ids: the token ids `[batch, time]`.
        pads: the number of padding tokens of each row.
    """
    mask = torch.ones_like(ids)
    for row, pad in enumerate(pads[: len(ids)]):
        mask[row, :pad] = 0
    return mask


def positions(mask: Tensor) -> Tensor:
    """Return the positions from the first non-padding token on, as in ``generate`` `[batch, time]`."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def stepped(model: Any, ids: Tensor, mask: Tensor, prompt: int) -> tuple[Tensor, Any]:
    """Return the logits of a prompt and then of one token at a time `[batch, time, vocab]`, and the resulting cache.

    Args:
        model: the model.
        ids: the token ids `[batch, time]`.
        mask: the attention mask `[batch, time]`.
        prompt: the number of tokens in the prompt.
    """
    parts, cache, begin, position_ids = [], None, 0, positions(mask)
    for end in range(prompt, ids.shape[1] + 1):
        inputs = {"input_ids": ids[:, begin:end], "position_ids": position_ids[:, begin:end]}
        out = model(**inputs, attention_mask=mask[:, :end], cache=cache, use_cache=True)
        parts.append(out.logits)
        cache, begin = out.cache, end
    return torch.cat(parts, dim=1), cache
