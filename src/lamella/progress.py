"""Progress of long work: silent in the library, a bar on the command line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

Item = TypeVar("Item")
_display: ContextVar[Progress | None] = ContextVar("progress", default=None)


@contextmanager
def shown(console: Console) -> Iterator[None]:
    """Show the progress of everything that is tracked inside this block."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=True) as display:
        token = _display.set(display)
        try:
            yield
        finally:
            _display.reset(token)


class Tracker:
    """One piece of long work: call it after each unit."""

    def __init__(self, what: str, total: int | None) -> None:
        self._display = _display.get()
        self._task = self._display.add_task(what, total=total, note="") if self._display else None

    def __call__(self, units: int = 1, note: str = "") -> None:
        if self._display is not None and self._task is not None:
            self._display.update(self._task, advance=units, note=note)

    def done(self) -> None:
        if self._display is not None and self._task is not None:
            self._display.remove_task(self._task)


@contextmanager
def tracker(what: str, total: int | None = None) -> Iterator[Tracker]:
    """Count units of work by hand inside this block."""
    count = Tracker(what, total)
    try:
        yield count
    finally:
        count.done()


def track(items: Iterable[Item], what: str, total: int | None = None) -> Iterator[Item]:
    """Iterate, counting each item as a unit of work."""
    if total is None:
        total = len(items) if hasattr(items, "__len__") else None  # type: ignore[arg-type]
    with tracker(what, total) as count:
        for item in items:
            yield item
            count()
