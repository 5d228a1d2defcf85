"""Rows: what many inputs are, items in their order with a word on where they come from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar, overload

from lamella.data.lazy import Lazy

Item = TypeVar("Item")


class Rows(Sequence[Item]):
    """Items of one kind.

    Attributes:
        items: themselves; they stay lazy where they are.
        tokenizer: that they are to be read with, where it is known.
        said: what provenance says of their source; empty for items that were made in memory.
    """

    def __init__(self, items: Iterable[Item], tokenizer: Any = None, said: Mapping[str, Any] | None = None) -> None:
        self.items: Sequence[Item] = items if isinstance(items, Lazy) else list(items)
        self.tokenizer, self.said = tokenizer, dict(said or {})

    def describe(self) -> Any:
        """What provenance says of them."""
        return self.said or {"samples": len(self)}

    @overload
    def __getitem__(self, place: int) -> Item: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Item]: ...
    def __getitem__(self, place: int | slice) -> Item | Sequence[Item]:
        return self.items[place]

    def __len__(self) -> int:
        return len(self.items)
