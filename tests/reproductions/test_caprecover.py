"""What the reproduction of caprecover makes of captions."""

from __future__ import annotations

import sys
from pathlib import Path
from runpy import run_path

import pytest

REPRODUCTIONS = Path(__file__).parents[2] / "reproductions"
TRUE = "a red circle in row one column one and a blue square in row three column two"


def test_who_knows_what_is_there_and_not_where_has_colours_and_shapes_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(REPRODUCTIONS), *sys.path])
    attributes = run_path(str(REPRODUCTIONS / "caprecover.py"))["attributes"]
    turned = "a blue square in row two column two and a red circle in row four column one"
    assert attributes([turned], [TRUE]) == {"colour": 100, "shape": 100, "cell": 0}
    assert attributes([TRUE], [TRUE]) == {"colour": 100, "shape": 100, "cell": 100}
    one = "a red square in row one column one"
    assert attributes([one], [TRUE]) == {"colour": 50, "shape": 50, "cell": 50}
    twice = "a red circle in row one column one and a red circle in row one column one"  # there is one
    assert attributes([twice], [TRUE]) == {"colour": 50, "shape": 50, "cell": 50}
    assert attributes([f"{TRUE} and {one}"], [TRUE])["colour"] == pytest.approx(200 / 3)  # more than there are
