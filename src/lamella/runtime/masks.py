"""Attention masks for slots that hold some columns of each row only. All are added to attention scores."""

from __future__ import annotations

import torch
from torch import Tensor


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 0 where a key is visible, and the smallest finite value elsewhere, since padding may see no key at all.

    Args:
        seen: visible keys, bool.
        dtype: dtype of the scores.
    """
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)


def visible(mask: Tensor) -> Tensor:
    """Return which keys a model's own mask shows, bool or added to scores [rows or 1, 1, time, time] bool."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def stored_mask(
    columns: Tensor, keys: Tensor | None, queries: int, padding: Tensor | None, window: int | None, dtype: torch.dtype
) -> Tensor:
    """Return the mask of the last ``queries`` entries of a slot over all its entries.

    Args:
        columns: columns in the slot, the queries' own last, -1 for an empty entry [rows, stored].
        keys: which queries are visible to others than themselves [rows, queries] bool; None for all.
        queries: number of queries.
        padding: which columns are padding [rows, columns] bool.
        window: sliding window in columns.
        dtype: dtype of the scores.

    Returns:
        [rows, 1, queries, stored]
    """
    query, held = columns[:, -queries:, None], columns[:, None, :]
    seen = (held >= 0) & (held <= query)
    if keys is not None:
        shown = torch.ones_like(columns, dtype=torch.bool)
        shown[:, -queries:] = keys
        seen &= shown[:, None, :] | (held == query)
    if window is not None:
        seen &= held > query - window
    if padding is not None:
        seen &= ~padding.gather(1, columns.clamp(min=0))[:, None, :]
    return additive(seen[:, None], dtype)


def restricted(mask: Tensor | None, keys: Tensor, dtype: torch.dtype, causal: bool = True) -> Tensor:
    """Return a model's own mask over whole sequences, restricted to these keys and every token's own.

    Args:
        mask: [batch or 1, 1, time, time], bool (True is visible) or added to scores; None if everything is visible.
        keys: columns that may be visible [batch or 1, time] bool.
        dtype: dtype of the scores.
        causal: whether tokens see earlier tokens only.
    """
    time = keys.shape[1]
    own = torch.eye(time, dtype=torch.bool, device=keys.device)
    if mask is None:
        everything = own.new_ones(time, time)[None, None]
        seen = everything.tril() if causal else everything
    else:
        seen = visible(mask)
    return additive(seen & (keys[:, None, None, :] | own), dtype)
