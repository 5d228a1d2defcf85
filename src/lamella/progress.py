"""Progress of long work: silent in the library, a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

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
EVERY = 15.0  # seconds between two lines, where there is no terminal
LONG = 30.0  # seconds: a stage of which the end is told, too
WINDOW = 600.0  # seconds over which a bar averages its pace for the estimate of what remains


@dataclass
class _Stage:
    what: str
    total: int | None
    begun: float
    told: float
    done: int = 0


class _Lines:
    """Replaces bars in a log: a line every :data:`EVERY` seconds, and one at the end of each long stage.

    A stage prints its line when a unit of work is done. Where no unit ends for that long, :meth:`remind` prints it.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._stages: dict[TaskID, _Stage] = {}
        self._begun = self._told = time.monotonic()

    def add_task(self, what: str, total: int | None, note: str) -> TaskID:
        now = time.monotonic()
        number = TaskID(max(self._stages, default=0) + 1)
        self._stages[number] = _Stage(what, total, now, now)
        return number

    def update(self, number: TaskID, advance: int, note: str) -> None:
        stage = self._stages[number]
        stage.done += advance
        if time.monotonic() - stage.told >= EVERY:
            self._tell(stage, note)

    def remove_task(self, number: TaskID) -> None:
        stage = self._stages.pop(number)
        now = time.monotonic()
        if now - stage.begun >= LONG and now - stage.told >= 1:
            self._tell(stage)

    def remind(self) -> None:
        """Print a line for the innermost stage, if none was printed for :data:`EVERY` seconds."""
        if time.monotonic() - self._told >= EVERY:
            self._tell(list(self._stages.values())[-1] if self._stages else _Stage("working", None, self._begun, 0.0))

    def _tell(self, stage: _Stage, note: str = "") -> None:
        self._told = stage.told = time.monotonic()
        elapsed = stage.told - stage.begun
        units = f"{stage.done}{'' if stage.total is None else f' of {stage.total}'} in "
        units = "" if stage.total is None and not stage.done else units
        left = ""
        if stage.total and 0 < stage.done < stage.total:
            left = f", about {_clock(elapsed / stage.done * (stage.total - stage.done))} left"
        said = f"{stage.what}: {units}{_clock(elapsed)}{left}  {note}"
        self.console.print(said.rstrip(), highlight=False, markup=False, soft_wrap=True)


def _clock(seconds: float) -> str:
    """Seconds as minutes and seconds: 75 is ``1:15``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}"


_display: ContextVar[Progress | _Lines | None] = ContextVar("progress", default=None)


@contextmanager
def shown(console: Console) -> Iterator[None]:
    """Show the progress of everything that is tracked inside this block."""
    with _bars(console) if console.is_terminal else _lines(console) as display:
        token = _display.set(display)
        try:
            yield
        finally:
            _display.reset(token)


def say(line: str) -> None:
    """Show a line at once, beside whatever is in progress: something that a person must know to go on.

    Unlike progress it is seen in the library too, on the standard error output.
    """
    display = _display.get()
    console = Console(stderr=True) if display is None else display.console
    console.print(line, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def _lines(console: Console) -> Iterator[_Lines]:
    """Lines, of which a thread sees to it that none is long in coming."""
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
