"""SwitchLoRA as a method: what trains, what comes out, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lamella import processes
from lamella.errors import MethodError, TrainingError
from lamella.files import Work
from lamella.methods.switchlora import ExchangeFrequency, SwitchHook, per_vector, switchlora
from lamella.plan import ModelReference, PhasedPath, Plan
from lamella.runtime import apply
from lamella.stack import Stack, share
from lamella.train import Task, TrainConfig, add_lora, blocks, fit, own, response_loss
from lamella.zoo.nano import nano

SAMPLES = blocks(torch.randint(3, 100, (24, 12), generator=torch.Generator().manual_seed(0)), loss_on="all")
CONFIG = TrainConfig(steps=24, lr=2e-2, batch=4)
OFTEN = ExchangeFrequency(interval=10, descent=1.0)


def test_what_comes_out_is_dense_and_its_update_has_more_directions_than_the_rank(tmp_path: Path) -> None:
    stack = Stack(nano("llama"))
    before = {name: each.clone() for name, each in stack.model.named_parameters()}
    result = switchlora(stack, SAMPLES, config=CONFIG, r=4, frequency=OFTEN, work=Work(tmp_path))
    assert all(torch.equal(each, before[name]) for name, each in stack.model.named_parameters())
    assert type(result.stack.model) is type(stack.model)
    assert {name for name, _ in result.stack.model.named_parameters()} == set(before)
    assert all(not torch.equal(each, before[name]) for name, each in result.stack.model.named_parameters())
    assert result.log.train[-1].loss < result.log.train[0].loss
    ranks = [each["rank"] for each in result.findings["updates"].values()]
    assert len(ranks) == 28 and min(ranks) > 4
    assert len(result.findings["spectrum"]) == 33 and result.findings["spectrum"][0] == 1


def test_with_no_exchange_it_is_lora_from_the_same_start_bitwise(tmp_path: Path) -> None:
    found = []
    for switches in (True, False):
        view = share(nano("llama"))
        lora = add_lora(view, 4, alpha=1)
        own(view, lambda name: ".base_layer." in name)
        hook = SwitchHook(lora, ExchangeFrequency(interval=float("inf")), CONFIG.steps or 0, seed=0)
        fit(view, SAMPLES, Task(response_loss), CONFIG, out=tmp_path / str(switches), trainable=lora.trains,
            optimizer=per_vector(1.0), hooks=[hook] if switches else [])  # fmt: skip
        found.append(dict(view.named_parameters()))
    assert all(torch.equal(each, found[1][name]) for name, each in found[0].items())


def test_what_is_not_adapted_stays_where_its_rate_is_0(tmp_path: Path) -> None:
    stack = Stack(nano("llama"))
    result = switchlora(stack, SAMPLES, config=CONFIG, r=4, rest=0.0, work=Work(tmp_path))
    old = dict(stack.model.named_parameters())
    changed = {name for name, each in result.stack.model.named_parameters() if not torch.equal(each, old[name])}
    assert changed == {f"{name}.weight" for name in result.findings["updates"]}


def test_merged_weights_compute_what_the_adapters_did(tmp_path: Path) -> None:
    view = share(nano("llama"))
    lora = add_lora(view, 4, alpha=1)
    own(view, lambda name: ".base_layer." in name)
    fit(view, SAMPLES, Task(response_loss), CONFIG, out=tmp_path, trainable=lora.trains, optimizer=per_vector(1.0),
        hooks=[SwitchHook(lora, OFTEN, CONFIG.steps or 0, seed=0)])  # fmt: skip
    ids = SAMPLES[0]["input_ids"][None]
    with torch.no_grad():
        before = view(ids).logits
        lora.merge()
        assert (view(ids).logits - before).abs().max() < 1e-5
        lora.remove()
        assert (view(ids).logits - before).abs().max() < 1e-5


def test_one_pass_is_one_pass_of_all_processes_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "count", lambda: 2)
    passing = replace(CONFIG, steps=None)
    log = switchlora(Stack(nano("llama")), SAMPLES, config=passing, r=4, work=Work(tmp_path)).log
    assert log.train[-1].step == len(SAMPLES) // (2 * 4)


def test_another_rate_of_what_trains_whole_is_another_run(tmp_path: Path) -> None:
    stack = Stack(nano("llama"))
    switchlora(stack, SAMPLES, config=CONFIG, r=4, rest=0.05, work=Work(tmp_path))
    with pytest.raises(TrainingError, match=r"rest 0\.05, not 1\.0"):
        switchlora(stack, SAMPLES, config=CONFIG, r=4, rest=1.0, work=Work(tmp_path))


def test_a_cut_model_is_trained_as_it_runs(tmp_path: Path) -> None:
    stack = Stack(nano("llama"))
    plan = Plan(model=ModelReference.of(stack), drop=["layers.1"])
    result = switchlora(stack, SAMPLES, plan, config=CONFIG, r=4, work=Work(tmp_path))
    assert not any(".layers.1." in name for name in result.findings["updates"])
    ids = SAMPLES[0]["input_ids"][None]
    with torch.no_grad():
        apart = apply(result.stack, plan)(ids).logits - apply(stack, plan)(ids).logits
    assert apart.abs().max() > 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 32}, "r 32: give a rank from 2 to 31"),
        (
            {"config": TrainConfig(lr=1e-2, weight_decay=0.1)},
            "weight decay would change frozen vectors: set weight_decay",
        ),
    ],
)
def test_a_training_that_is_no_switchlora_is_refused(options: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(MethodError, match=message):
        switchlora(Stack(nano("llama")), SAMPLES, **({"config": CONFIG} | options), work=Work(tmp_path))


def test_a_plan_that_repeats_layers_is_refused(tmp_path: Path) -> None:
    stack = Stack(nano("llama"))
    path = [0, 1, 1, 2, 3]
    plan = Plan(model=ModelReference.of(stack), path={stack.stack: PhasedPath(prefill=path, decode=path)})
    with pytest.raises(MethodError, match="give a plan that only removes"):
        switchlora(stack, SAMPLES, plan, config=CONFIG, work=Work(tmp_path))
