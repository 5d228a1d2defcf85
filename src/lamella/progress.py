"""Progress of long work: silent in the library, a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Item = TypeVar("Item")
EVERY = 15.0  # seconds between two lines without a terminal
LONG = 30.0  # seconds after which the end of a stage is printed, too
WINDOW = 600.0  # seconds over which a bar averages its speed for the estimate of the remaining time


@dataclass
class _Stage:
    what: str
    total: int | None
    begun: float
    printed: float
    done: int = 0


class _Lines:
    """Replaces bars in a log: a line every :data:`EVERY` seconds, and one at the end of each long stage.

    A stage prints its line when a unit of work is done. If no unit ends for that long, :meth:`remind` prints it.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._stages: dict[TaskID, _Stage] = {}
        self._begun = self._printed = time.monotonic()

    def add_task(self, what: str, total: int | None, note: str) -> TaskID:
        """Start a stage, and return its id."""
        now = time.monotonic()
        number = TaskID(max(self._stages, default=0) + 1)
        self._stages[number] = _Stage(what, total, now, now)
        return number

    def update(self, number: TaskID, advance: int, note: str) -> None:
        """Count units of work that are done."""
        stage = self._stages[number]
        stage.done += advance
        if time.monotonic() - stage.printed >= EVERY:
            self._print(stage, note)

    def remove_task(self, number: TaskID) -> None:
        """End a stage."""
        stage = self._stages.pop(number)
        now = time.monotonic()
        if now - stage.begun >= LONG and now - stage.printed >= 1:
            self._print(stage)

    def remind(self) -> None:
        """Print a line for the innermost stage, if none was printed for :data:`EVERY` seconds."""
        if time.monotonic() - self._printed >= EVERY:
            self._print(list(self._stages.values())[-1] if self._stages else _Stage("working", None, self._begun, 0.0))

    def _print(self, stage: _Stage, note: str = "") -> None:
        self._printed = stage.printed = time.monotonic()
        elapsed = stage.printed - stage.begun
        units = f"{stage.done}{'' if stage.total is None else f' of {stage.total}'} in "
        units = "" if stage.total is None and not stage.done else units
        left = ""
        if stage.total and 0 < stage.done < stage.total:
            left = f", about {_clock(elapsed / stage.done * (stage.total - stage.done))} left"
        line = f"{stage.what}: {units}{_clock(elapsed)}{left}  {note}"
        self.console.print(line.rstrip(), highlight=False, markup=False, soft_wrap=True)


def _clock(seconds: float) -> str:
    """Format seconds as minutes and seconds: 75 is ``1:15``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}"


_display: ContextVar[Progress | _Lines | None] = ContextVar("progress", default=None)


@contextmanager
def shown(console: Console) -> Iterator[None]:
    """Show the progress of everything that is tracked inside this block.

    Args:
        console: where it is shown.
    """
    with _bars(console) if console.is_terminal else _lines(console) as display:
        token = _display.set(display)
        try:
            yield
        finally:
            _display.reset(token)


@contextmanager
def report_to(display: Any) -> Iterator[None]:
    """Report the progress of everything that is tracked inside this block to an object, and show nothing.

    Args:
        display: has ``add_task``, ``update``, ``remove_task`` and ``console``, as the displays here.
    """
    token = _display.set(display)
    try:
        yield
    finally:
        _display.reset(token)


def notify(line: str) -> None:
    """Print a line immediately, without disturbing progress bars: something that the user must know to continue.

    Unlike progress it is also printed by the library, to standard error.

    Args:
        line: the line.
    """
    display = _display.get()
    console = Console(stderr=True) if display is None else display.console
    console.print(line, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def _lines(console: Console) -> Iterator[_Lines]:
    """Show progress as lines; a thread makes sure that one is printed regularly."""
    lines, ended = _Lines(console), threading.Event()

    def remind() -> None:
        while not ended.wait(EVERY / 6):
            lines.remind()

    thread = threading.Thread(target=remind, daemon=True)
    thread.start()
    try:
        yield lines
    finally:
        ended.set()
        thread.join()


def _bars(console: Console) -> Progress:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    return Progress(*columns, console=console, transient=True, speed_estimate_period=WINDOW)


class Tracker:
    """Progress of one piece of work: call it after each unit.

    Args:
        what: name of the work.
        total: number of units, if it is known.
    """

    def __init__(self, what: str, total: int | None) -> None:
        self._display = _display.get()
        self._task = self._display.add_task(what, total=total, note="") if self._display else None

    def __call__(self, units: int = 1, note: str = "") -> None:
        """Count units of work that are done.

        Args:
            units: their number.
            note: text beside the bar.
        """
        if self._display is not None and self._task is not None:
            self._display.update(self._task, advance=units, note=note)

    def done(self) -> None:
        """End the display."""
        if self._display is not None and self._task is not None:
            self._display.remove_task(self._task)


@contextmanager
def tracker(what: str, total: int | None = None) -> Iterator[Tracker]:
    """Track units of work that are counted by calls.

    Args:
        what: name of the work.
        total: number of units, if it is known.
    """
    count = Tracker(what, total)
    try:
        yield count
    finally:
        count.done()


def track(items: Iterable[Item], what: str, total: int | None = None) -> Iterator[Item]:
    """Iterate, counting each item as a unit of work.

    Args:
        items: the items.
        what: name of the work.
        total: number of items, if ``items`` has no length.
    """
    if total is None:
        total = len(items) if hasattr(items, "__len__") else None  # type: ignore[arg-type]
    with tracker(what, total) as count:
        for item in items:
            yield item
            count()
