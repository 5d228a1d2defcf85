"""What the tests of the command line share: how long a decoding step takes is known to them, not measured."""

import pytest

from lamella.evaluate import StepTimes

STEP = StepTimes(attn=3e-4, mlp=2e-4, rest=8e-4)  # of the nano Llama's six layers: 38 in all, in units of 0.1 ms


@pytest.fixture(autouse=True)
def step_times(monkeypatch: pytest.MonkeyPatch) -> StepTimes:
    """What is cut for a speed-up does not depend on what else the machine does."""
    for place in (
        "commands.bench",
        "commands.compress.command",
        "commands.compress.forms",
        "evaluate.budget",
        "planners",
    ):
        monkeypatch.setattr(f"lamella.{place}.step_times", lambda stack: STEP)
    return STEP
