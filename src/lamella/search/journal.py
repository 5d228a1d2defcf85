"""A journal of removals, so that an interrupted search goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lamella.search.greedy import Removal


class Journal:
    """Removals, one JSON line each, under a header that says which search they belong to.

    Args:
        path: the file; None keeps no journal.
        search: everything that the result depends on. A journal of another search is started afresh.
    """

    def __init__(self, path: Path | None, search: dict[str, Any]) -> None:
        self.path = path
        header = hashlib.sha256(json.dumps(search, sort_keys=True, default=str).encode()).hexdigest()
        self.done: list[Removal[tuple[int, ...]]] = []
        if path is None:
            return
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        if lines[:1] == [header]:
            self.done = list(_complete(lines[1:]))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join([header, *map(_line, self.done)]) + "\n", encoding="utf-8")

    def add(self, removal: Removal[tuple[int, ...]]) -> None:
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line(removal) + "\n")


def _line(removal: Removal[tuple[int, ...]]) -> str:
    return json.dumps([list(removal.candidate), removal.cost, removal.asked])


def _complete(lines: list[str]) -> Iterator[Removal[tuple[int, ...]]]:
    """The removals up to the first line that a kill cut short."""
    for line in lines:
        try:
            candidate, cost, asked = json.loads(line)
        except ValueError:
            return
        yield Removal(tuple(candidate), cost, asked)
