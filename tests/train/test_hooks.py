"""Hooks: when they are called, what they may change, and that their state survives a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lamella.errors import TrainingError
from lamella.train import Hook, Task, TrainConfig, TrainingLog, TrainingRun, blocks, fit, response_loss
from lamella.zoo.nano import nano

TOKENS = torch.randint(3, 128, (10, 12), generator=torch.Generator().manual_seed(0))
SAMPLES = blocks(TOKENS, (2, 8))
CONFIG = TrainConfig(steps=6, lr=3e-3, batch=2, accumulate=2, save_every=2, log_every=2)


def fitted(out: Path, *hooks: Hook, loss: Any = response_loss, held_out: Any = ()) -> tuple[Any, TrainingLog]:
    model = nano("gpt2")
    return model, fit(model, SAMPLES, Task(loss), CONFIG, out=out, held_out=held_out, hooks=hooks)


def weights(model: Any) -> dict[str, Tensor]:
    return {name: each.detach().clone() for name, each in model.named_parameters()}


class Averaging(Hook):
    """Keeps an average of all weights, and all weights that it has seen."""

    def __init__(self) -> None:
        self.mean: dict[str, Tensor] = {}
        self.seen: list[dict[str, Tensor]] = []

    def begin(self, run: TrainingRun) -> None:
        self.mean = self.mean or {name: each.detach().clone() for name, each in run.trained.items()}

    @torch.no_grad()
    def after_step(self, run: TrainingRun) -> None:
        for name, each in run.trained.items():
            self.mean[name].lerp_(each, 0.25)
        self.seen.append({name: each.detach().clone() for name, each in run.trained.items()})

    def save(self, folder: Path) -> None:
        save_file(self.mean, folder / "mean.safetensors")

    def load(self, folder: Path) -> None:
        self.mean = load_file(folder / "mean.safetensors")


def test_an_average_of_the_weights_is_one_and_survives_a_kill(tmp_path: Path) -> None:
    whole = Averaging()
    start = weights(nano("gpt2"))
    fitted(tmp_path / "whole", whole)
    expected = {name: each.double() for name, each in start.items()}
    for seen in whole.seen:
        expected = {name: 0.75 * expected[name] + 0.25 * seen[name].double() for name in expected}
    for name, each in whole.mean.items():
        torch.testing.assert_close(each.double(), expected[name], atol=1e-6, rtol=0)

    class Stopping(Hook):
        def before_step(self, run: TrainingRun) -> None:
            if run.step == 5:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fitted(tmp_path / "cut", Averaging(), Stopping())
    resumed = Averaging()
    fitted(tmp_path / "cut", resumed)
    assert len(resumed.seen) == 2
    assert all(torch.equal(each, whole.mean[name]) for name, each in resumed.mean.items())


class Diary(Hook):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def begin(self, run: TrainingRun) -> None:
        self.lines.append(f"begin {run.step}")

    def before_step(self, run: TrainingRun) -> None:
        assert [len(batch["input_ids"]) for batch in run.batches] == [2, 2]
        assert all(each.grad is None for each in run.model.parameters())
        self.lines.append(f"before {run.step}")

    def after_step(self, run: TrainingRun) -> None:
        self.lines.append(f"after {run.step}")
        run.note("steps", torch.tensor(run.step))

    def evaluated(self, run: TrainingRun) -> None:
        assert run.log.held_out[-1].step == run.step
        self.lines.append(f"evaluated {run.step}")

    def end(self, run: TrainingRun) -> None:
        self.lines.append("end")


def test_hooks_are_called_in_order_and_their_values_are_logged(tmp_path: Path) -> None:
    diary = Diary()
    _, log = fitted(tmp_path, diary, held_out=SAMPLES[:2])
    steps = [f"{when} {step + (when == 'after')}" for step in range(6) for when in ("before", "after")]
    for step in (2, 4, 6):  # with each checkpoint
        steps.insert(steps.index(f"after {step}") + 1, f"evaluated {step}")
    assert diary.lines == ["begin 0", "evaluated 0", *steps, "end"]
    assert [point.parts for point in log.train] == [{"steps": 1.5}, {"steps": 3.5}, {"steps": 5.5}]
    again = Diary()
    assert fitted(tmp_path, again, held_out=SAMPLES[:2])[1] == log
    assert again.lines == ["begin 6", "end"]


def test_a_hook_may_end_a_run_which_is_then_not_resumed(tmp_path: Path) -> None:
    class Enough(Hook):
        def done(self, run: TrainingRun) -> bool:
            return bool(run.log.held_out) and run.log.held_out[-1].step >= 4

    def broken(model: Any, batch: Any) -> Tensor:
        raise KeyboardInterrupt

    broken.__qualname__ = response_loss.__qualname__
    model, log = fitted(tmp_path, Enough(), held_out=SAMPLES[:2])
    assert log.train[-1].step == 4 and [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    again, relog = fitted(tmp_path, Enough(), held_out=SAMPLES[:2], loss=broken)
    assert relog == log
    assert all(torch.equal(each, weights(model)[name]) for name, each in weights(again).items())


def test_what_a_hook_changes_before_a_step_is_what_the_step_computes_with(tmp_path: Path) -> None:
    """One parameter trains at a time, at a rate of its own: only it moves, as far as Adam's first step is long."""
    names = ["transformer.h.0.ln_1.weight", "transformer.h.1.ln_1.weight"]
    moved = []

    class One(Hook):
        def before_step(self, run: TrainingRun) -> None:
            self.before = weights(run.model)
            for name, each in run.trained.items():
                each.requires_grad_(name == names[run.step % 2])
            for group in run.optimizer.param_groups:
                group["lr"] = 0.125

        def after_step(self, run: TrainingRun) -> None:
            now = weights(run.model)
            moved.append({name: (now[name] - each).abs().max().item() for name, each in self.before.items()})

    fitted(tmp_path, One())
    for step, each in enumerate(moved):
        assert {name for name, far in each.items() if far > 0} == {names[step % 2]}
    assert [moved[step][names[step]] for step in (0, 1)] == pytest.approx([0.125, 0.125], rel=1e-3)


def test_what_a_hook_finds_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    class Looking(Hook):
        def before_step(self, run: TrainingRun) -> None:
            run.check(torch.tensor(float("inf") if run.step == 3 else 1.0), "score")

    with pytest.raises(TrainingError, match="non-finite score at step 4 of 6, with samples"):
        fitted(tmp_path, Looking())
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def test_hooks_are_notified_of_a_complete_checkpoint_before_the_older_one_is_deleted(tmp_path: Path) -> None:
    found: list[list[str]] = []

    class Looking(Hook):
        def saved(self, folder: Path) -> None:
            assert (folder / "log.json").exists()  # written last
            found.append(sorted(path.name for path in folder.parent.glob("checkpoint-*")))

    fitted(tmp_path, Looking())
    assert found == [["checkpoint-2"], ["checkpoint-2", "checkpoint-4"], ["checkpoint-4", "checkpoint-6"]]
