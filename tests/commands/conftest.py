"""What the tests of commands share: how long a step takes and what memory it needs is known to them, not measured."""

import pytest

from lamella.evaluate import Memory, StepTimes

STEP = StepTimes(attn=3e-4, mlp=2e-4, rest=8e-4)  # of the nano Llama's six layers: 38 in all, in units of 0.1 ms


@pytest.fixture(autouse=True)
def step_times(monkeypatch: pytest.MonkeyPatch) -> StepTimes:
    """What is cut for a speed-up does not depend on what else the machine does."""
    for place in ("commands.bench", "commands.compress.command", "evaluate.budget", "planners"):
        monkeypatch.setattr(f"lamella.{place}.step_times", lambda stack: STEP)
    return STEP


@pytest.fixture
def measured_memory() -> None:
    """A test that asks for it has the memory of the compressed model measured."""


@pytest.fixture(autouse=True)
def memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes that import everything measure it, for ten seconds."""
    place = "commands.compress.result"
    if "measured_memory" not in request.fixturenames:
        monkeypatch.setattr(f"lamella.{place}.peak_memory", lambda folder: Memory(2, 1))
