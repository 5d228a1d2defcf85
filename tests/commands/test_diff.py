"""Two folders of results side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

NANO_LLAMA = Path(__file__).parents[1] / "models" / "nano-llama"
BRIEF = ("--sequences", "2", "--length", "48")


def test_what_was_asked_and_measured_differently(lamella: Any, tmp_path: Path) -> None:
    for name, level in (("a", "block"), ("b", "attn")):
        given = ("run", "finercut", NANO_LLAMA, *BRIEF, "--level", level, "-o", tmp_path / name)
        assert lamella(*given).code == 0
    done = lamella("diff", tmp_path / "a", tmp_path / "b", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)["findings"]
    assert found["options"] == [{"name": "level", "first": "block", "second": "attn"}]
    ours, theirs = (json.loads((tmp_path / name / "evidence.json").read_text())["points"] for name in ("a", "b"))
    measured = {each["name"]: each for each in found["measured"]}
    assert measured["points.1.removed"] == {"name": "points.1.removed", "first": 2, "second": 1, "change": -0.5}
    name = next(iter(ours[1]["scores"]))
    change = (theirs[1]["scores"][name] - ours[1]["scores"][name]) / abs(ours[1]["scores"][name])
    assert measured[f"points.1.scores.{name}"]["change"] == pytest.approx(change)
    assert "Different options" in lamella("diff", tmp_path / "a", tmp_path / "b").out


def test_the_same_twice_differs_in_nothing(lamella: Any, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert lamella("run", "random", NANO_LLAMA, "-o", tmp_path / name).code == 0
    assert "0 measurements of" in lamella("diff", tmp_path / "a", tmp_path / "b").out


def test_small_differences_can_be_left_out(lamella: Any, tmp_path: Path) -> None:
    for name, value in (("a", 1.0), ("b", 1.001)):
        document = {"schema": "lamella.evidence/2", "provenance": {}, "findings": {"x": value}}
        (tmp_path / f"{name}.json").write_text(json.dumps(document))
    given = ("diff", tmp_path / "a.json", tmp_path / "b.json")
    assert (
        "1 measurement of 1" in lamella(*given).out and "0 measurements of 1" in lamella(*given, "--at-least", 0.01).out
    )


@pytest.mark.parametrize("content", ["{", "[]", '{"schema": "lamella.evidence/1"}'])
def test_what_is_no_evidence_is_refused(lamella: Any, tmp_path: Path, content: str) -> None:
    (tmp_path / "evidence.json").write_text(content)
    assert "give a folder that Lamella has written" in lamella("diff", tmp_path, tmp_path).refused()
    assert "no-such" in lamella("diff", tmp_path / "no-such", tmp_path).refused()
