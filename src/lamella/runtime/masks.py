"""Attention masks for slots that hold some columns only. All are added to attention scores."""

from __future__ import annotations

import torch
from torch import Tensor


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where visible, the smallest number elsewhere (not minus infinity: a row of padding may see nothing)."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, torch.finfo(dtype).min)


def stored_mask(
    columns: Tensor, queries: int, padding: Tensor | None, window: int | None, dtype: torch.dtype
) -> Tensor | None:
    """The mask of the last ``queries`` stored columns over all stored columns.

    Args:
        columns: the absolute columns in the slot, the queries' own last [stored].
        padding: where columns are no tokens [batch, columns] bool.
        window: the sliding window, in columns.

    Returns:
        [batch or 1, 1, queries, stored], or None where a single query sees everything.
    """
    if queries == 1 and padding is None and window is None:
        return None
    asking = columns[-queries:, None]
    visible = columns <= asking
    if window is not None:
        visible &= columns > asking - window
    visible = visible[None, None]
    if padding is not None:
        visible = visible.to(padding.device) & ~padding[:, None, None, columns.to(padding.device)]
    return _additive(visible, dtype)


def restricted(mask: Tensor | None, keys: Tensor, dtype: torch.dtype) -> Tensor:
    """A model's own mask over whole sequences, with only these keys left, and every token's own.

    Args:
        mask: None for causal, or [batch or 1, 1, time, time]: bool (True is visible) or added to scores.
        keys: the columns that may be seen [batch or 1, time] bool.
    """
    time = keys.shape[1]
    own = torch.eye(time, dtype=torch.bool, device=keys.device)
    if mask is None:
        visible = own.new_ones(time, time).tril()[None, None]
    else:
        visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return _additive(visible & (keys[:, None, None, :] | own), dtype)
