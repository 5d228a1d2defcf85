"""Journals, so that an interrupted search goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lamella.progress import tracker
from lamella.reading import read_journal
from lamella.search.greedy import Removal


class _Lines:
    """JSON lines under a header that says which search they belong to.

    Args:
        path: the file; None keeps no journal.
        search: everything that the result depends on. A journal of another search is started afresh.
        is_whole: whether a value is a line of this kind of journal.

    Attributes:
        found: what an earlier run has left, up to the first line that a kill cut short.
    """

    def __init__(self, path: Path | None, search: dict[str, Any], is_whole: Callable[[Any], bool]) -> None:
        self.path = path
        self.found: list[Any] = []
        if path is None:
            return
        header = hashlib.sha256(json.dumps(search, sort_keys=True, default=str).encode()).hexdigest()
        self.found = read_journal(path, is_whole, header)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")  # so that no kill loses what is known
        partial.write_text("\n".join([header, *map(json.dumps, self.found)]) + "\n", encoding="utf-8")
        partial.replace(path)

    def write(self, line: Any) -> None:
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def _is_removal(line: Any) -> bool:
    match line:
        case [list(candidate), int() | float(), int()]:
            return all(isinstance(half, int) for half in candidate)
    return False


def _is_score(line: Any) -> bool:
    match line:
        case [str(), int() | float()]:
            return True
    return False


class Journal:
    """The removals of a greedy search, in their order; see :class:`_Lines` for the arguments."""

    def __init__(self, path: Path | None, search: dict[str, Any]) -> None:
        self._lines = _Lines(path, search, _is_removal)
        self.done = [Removal(tuple(candidate), cost, asked) for candidate, cost, asked in self._lines.found]

    def add(self, removal: Removal[tuple[int, ...]]) -> None:
        self._lines.write([list(removal.candidate), removal.cost, removal.asked])


class Memo(dict[str, float]):
    """The scores of a search that asks again for what it has asked; see :class:`_Lines` for the arguments."""

    def __init__(self, path: Path | None, search: dict[str, Any]) -> None:
        self._lines = _Lines(path, search, _is_score)
        super().__init__((name, value) for name, value in self._lines.found)

    def __setitem__(self, name: str, value: float) -> None:
        self._lines.write([name, value])
        super().__setitem__(name, value)


def take(
    steps: Iterator[Removal[tuple[int, ...]]],
    journal: Journal,
    most: int,
    until: Callable[[frozenset[int]], bool] | None = None,
    what: str = "removing",
) -> list[Removal[tuple[int, ...]]]:
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
