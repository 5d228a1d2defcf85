"""Journals, so that an interrupted search goes on where it stopped."""

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
    """A line that stands for everything that the result of a search depends on."""
    return hashlib.sha256(json.dumps(search, sort_keys=True, default=str).encode()).hexdigest()


def _is_removal(line: Any) -> bool:
    match line:
        case [list(candidate), int() | float(), int()]:
            return all(isinstance(part, int | list) for part in candidate)
    return False


def _parts(candidate: list[Any]) -> tuple[Any, ...]:
    """What a candidate is made of, as it can be looked up: JSON has no tuples."""
    return tuple(tuple(part) if isinstance(part, list) else part for part in candidate)


def _is_score(line: Any) -> bool:
    match line:
        case [str(), int() | float()]:
            return True
    return False


class Removals:
    """The removals of a greedy search, in their order, with a journal.

    Args:
        path: the journal's file; None keeps none.
        search: everything that the result depends on; the journal of another search is started afresh.
    """

    def __init__(self, path: Path | None, search: dict[str, Any]) -> None:
        self._journal = Journal(path, _is_removal, _header(search))
        self.done = [Removal(_parts(candidate), cost, asked) for candidate, cost, asked in self._journal.found]

    def add(self, removal: Removal[Any]) -> None:
        self._journal.add([list(removal.candidate), removal.cost, removal.evaluations])


class Memo(dict[str, float]):
    """The scores of a search that asks again for what it has asked; see :class:`Removals` for the arguments."""

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
    """The removals of a search, as far as it must go; those that an earlier run has left come first.

    Args:
        steps: the search, which goes on from ``journal.done[:most]``.
        journal: where each further removal is noted.
        most: how many removals to take.
        until: true of all that is removed by then when the search has gone far enough.
        what: is being done, for the display of progress.
    """
    order = list(journal.done[:most])
    gone = frozenset(each for step in order for each in step.candidate)
    with tracker(what, most) as count:
        count(len(order))
        while len(order) < most and not (until and until(gone)) and (step := next(steps, None)):
            order.append(step)
            journal.add(step)
            gone |= set(step.candidate)
            count(note=f"{step.cost:.4f}")
    return order
