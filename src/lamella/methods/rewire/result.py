"""A pool with the score of each document."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lamella.results import Corpus


@dataclass(kw_only=True)
class ScoredDocuments(Corpus):
    """Documents in their order, each with its score: filter the rows by ``score``.

    Attributes:
        items: rows with id, text and score.
    """

    items: list[dict[str, Any]]

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the rows."""
        yield from self.items
