"""Sequences whose items are decoded on access, and batches of them through ``torch.utils.data``."""

from __future__ import annotations

from array import array
from bisect import insort
from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from typing import Any, TypeVar, overload

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

Item = TypeVar("Item")
Other = TypeVar("Other")


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


def batches(items: Sequence[Any] | Tensor, size: int, collate: Callable[[list[Any]], Any] = list) -> DataLoader[Any]:
    """Iterate over all items in their order, ``size`` at a time.

    Args:
        items: items that are decoded batch by batch.
        size: items in a batch.
        collate: makes a batch of its items.
    """
    generator = torch.Generator()  # without one of its own, every pass would advance the global random state
    return DataLoader(items, size, collate_fn=collate, generator=generator)  # type: ignore[arg-type]


def where(items: Sequence[Item], holds: Callable[[Item], bool]) -> Lazy[Item]:
    """Return the items for which a condition holds, in their order, as a sequence that reads them again on access.

    Args:
        items: the items.
        holds: the condition.
    """
    return at(items, array("I", (number for number, each in enumerate(items) if holds(each))))


def grouped(items: Sequence[Item], key: Callable[[Item], Any]) -> Callable[[Callable[[Any], bool]], Lazy[Item]]:
    """Group items in one pass, and return a function from a condition to the items of the groups for which it holds.

    Args:
        items: the items.
        key: returns the group of an item, of at most 256.
    """
    groups: dict[Any, int] = {}
    found = np.fromiter((groups.setdefault(key(each), len(groups)) for each in items), np.uint8, len(items))

    def of(holds: Callable[[Any], bool]) -> Lazy[Item]:
        chosen = [number for group, number in groups.items() if holds(group)]
        return at(items, np.flatnonzero(np.isin(found, chosen)).astype(np.uint32))

    return of


def at(items: Sequence[Item], numbers: Sequence[int] | np.ndarray) -> Lazy[Item]:
    """Return the items with some indices, as a sequence that reads them on access.

    Args:
        items: the items.
        numbers: the indices.
    """
    return Lazy(numbers, lambda number: items[number])  # type: ignore[arg-type]


def column(rows: Sequence[Any], name: str) -> Lazy[Any]:
    """Return one value of each row, as a sequence that reads the rows on access.

    Args:
        rows: mappings.
        name: the key of the value.
    """
    return mapped(rows, itemgetter(name))


def mapped(items: Sequence[Item], function: Callable[[Item], Other]) -> Lazy[Other]:
    """Return what a function makes of each item, as a sequence that computes it on access.

    Args:
        items: the items.
        function: the function.
    """
    return Lazy(range(len(items)), lambda number: function(items[number]))


def first_of_each(
    items: Iterable[Item], key: Callable[[Item], int], group: Callable[[Item], Any], most: Callable[[Any], int]
) -> dict[Any, list[Item]]:
    """Return the items with the smallest keys in each group, smallest first; only these are in memory.

    Args:
        items: the items.
        key: returns the key of an item.
        group: returns the group of an item.
        most: returns the maximum number of items of a group.
    """
    found: dict[Any, list[tuple[int, int, Item]]] = {}
    for number, each in enumerate(items):
        of_group = found.setdefault(name := group(each), [])
        insort(of_group, (key(each), number, each))
        del of_group[most(name) :]
    return {name: [each for _, _, each in of_group] for name, of_group in found.items()}
