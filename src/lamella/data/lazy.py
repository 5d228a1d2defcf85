"""Sequences whose items are decoded on access, and batches of them through ``torch.utils.data``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, overload

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

Item = TypeVar("Item")


class Lazy(Sequence[Item], Dataset[Item]):
    """Items that are decoded on access and never kept.

    Slicing decodes nothing: a slice is lazy, too.

    Args:
        entries: what each item is decoded from, such as a path, or the offset of a row in its file.
        decode: decodes an entry to the item.
    """

    def __init__(self, entries: Sequence[Any], decode: Callable[[Any], Item]) -> None:
        self.entries, self.decode = entries, decode

    def __len__(self) -> int:
        return len(self.entries)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> Lazy[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | Lazy[Item]:
        if isinstance(index, slice):
            return Lazy(self.entries[index], self.decode)
        return self.decode(self.entries[index])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or len(self) != len(other):
            return False
        return all(ours == theirs for ours, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]


def batches(items: Sequence[Any] | Tensor, size: int, collate: Callable[[list[Any]], Any] = list) -> DataLoader[Any]:
    """Iterate over all items in their order, ``size`` at a time.

    Args:
        items: items that are decoded batch by batch.
        size: items in a batch.
        collate: makes a batch of its items.
    """
    generator = torch.Generator()  # without one of its own, every pass would advance the global random state
    return DataLoader(items, size, collate_fn=collate, generator=generator)  # type: ignore[arg-type]
