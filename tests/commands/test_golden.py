"""Commands give the plans and the fidelities that they gave before they were declared, for the same seeds and tokens.

``golden.json`` was written by the functions that these commands replaced, on the nano Llama.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import lamella
from lamella.commands.compress import race
from lamella.plan import ModelReference, Plan
from lamella.runner import make_plan, run
from lamella.stack import Stack
from lamella.zoo import open_stack, open_tokenizer

NANO_LLAMA = Path(__file__).parents[1] / "models" / "nano-llama"
GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())
TRAIN: dict[str, Any] = {"sequences": 24, "length": 48, "steps": 12, "batch": 4, "lr": 5e-4}


@pytest.fixture(scope="module")
def stack() -> Stack:
    return open_stack(NANO_LLAMA)


def near(expected: Any, measured: Any, path: str = "") -> None:
    """The same structure and words, and numbers that differ by no more than rounding."""
    if isinstance(expected, dict):
        for name in expected:
            near(expected[name], measured[name], f"{path}.{name}")
    elif isinstance(expected, list):
        assert len(expected) == len(measured), path
        for number, (one, other) in enumerate(zip(expected, measured, strict=True)):
            near(one, other, f"{path}[{number}]")
    elif isinstance(expected, float):
        assert measured == pytest.approx(expected, rel=2e-4, abs=2e-5), path
    else:
        assert measured == expected, path


@pytest.mark.parametrize("slug", GOLDEN["plans"])
def test_plans(stack: Stack, slug: str) -> None:
    expected = GOLDEN["plans"][slug]
    text = lamella.load_text("pydoc", "calibration")
    tokens = lamella.windows(open_tokenizer(NANO_LLAMA), text, 2, 48, 0)
    series = make_plan(slug, stack, tokens, **expected["options"])
    assert [plan.drop for plan in series] == expected["drop"]
    near(expected["scores"], [point.scores for point in series.points])


@pytest.mark.parametrize("test", GOLDEN["compress"])
def test_compression(monkeypatch: pytest.MonkeyPatch, test: str) -> None:
    monkeypatch.setattr(race, "ATTEMPTS", 1)  # the plan that the cost model picks is kept
    found = run("compress", NANO_LLAMA, method="finercut", speedup=1.03, heal=None, test=test).evidence
    expected = GOLDEN["compress"][test]
    assert found.chosen["drop"] == expected["drop"]
    near(expected["fidelity"], found.chosen["fidelity"])
    near(expected["scores"], found.scores)


@pytest.mark.parametrize("loss", GOLDEN["heal"])
def test_healing(stack: Stack, loss: str) -> None:
    plan = Plan(model=ModelReference.of(stack), drop=["layers.2", "layers.4"])
    given = TRAIN | ({} if loss == "None" else {"loss": loss})
    found = run("heal", NANO_LLAMA, plan=plan, test="pydoc", **given).evidence
    expected = GOLDEN["heal"][loss]
    assert found.findings["recipe"] == expected["method"]
    near(expected["before"], found.before)
    near(expected["after"], found.fidelity)
    near(expected["curve"], found.curve)
    near(expected["held_out"], found.held_out)


def test_comparison() -> None:
    given = {"old": ["pydoc"], "method": ("lora", "layra"), "steps": 4, "batch": 2, "length": 32}
    near(GOLDEN["compare"], run("compare", NANO_LLAMA, new="stdlib", **given).evidence.findings)


@pytest.mark.parametrize("test", GOLDEN["fidelity"])
def test_fidelity(tmp_path: Path, stack: Stack, test: str) -> None:
    Plan(model=ModelReference.of(stack), drop=["layers.2", "layers.4"]).write(file := tmp_path / "plan.json")
    found = run("eval", NANO_LLAMA, changed=[str(file)], test=test).evidence.findings
    near(GOLDEN["fidelity"][test], found["results"][str(file)])
