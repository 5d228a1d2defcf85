"""Every tutorial is run: its files are written, its commands and its Python go through, in the order of the page."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lamella.commands.compress import result
from lamella.evaluate import Memory, StepTimes

ROOT = Path(__file__).parent.parent
NANO_LLAMA = ROOT / "tests" / "models" / "nano-llama"
PAGES = sorted(page for page in (ROOT / "docs" / "tutorials").glob("*.md") if page.name != "index.md")
BLOCK = re.compile(r"^```(\w+)(?: title=\"([\w.-]+)\")?\n(.*?)^```$", re.DOTALL | re.MULTILINE)
MORE = {"restore": ["--min-validity", "0", "--samples", "1"]}  # random weights answer nothing


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_tutorial_runs_from_its_first_line_to_its_last(
    page: Path, lamella: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _prepare(tmp_path)
    times = StepTimes(attn=1e-3, mlp=1e-3, rest=1e-3)  # of a model with something to gain, on a machine that is idle
    for place in ("commands.compress.command", "commands.compress.forms", "evaluate.budget", "planners"):
        monkeypatch.setattr(f"lamella.{place}.step_times", lambda stack: times)
    monkeypatch.setattr(result, "peak_memory", lambda folder: Memory(2, 1))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    names: dict[str, Any] = {"__name__": "tutorial"}
    ran = 0
    for language, file, text in BLOCK.findall(page.read_text(encoding="utf-8")):
        text = text.replace('"smollm2"', f'"{NANO_LLAMA}"')
        if file:
            Path(file).write_text(text, encoding="utf-8")
        elif language == "python":
            exec(compile(text, str(page), "exec"), names)
            ran += 1
        elif language == "console":
            for line in text.splitlines():
                done = lamella(*_arguments(line))
                assert done.code == 0, f"{line}\n{done.err}"
                ran += 1
    assert ran
    sys.modules.pop("most_alike", None)


def _arguments(line: str) -> list[str]:
    program, *rest = shlex.split(line.removeprefix("$ "))
    assert program == "lamella", f"a tutorial types '{line}'"
    rest = [str(NANO_LLAMA) if each == "smollm2" else each for each in rest]
    return rest + MORE.get(rest[0], [])


def _prepare(folder: Path) -> None:
    """The checkpoints that a tutorial takes for given: a tuned model, and its base, which is a little different."""
    for name in ("instruct", "base"):
        shutil.copytree(NANO_LLAMA, folder / name)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        key: value + 0.2 * value.std() * torch.randn(value.shape, generator=generator)
        for key, value in load_file(folder / "base" / "model.safetensors").items()
    }
    save_file(tensors, folder / "base" / "model.safetensors", {"format": "pt"})
