"""Alternating calls: their order, their number, and the ratios of their times."""

from __future__ import annotations

from functools import partial

import pytest

from lamella.evaluate import turns


def test_calls_take_turns_and_the_first_rounds_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now, seen = [0.0], []

    def call(name: str, seconds: float) -> None:
        seen.append(name)
        now[0] += 100.0 if len(seen) <= 4 else seconds  # as when something is made on the first call

    monkeypatch.setattr("lamella.evaluate.speed.now", lambda: now[0])
    found = turns({"base": partial(call, "base", 2.0), "other": partial(call, "other", 3.0)}, "base", 5)
    assert seen == ["base", "other"] * 7
    assert (found["base"].median, found["other"].low, found["other"].median) == (1.0, 1.5, 1.5)
