"""Attention masks for slots that hold some columns of each row only. All are added to attention scores."""

from __future__ import annotations

import torch
from torch import Tensor


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a key is seen, the smallest number elsewhere (not minus infinity: a row of padding may see nothing)."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)


def visible(mask: Tensor) -> Tensor:
    """Which keys a model's own mask shows, bool or added to scores [rows or 1, 1, time, time] bool."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def stored_mask(
    columns: Tensor, keys: Tensor | None, queries: int, padding: Tensor | None, window: int | None, dtype: torch.dtype
) -> Tensor:
    """The mask of the last ``queries`` entries of a slot over all its entries.

    Args:
        columns: the absolute columns in the slot, the queries' own last, -1 for an empty entry [rows, stored].
        keys: which of the queries may be seen by others than themselves [rows, queries] bool; None for all.
        padding: where columns are no tokens [rows, columns] bool.
        window: the sliding window, in columns.

    Returns:
        [rows, 1, queries, stored]
    """
    asking, held = columns[:, -queries:, None], columns[:, None, :]
    seen = (held >= 0) & (held <= asking)
    if keys is not None:
        lasting = torch.ones_like(columns, dtype=torch.bool)
        lasting[:, -queries:] = keys
        seen &= lasting[:, None, :] | (held == asking)
    if window is not None:
        seen &= held > asking - window
    if padding is not None:
        seen &= ~padding.gather(1, columns.clamp(min=0))[:, None, :]
    return additive(seen[:, None], dtype)


def restricted(mask: Tensor | None, keys: Tensor, dtype: torch.dtype, causal: bool = True) -> Tensor:
    """A model's own mask over whole sequences, with only these keys left, and every token's own.

    Args:
        mask: [batch or 1, 1, time, time], bool (True is visible) or added to scores; None for all that may be seen.
        keys: the columns that may be seen [batch or 1, time] bool.
        causal: whether tokens see those before them alone.
    """
    time = keys.shape[1]
    own = torch.eye(time, dtype=torch.bool, device=keys.device)
    if mask is None:
        all_of_them = own.new_ones(time, time)[None, None]
        seen = all_of_them.tril() if causal else all_of_them
    else:
        seen = visible(mask)
    return additive(seen & (keys[:, None, None, :] | own), dtype)
