"""Rows: the base of inputs that are sequences of items with a description of their source."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar, overload

from lamella.data.lazy import Lazy

Item = TypeVar("Item")


class Rows(Sequence[Item]):
    """A sequence of items of one kind.

    Args:
        items: the items; a :class:`lamella.data.Lazy` sequence stays lazy.
        tokenizer: the tokenizer that the items were encoded with, if it is known.
        metadata: description of the source for provenance; empty for items that were made in memory.

    Attributes:
        items: the items.
        tokenizer: the tokenizer that the items were encoded with, if it is known.
        metadata: description of the source.
    """

    def __init__(self, items: Iterable[Item], tokenizer: Any = None, metadata: Mapping[str, Any] | None = None) -> None:
        self.items: Sequence[Item] = items if isinstance(items, Lazy) else list(items)
        self.tokenizer, self.metadata = tokenizer, dict(metadata or {})

    def describe(self) -> Any:
        """Return the description of the source, for provenance."""
        return self.metadata or {"samples": len(self)}

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | Sequence[Item]:
        return self.items[index]

    def __len__(self) -> int:
        return len(self.items)
