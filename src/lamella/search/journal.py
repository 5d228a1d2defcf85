"""Journals, so that an interrupted search continues where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lamella.files import Journal
from lamella.progress import tracker
from lamella.search.greedy import Removal


def _header(search: dict[str, Any]) -> str:
    """Return a line that identifies everything that the result of a search depends on."""
    return hashlib.sha256(json.dumps(search, sort_keys=True, default=str).encode()).hexdigest()


def _is_removal(line: Any) -> bool:
    match line:
        case [list(candidate), int() | float(), int()]:
            return all(isinstance(part, int | list) for part in candidate)
    return False


def _parts(candidate: list[Any]) -> tuple[Any, ...]:
    """Return the parts of a candidate in hashable form, since JSON has no tuples."""
    return tuple(tuple(part) if isinstance(part, list) else part for part in candidate)


def _is_score(line: Any) -> bool:
    match line:
        case [str(), int() | float()]:
            return True
    return False


class Removals:
    """The removals of a greedy search in order, with a journal.

    Args:
        path: file of the journal; None for no journal.
        search: everything that the result depends on; the journal of another search is overwritten.

    Attributes:
        done: the removals so far.
    """

    def __init__(self, path: Path | None, search: dict[str, Any]) -> None:
        self._journal = Journal(path, _is_removal, _header(search))
        self.done = [
            Removal(_parts(candidate), cost, evaluations) for candidate, cost, evaluations in self._journal.found
        ]

    def add(self, removal: Removal[Any]) -> None:
        """Add a removal to the journal."""
        self._journal.add([list(removal.candidate), removal.cost, removal.evaluations])


class Memo(dict[str, float]):
    """The cached scores of a search that evaluates the same names repeatedly.

    Args:
        path: file of the journal; None for no journal.
        search: everything that the result depends on; the journal of another search is overwritten.
    """

    def __init__(self, path: Path | None, search: dict[str, Any]) -> None:
        self._journal = Journal(path, _is_score, _header(search))
        super().__init__((name, value) for name, value in self._journal.found)

    def __setitem__(self, name: str, value: float) -> None:
        self._journal.add([name, value])
        super().__setitem__(name, value)


def take(
    steps: Iterator[Removal[Any]],
    journal: Removals,
    most: int,
    until: Callable[[frozenset[Any]], bool] | None = None,
    what: str = "removing",
) -> list[Removal[Any]]:
    """Return the removals of a search as far as needed; those of an earlier run come first.

    Args:
        steps: the search, which continues from ``journal.done[:most]``.
        journal: where each new removal is recorded.
        most: maximum number of removals.
        until: called with everything removed so far; the search ends when it returns true.
        what: what is being done, for the progress display.
    """
    order = list(journal.done[:most])
    removed = frozenset(each for step in order for each in step.candidate)
    with tracker(what, most) as count:
        count(len(order))
        while len(order) < most and not (until and until(removed)) and (step := next(steps, None)):
            order.append(step)
            journal.add(step)
            removed |= set(step.candidate)
            count(note=f"{step.cost:.4f}")
    return order
