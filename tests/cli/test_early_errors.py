"""What cannot be used is refused before any model is opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lamella.plan import ModelReference, Plan
from lamella.zoo import open_stack, opening

NANO = str(Path(__file__).parents[1] / "models" / "nano-llama")
MISTYPED = "smolm2"
WRONG = {
    "a missing plan": "{folder}/no-plan.json",
    "a damaged plan": "{folder}/damaged.json",
    "a missing text": "{folder}/no-text.txt",
    "an empty text": "{folder}/empty.txt",
    "an existing output": "{folder}/there",
    "a folder that is no model": "{folder}/there",
    "a mistyped model": MISTYPED,
    "a share out of its bounds": "1.5",
}
COMMANDS: list[tuple[str, list[str]]] = [
    ("a mistyped model", ["compress", "WRONG", "-o", "{folder}/out"]),
    ("a missing text", ["compress", NANO, "--calibration", "WRONG", "-o", "{folder}/out"]),
    ("an empty text", ["compress", NANO, "--heal-train", "WRONG", "-o", "{folder}/out"]),
    ("an existing output", ["compress", NANO, "-o", "WRONG"]),
    ("a mistyped model", ["plan", "finercut", "WRONG"]),
    ("a share out of its bounds", ["plan", "finercut", NANO, "--exclude-front", "WRONG"]),
    ("a share out of its bounds", ["run", "finercut", NANO, "--exclude-front", "WRONG"]),
    (
        "a share out of its bounds",
        ["compress", NANO, "--method", "finercut", "--finercut.exclude-front", "WRONG", "-o", "{folder}/o"],
    ),
    ("a missing text", ["plan", "finercut", NANO, "--calibration", "WRONG"]),
    ("an empty text", ["run", "finercut", NANO, "--calibration", "WRONG"]),
    ("a mistyped model", ["run", "finercut", "WRONG"]),
    ("an existing output", ["run", "finercut", NANO, "-o", "WRONG"]),
    ("a missing plan", ["run", "unified-skip", "tune", NANO, "--plan", "WRONG", "-o", "{folder}/out"]),
    ("an empty text", ["heal", NANO, "--train", "WRONG", "--steps", "1", "-o", "{folder}/out"]),
    ("an empty text", ["heal", NANO, "--test", "WRONG", "--steps", "1", "-o", "{folder}/out"]),
    ("a missing plan", ["heal", NANO, "WRONG", "--steps", "1", "-o", "{folder}/out"]),
    ("a mistyped model", ["heal", NANO, "--teacher", "WRONG", "--steps", "1", "-o", "{folder}/out"]),
    ("an existing output", ["heal", NANO, "--steps", "1", "-o", "WRONG"]),
    ("an empty text", ["compare", NANO, "--new", "WRONG"]),
    ("a missing text", ["compare", NANO, "--new", "pydoc", "--old", "WRONG"]),
    ("an existing output", ["compare", NANO, "--new", "pydoc", "-o", "WRONG"]),
    ("a missing plan", ["eval", NANO, "WRONG"]),
    ("a damaged plan", ["eval", NANO, "WRONG"]),
    ("a missing text", ["eval", NANO, NANO, "--test", "WRONG"]),
    ("a mistyped model", ["eval", NANO, "WRONG"]),
    ("a missing plan", ["bench", NANO, "WRONG"]),
    ("a folder that is no model", ["bench", NANO, "WRONG"]),
    ("a missing plan", ["chat", NANO, "--plan", "WRONG", "--prompt", "hello"]),
    ("a missing plan", ["trace", NANO, "--plan", "WRONG"]),
    ("a missing plan", ["apply", "WRONG", NANO, "-o", "{folder}/out"]),
    ("an existing output", ["apply", "{folder}/plan.json", NANO, "-o", "WRONG"]),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "damaged.json").write_text('{"schema": "lamella.plan/2", "drop": ')
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("mine")
    Plan(model=ModelReference.of(open_stack(NANO)), drop=["layers.0"]).write(tmp_path / "plan.json")
    return tmp_path


@pytest.mark.parametrize(("wrong", "command"), COMMANDS, ids=[f"{c[0]}, {w}, {n}" for n, (w, c) in enumerate(COMMANDS)])
def test_a_wrong_input_is_refused_before_a_model_is_opened(
    lamella: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, wrong: str, command: list[str]
) -> None:
    opened: list[Any] = []

    def load(kind: Any, place: Any, **_: Any) -> Any:
        opened.append(place)
        raise AssertionError(f"{place} was opened")

    monkeypatch.setattr(opening, "_load", load)
    value = WRONG[wrong].format(folder=folder)
    line = lamella(*(value if each == "WRONG" else each.format(folder=folder) for each in command)).refused()
    assert not opened
    assert Path(value).name in line
