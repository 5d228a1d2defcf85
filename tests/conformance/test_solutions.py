"""Everything that solves linear systems: true solutions in the caller's order, and none of them computed twice."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from worlds import COMMANDS, carried_out, made

SOLVING = [command for command, entry in COMMANDS.items() if "LinearSystems" in entry.inputs.values()]


@pytest.mark.parametrize("command", SOLVING)
def test_solutions_stand_in_the_caller_s_order_with_their_true_residuals(command: str) -> None:
    done = made(command)
    systems, solutions = done.inputs["systems"], done.outcome.result
    assert sorted(solutions.sequence) == list(range(len(systems)))
    for number, system in enumerate(systems):
        exact = np.linalg.solve(system.A.toarray(), system.b)
        residual = np.linalg.norm(system.b - system.A @ solutions.x[number]) / np.linalg.norm(system.b)
        assert residual == pytest.approx(solutions.residuals[number], rel=1e-6, abs=1e-12)
        assert residual <= COMMANDS[command].options["tol"].default and solutions.converged[number]
        assert np.allclose(solutions.x[number], exact, rtol=1e-5)
    assert not np.allclose(solutions.x[0], solutions.x[1])  # so that another order would be seen


@pytest.mark.parametrize("command", SOLVING)
def test_what_is_written_is_what_was_solved(command: str) -> None:
    done = made(command)
    solutions, again = done.outcome.result, type(done.outcome.result).read(done.out)
    assert np.array_equal(again.x, solutions.x) and np.array_equal(again.sequence, solutions.sequence)
    assert all(map(np.array_equal, again.parameters, done.inputs["systems"].parameters))


@pytest.mark.parametrize("command", SOLVING)
def test_a_stopped_run_solves_nothing_again(command: str, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        carried_out(command, out=tmp_path / "out", stop=3)
    (journal,) = (tmp_path / ".out.work").rglob("solved-000.jsonl")
    before = [json.loads(line)["seconds"] for line in journal.read_text().splitlines()]
    done = carried_out(command, out=tmp_path / "out")
    after = [each.seconds for each in done.outcome.result.solved]
    assert len(before) == 3 < len(after) and after[:3] == before
