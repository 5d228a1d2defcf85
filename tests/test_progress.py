"""Progress of long work, where there is a terminal and where there is none."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from lamella import progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_without_a_terminal_lines_come_in_time_with_an_estimate_and_one_for_each_long_stage(clock: list[float]) -> None:
    text = io.StringIO()
    with progress.shown(Console(file=text, width=20)):
        with progress.tracker("searching", 9) as count:
            for step in range(9):
                clock[0] += 4
                count(note=f"layers.{step}")
        with progress.tracker("short", 1) as count:
            clock[0] += 1
            count()
        for _ in progress.track(iter("ab"), "reading [a file]"):
            clock[0] += 20
    assert text.getvalue().splitlines() == [
        "searching: 4 of 9 in 0:16, about 0:20 left  layers.3",
        "searching: 8 of 9 in 0:32, about 0:04 left  layers.7",
        "searching: 9 of 9 in 0:36",
        "reading [a file]: 1 in 0:20",
        "reading [a file]: 2 in 0:40",
    ]


def test_silence_is_broken_after_fifteen_seconds_by_the_innermost_stage(clock: list[float]) -> None:
    text = io.StringIO()
    lines = progress._Lines(Console(file=text, width=20))
    clock[0] = 14
    lines.remind()
    clock[0] = 16
    lines.remind()
    lines.add_task("planning", 3, "")
    lines.add_task("loading a model", None, "")
    clock[0] = 30
    lines.remind()
    clock[0] = 32
    lines.remind()
    lines.remind()
    assert text.getvalue().splitlines() == ["working: 0:16", "loading a model: 0:16"]


def test_a_thread_breaks_the_silence_of_work_that_counts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.05)
    text = io.StringIO()
    with progress.shown(Console(file=text)):
        for _ in range(200):  # as long as it takes, up to ten seconds
            if text.getvalue():
                break
            time.sleep(0.05)
    assert text.getvalue().startswith("working: 0:0")


def test_on_a_terminal_there_are_bars_and_outside_nothing_is_shown() -> None:
    text = io.StringIO()
    with progress.shown(Console(file=text, force_terminal=True, width=100)), progress.tracker("searching", 9) as count:
        count(3, note="layers.3")
    assert "searching" in text.getvalue() and "/9" in text.getvalue() and "left" in text.getvalue()
    text.truncate(0)
    with progress.tracker("searching", 9) as count:
        count()
    assert not text.getvalue().strip("\0")


def test_a_line_that_must_be_seen_is_shown_at_once_and_in_the_library_too(capsys: pytest.CaptureFixture[str]) -> None:
    text = io.StringIO()
    with progress.shown(Console(file=text, width=20)):
        progress.notify("open [http://127.0.0.1:8080] in a browser")
    with progress.shown(Console(file=text, width=20, force_terminal=True)):
        progress.notify("again")
    progress.notify("without a display")
    assert "open [http://127.0.0.1:8080] in a browser\n" in text.getvalue() and "again" in text.getvalue()
    assert capsys.readouterr() == ("", "without a display\n")
