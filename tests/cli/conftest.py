"""Running the command line inside the test process, where it is quick."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from lamella.cli import main
from lamella.plan import ModelReference, Plan
from lamella.zoo import open_stack

NANO_LLAMA = Path(__file__).parents[1] / "models" / "nano-llama"


@dataclass(frozen=True)
class Outcome:
    """What a command left: its exit code and what it printed."""

    code: int
    out: str
    err: str

    def refused(self) -> str:
        """The one line of a refusal."""
        lines = [line for line in self.err.splitlines() if line.strip()]
        assert self.code == 2, f"exit code {self.code}: {self.err}"
        assert "Traceback" not in self.err + self.out
        assert len(lines) == 1 and lines[0].startswith("lamella: "), f"not one line: {self.err}"
        return lines[0]


Lamella = Callable[..., Outcome]


@pytest.fixture
def lamella(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Lamella:
    """The command line as a function of its arguments."""

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["lamella", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        printed = capsys.readouterr()
        return Outcome(int(stop.value.code or 0), printed.out, printed.err)

    return run


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A nano Llama with tokenizer, to be damaged."""
    return Path(shutil.copytree(NANO_LLAMA, tmp_path / "model"))


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    """A plan for the nano Llama that removes two whole layers."""
    return _write_plan(tmp_path / "plan.json", ["layers.2", "layers.4"])


@pytest.fixture
def half_plan(tmp_path: Path) -> Path:
    """A plan for the nano Llama that removes single halves."""
    return _write_plan(tmp_path / "halves.json", ["layers.1.mlp", "layers.4.attn"])


def _write_plan(file: Path, drop: list[str]) -> Path:
    Plan(model=ModelReference.of(open_stack(NANO_LLAMA)), drop=drop).write(file)
    return file
