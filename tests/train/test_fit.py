"""The training loop: it learns, stops, resumes bit-exactly, and changes nothing else."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lamella import train
from lamella.errors import TrainingError
from lamella.train import Hook, Task, TrainConfig, TrainingLog, blocks, choose, collate, response_loss
from lamella.zoo.nano import nano

TOKENS = torch.randint(3, 128, (10, 12), generator=torch.Generator().manual_seed(0))
SAMPLES = blocks(TOKENS, (2, 8))
RUN: dict[str, Any] = {"steps": 12, "lr": 3e-3, "save_every": 4, "log_every": 3, "batch": 2, "accumulate": 2}


def fit(model: Any, samples: Any, loss: Any, *, out: Path, **options: Any) -> TrainingLog:
    """The loop with a loss, and with a config of those options that are one's."""
    names = [each.name for each in fields(TrainConfig)]
    config = TrainConfig(**{name: options.pop(name) for name in names if name in options})
    return train.fit(model, samples, Task(loss), config, out=out, **options)


def stopping(at: int, action: Callable[[], None]) -> Callable[[Any, Any], Tensor]:
    """The response loss, until call number ``at``."""
    calls = 0

    def loss(model: Any, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == at:
            action()
        return response_loss(model, batch)

    loss.__qualname__ = response_loss.__qualname__
    return loss


def norms(name: str) -> bool:
    return "norm" in name


def interrupt() -> None:
    raise KeyboardInterrupt


def weights(model: Any) -> dict[str, Tensor]:
    return {name: each.detach().clone() for name, each in model.named_parameters()}


def same(ours: Any, theirs: Any) -> bool:
    ours, theirs = weights(ours), weights(theirs)
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_it_overfits_a_few_samples_and_logs_how(tmp_path: Path) -> None:
    model = nano("llama")
    few = SAMPLES[:3]  # fewer than a batch
    log = fit(model, few, response_loss, out=tmp_path, steps=40, lr=1e-2, log_every=10, held_out=few)
    assert [point.step for point in log.train] == [10, 20, 30, 40]
    assert log.train[0].loss > 1 and log.held_out[-1].loss < 0.05
    assert [point.step for point in log.held_out] == [0, 40]
    assert TrainingLog.read(tmp_path / "log.json") == log


def test_the_rate_rises_then_falls_as_its_schedule_says(tmp_path: Path) -> None:
    options = {"steps": 10, "lr": 1.0, "warmup": 0.2, "log_every": 1, "trainable": norms}

    def rates(schedule: str) -> list[float]:
        log = fit(nano("llama"), SAMPLES, _tiny, out=tmp_path / schedule, schedule=schedule, **options)
        return [point.lr for point in log.train if point.lr is not None]

    assert rates("linear") == pytest.approx([0, 0.5, *(1 - step / 8 for step in range(8))])
    assert rates("constant") == pytest.approx([0, 0.5, *[1.0] * 8])
    cosine = [(1 + torch.cos(torch.tensor(torch.pi * step / 8)).item()) / 2 for step in range(8)]
    assert rates("cosine") == pytest.approx([0, 0.5, *cosine])


def _tiny(model: Any, batch: Any) -> Tensor:
    return 1e-6 * response_loss(model, batch)


def test_parts_are_logged_and_accumulated_batches_weigh_by_their_labels(tmp_path: Path) -> None:
    """One step at rate 0 on all samples: the log must give the mean over all labels, however they were split."""

    def parted(model: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss = response_loss(model, batch)
        return 2 * loss, {"half": loss}

    expected = response_loss(nano("llama"), collate(SAMPLES)).item()
    for batch, accumulate in ((10, 1), (5, 2), (1, 10)):
        split: dict[str, Any] = {"batch": batch, "accumulate": accumulate}
        log = fit(nano("llama"), SAMPLES, parted, out=tmp_path / str(batch), steps=1, lr=0.0, **split)
        [point] = log.train
        assert point.loss == pytest.approx(2 * expected, abs=1e-5)
        assert point.parts == {"half": pytest.approx(expected, abs=1e-5)}


def test_accumulation_gives_the_gradient_of_one_large_batch(tmp_path: Path) -> None:
    def after(batch: int, accumulate: int) -> dict[str, Tensor]:
        model = nano("llama")
        out = tmp_path / str(batch)
        fit(model, SAMPLES, response_loss, out=out, steps=4, lr=1e-3, batch=batch, accumulate=accumulate)
        return weights(model)

    for ours, theirs in zip(after(2, 3).values(), after(6, 1).values(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


# Calls of the loss: 1 held-out, 8 for steps 1 to 4, 1 held-out, 8 for steps 5 to 8, 1 held-out, 8 for the rest, 1.
# So: in the first step, just before a checkpoint, just after it, in the middle of a later step, before the last one.
@pytest.mark.parametrize("call", [3, 10, 11, 16, 28])
def test_an_interrupted_run_resumes_bit_exactly(call: int, tmp_path: Path) -> None:
    options: dict[str, Any] = {**RUN, "held_out": SAMPLES[:2], "trainable": lambda name: "h.1." in name}
    whole, resumed = nano("gpt2"), nano("gpt2")  # with dropout, so the random state matters
    log = fit(whole, SAMPLES, response_loss, out=tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        fit(resumed, SAMPLES, stopping(call, interrupt), out=tmp_path / "resumed", **options)
    fresh = nano("gpt2")
    torch.rand(5)
    again = fit(fresh, SAMPLES, response_loss, out=tmp_path / "resumed", **options)
    assert same(fresh, whole)
    assert again == log


def test_it_trains_wherever_it_is_called_from(tmp_path: Path) -> None:
    model, aside = nano("llama"), nano("llama")
    fit(model, SAMPLES, response_loss, out=tmp_path / "plain", **RUN)
    with torch.no_grad():
        fit(aside, SAMPLES, response_loss, out=tmp_path / "aside", **RUN)
        assert not torch.is_grad_enabled()
    assert same(model, aside)


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    model, fresh = nano("llama"), nano("llama")
    log = fit(model, SAMPLES, response_loss, out=tmp_path, **RUN)
    again = fit(fresh, SAMPLES, stopping(1, interrupt), out=tmp_path, **RUN)
    assert same(model, fresh) and again == log


def test_an_incomplete_checkpoint_is_passed_over(tmp_path: Path) -> None:
    whole, resumed = nano("llama"), nano("llama")
    fit(whole, SAMPLES, response_loss, out=tmp_path / "whole", **RUN)
    out = tmp_path / "resumed"
    with pytest.raises(KeyboardInterrupt):
        fit(nano("llama"), SAMPLES, stopping(20, interrupt), out=out, **RUN)
    (out / "checkpoint-12").mkdir()
    (out / "checkpoint-12" / "optimizer.pt").write_bytes(b"cut short")
    fit(resumed, SAMPLES, stopping(9, interrupt), out=out, **RUN)  # 8 calls are left from step 8
    assert same(resumed, whole)
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint-12", "log.json"]


def test_a_run_killed_while_it_wrote_its_first_file_begins_again(tmp_path: Path) -> None:
    whole, again = nano("llama"), nano("llama")
    fit(whole, SAMPLES, response_loss, out=tmp_path / "whole", **RUN)
    left = tmp_path / "killed" / ".log.json.partial-0123abcd"
    left.mkdir(parents=True)
    (left / "log.json.partial").write_text('{"settings": {"ste')
    fit(again, SAMPLES, response_loss, out=tmp_path / "killed", **RUN)
    assert same(whole, again)
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == ["checkpoint-12", "log.json"]


def test_a_checkpoint_that_was_half_deleted_is_swept_away(tmp_path: Path) -> None:
    log = fit(nano("llama"), SAMPLES, response_loss, out=tmp_path, **RUN)
    (tmp_path / "checkpoint-8").mkdir()
    log.write(tmp_path / "checkpoint-8" / "log.json")
    fit(nano("llama"), SAMPLES, stopping(1, interrupt), out=tmp_path, **RUN)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-12", "log.json"]


def test_a_checkpoint_holds_what_trains_and_nothing_else(tmp_path: Path) -> None:
    model = nano("llama")
    fit(model, SAMPLES, response_loss, out=tmp_path, trainable=norms, **RUN)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-12", "log.json"]
    saved = load_file(tmp_path / "checkpoint-12" / "trained.safetensors")
    assert saved.keys() == choose(model, norms).keys()
    assert all(torch.equal(saved[name], dict(model.named_parameters())[name]) for name in saved)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"lr": 1e-3}, "lr 0.003, not 0.001"),
        ({"seed": 1}, "seed 0, not 1"),
        ({"samples": SAMPLES[:-1]}, "samples"),
        ({"model": "qwen2"}, "model"),
        ({"trainable": lambda name: "mlp" in name}, "model"),
        ({"settings": {"alpha": 0.3}}, "alpha 0.1, not 0.3"),
    ],
)
def test_another_run_is_not_resumed(change: dict[str, Any], named: str, tmp_path: Path) -> None:
    def run(change: dict[str, Any]) -> None:
        options = {
            "steps": 2,
            "lr": 3e-3,
            "settings": {"alpha": 0.1},
            "trainable": lambda name: "norm" in name,
        } | change
        samples, model = options.pop("samples", SAMPLES), nano(options.pop("model", "llama"))
        fit(model, samples, response_loss, out=tmp_path, **options)

    run({})
    run({"save_every": 1, "log_every": 1})  # these do not decide the result
    with pytest.raises(TrainingError, match=f"contains a run with {named}"):
        run(change)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    foreign = tmp_path / "checkpoint-500" / "model.safetensors"
    foreign.parent.mkdir()
    foreign.write_text("someone's")
    with pytest.raises(TrainingError, match="is not the folder of a training run"):
        fit(nano("llama"), SAMPLES, response_loss, out=tmp_path, **RUN)
    assert foreign.read_text() == "someone's" and list(tmp_path.iterdir()) == [foreign.parent]


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_it_stops_where_something_is_not_finite_and_keeps_the_last_good_checkpoint(what: str, tmp_path: Path) -> None:
    calls = 0

    def loss(model: Any, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        value = response_loss(model, batch)
        if calls < 12:  # two batches for a step: 12 is the second of step 6
            return value
        return value * float("nan") if what == "loss" else value + (value - value.detach()).abs().sqrt()

    model = nano("llama")
    with pytest.raises(TrainingError, match=rf"non-finite {what} at step 6 of 12, with samples \[\d, \d, \d, \d\]"):
        fit(model, SAMPLES, loss, out=tmp_path, **RUN)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    assert all(each.isfinite().all() for each in model.parameters())
    assert all(each.requires_grad and each.grad is None for each in model.parameters()) and not model.training


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps 0: give at least 1"),
        ({"log_every": 0}, "log_every 0"),
        ({"schedule": "cosin"}, "schedule 'cosin': choose one of cosine, linear, constant"),
        ({"trainable": lambda name: False}, "no parameter of LlamaForCausalLM"),
        ({"samples": []}, "no training samples"),
    ],
)
def test_bad_arguments_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    options = {**RUN, "samples": SAMPLES, **change}
    with pytest.raises(TrainingError, match=message):
        fit(nano("llama"), loss=response_loss, out=tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_flags_modes_and_config_are_as_they_were(tmp_path: Path) -> None:
    model = nano("llama")
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[0].train()
    flags = [each.requires_grad for each in model.parameters()]
    modes = [module.training for module in model.modules()]
    config, attributes = model.config.to_dict(), set(vars(model))
    embedding = model.model.embed_tokens.weight.clone()
    fit(model, SAMPLES, response_loss, out=tmp_path, **RUN)
    assert [each.requires_grad for each in model.parameters()] == flags
    assert [module.training for module in model.modules()] == modes
    assert model.config.to_dict() == config and set(vars(model)) == attributes
    assert torch.equal(model.model.embed_tokens.weight, embedding)


SCRIPT = """
import os, signal, sys
import torch
sys.path[:0] = {path}
torch.set_num_threads(1)
from lamella.zoo.nano import nano
from lamella.train import Task, TrainConfig, blocks, fit, response_loss
tokens = torch.randint(3, 128, (10, 12), generator=torch.Generator().manual_seed(0))
out, batch, kill, shard = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), "shard" in sys.argv
calls = 0
def loss(model, batch):
    global calls
    calls += 1
    if calls == kill:
        os.kill(os.getpid(), signal.SIGKILL)
    if shard:  # outside a layer's own forward, half of its weights are here
        parts = [each.to_local().numel() / each.numel() for each in model.model.layers.parameters()]
        assert max(parts) <= 0.5 and len(parts) == 36, parts
    return response_loss(model, batch)
model = nano({model!r})
config = TrainConfig(steps=12, lr=3e-3, batch=batch, accumulate=2, save_every=2, log_every=1, shard=shard)
fit(model, blocks(tokens, (2, 8)), Task(loss), config, out=out, held_out=blocks(tokens[:3], (2, 8)))
trained = torch.load(out + "/checkpoint-12/optimizer.pt", weights_only=True)["state"]
assert {{type(each) for each in model.parameters()}} == {{torch.nn.Parameter}}
assert len(trained) == len(list(model.parameters()))
"""


def script(folder: Path, model: str) -> list[str]:
    path = folder / "run.py"
    path.write_text(SCRIPT.format(path=[each for each in sys.path if each], model=model), encoding="utf-8")
    return [str(path)]


def tensors(out: Path) -> dict[str, Tensor]:
    return load_file(out / "checkpoint-12" / "trained.safetensors")


@pytest.mark.slow
def test_a_killed_process_resumes_bit_exactly(tmp_path: Path) -> None:
    run = [sys.executable, *script(tmp_path, "gpt2")]
    step = random.randrange(1, 13)
    subprocess.run([*run, str(tmp_path / "whole"), "2", "0"], check=True)
    killed = subprocess.run([*run, str(tmp_path / "killed"), "2", str(step)], check=False)
    assert killed.returncode == -signal.SIGKILL
    subprocess.run([*run, str(tmp_path / "killed"), "2", "0"], check=True)
    whole, resumed = tensors(tmp_path / "whole"), tensors(tmp_path / "killed")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole), f"killed in step {step}"
    logs = [TrainingLog.read(tmp_path / name / "log.json") for name in ("whole", "killed")]
    assert logs[0] == logs[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "shard", [pytest.param([], id="whole"), pytest.param(["shard"], id="sharded", marks=pytest.mark.exhaustive)]
)
def test_two_processes_train_as_one_does_on_the_same_batches(
    shard: list[str], in_two_processes: Callable[..., Any], tmp_path: Path
) -> None:
    run = script(tmp_path, "llama")

    def two(name: str, kill: int) -> int:
        return in_two_processes(*run, tmp_path / name, 2, kill, *shard).returncode

    assert two("two", 0) == 0
    subprocess.run([sys.executable, *run, str(tmp_path / "one"), "4", "0"], check=True)
    one, both = (TrainingLog.read(tmp_path / name / "log.json") for name in ("one", "two"))
    for ours, theirs in ((one.train, both.train), (one.held_out, both.held_out)):
        assert [point.loss for point in theirs] == pytest.approx([point.loss for point in ours], abs=1e-4)
    theirs = tensors(tmp_path / "one")
    for name, ours in tensors(tmp_path / "two").items():
        torch.testing.assert_close(ours, theirs[name], atol=1e-4, rtol=0)

    assert two("killed", 18) != 0
    assert two("killed", 0) == 0
    before, after = tensors(tmp_path / "two"), tensors(tmp_path / "killed")
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_sharding_needs_several_processes(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="accelerate launch"):
        fit(nano("llama"), SAMPLES, response_loss, out=tmp_path, shard=True, **RUN)
    with pytest.raises(TrainingError, match="Hook needs whole parameters"):
        fit(nano("llama"), SAMPLES, response_loss, out=tmp_path, shard=True, hooks=[Hook()], **RUN)
