"""Sequences whose items are decoded when they are asked for, and batches of them through ``torch.utils.data``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, overload

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

Item = TypeVar("Item")


class Lazy(Sequence[Item], Dataset[Item]):
    """Items that are decoded when they are asked for, and never kept.

    A slice decodes nothing: it is lazy, too.

    Args:
        entries: what each item is decoded from, such as a path, or the offset of a row in its file.
        decode: from an entry to the item.
    """

    def __init__(self, entries: Sequence[Any], decode: Callable[[Any], Item]) -> None:
        self.entries, self.decode = entries, decode

    def __len__(self) -> int:
        return len(self.entries)

    @overload
    def __getitem__(self, number: int) -> Item: ...
    @overload
    def __getitem__(self, number: slice) -> Lazy[Item]: ...
    def __getitem__(self, number: int | slice) -> Item | Lazy[Item]:
        if isinstance(number, slice):
            return Lazy(self.entries[number], self.decode)
        return self.decode(self.entries[number])


def batches(items: Sequence[Any] | Tensor, size: int, collate: Callable[[list[Any]], Any] = list) -> DataLoader[Any]:
    """All items in their order, ``size`` at a time.

    Args:
        items: what is decoded batch by batch.
        size: items in a batch.
        collate: from the items of a batch to the batch.
    """
    generator = torch.Generator()  # without one of its own, every pass would advance the global random state
    return DataLoader(items, size, collate_fn=collate, generator=generator)  # type: ignore[arg-type]
