"""Everything that trains: new tensors beside the old ones, from a seed, and after a stop to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from worlds import (
    COMMANDS,
    DIFFERENT,
    IDS,
    MASK,
    Made,
    carried_out,
    difference,
    logits,
    made,
    of_suite,
    on_families,
    opened,
    repeated,
    weights,
)

import lamella
from lamella.plan import Plan
from lamella.plan.export import export
from lamella.results import Adapted, Tuned
from lamella.runtime import apply
from lamella.train import Adapter, merge

TRAINING = of_suite("training")


def view(done: Made) -> Any:
    """The trained model as it runs, from what was written."""
    return apply(done.outcome.result.stack, Plan.read(done.out / "plan.json"))


@pytest.mark.parametrize("command", repeated(each for each in TRAINING if not COMMANDS[each].name))
def test_another_seed_gives_other_weights(command: str, tmp_path: Path) -> None:
    another = carried_out(command, out=tmp_path / "out", seed=1)
    assert not torch.equal(logits(view(another)), logits(view(made(command))))


@pytest.mark.parametrize("command", repeated(TRAINING))
def test_interrupted_training_goes_on_to_the_bit(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, out = made(command), tmp_path / "out"

    def stop_in_step_3(callback: Any, args: Any, state: Any, control: Any, **options: Any) -> None:
        if state.global_step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("transformers.TrainerCallback.on_optimizer_step", stop_in_step_3)
        with pytest.raises(KeyboardInterrupt):
            carried_out(command, out=out)
    assert list((tmp_path / ".out.work").rglob("checkpoint-2")) and not out.exists()
    torch.rand(3)  # what is drawn in between must not matter
    again = carried_out(command, out=out)
    ours, theirs = (each.outcome.result for each in (again, whole))
    assert not difference(weights(ours.stack), weights(theirs.stack))
    assert torch.equal(logits(view(again)), logits(view(whole)))
    assert ours.log == theirs.log and again.calls < whole.calls
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("command", repeated(TRAINING))
def test_gradient_checkpointing_changes_nothing(command: str, tmp_path: Path) -> None:
    if "gradient_checkpointing" not in COMMANDS[command].options:
        pytest.skip("it has no training configuration of its own")
    whole = made(command)
    again = carried_out(command, out=tmp_path / "out", gradient_checkpointing=True)
    assert not difference(weights(again.outcome.result.stack), weights(whole.outcome.result.stack))
    assert torch.equal(logits(view(again)), logits(view(whole)))
    assert again.outcome.result.log.train == whole.outcome.result.log.train


@pytest.mark.parametrize(("command", "name"), on_families(TRAINING))
def test_every_family_trains_and_then_runs(command: str, name: str) -> None:
    done, stack = made(command, name), opened(name)
    plan = done.inputs.get("plan")
    before = stack.model if plan is None else apply(stack, plan)
    assert done.changed == [] and not torch.equal(logits(view(done)), logits(before))
    out = view(done).generate(IDS, attention_mask=MASK, max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert out.shape == (3, 14)
    assert torch.isfinite(logits(view(done))).all()


@pytest.mark.parametrize("command", TRAINING)
def test_its_checkpoint_computes_what_was_trained(command: str, tmp_path: Path) -> None:
    done, folder = made(command), made(command).out
    if isinstance(done.outcome.result, Adapted):  # its folder has no model, so export one with it
        assert not (folder / "config.json").exists()
        folder = export(opened(DIFFERENT[0]), Plan.read(folder / "plan.json"), tmp_path / "whole", form="native")
    if isinstance(done.outcome.result, Tuned):
        assert not (folder / "config.json").exists()
        merged = merge(opened(DIFFERENT[0]), Adapter.open(folder))
        folder = export(merged, Plan.read(folder / "plan.json"), tmp_path / "whole", form="native")
    assert torch.equal(logits(lamella.load(folder).model), logits(view(done)))
    log = done.outcome.result.log
    assert [point["loss"] for point in done.outcome.evidence.curve] == [point.loss for point in log.train] != []
