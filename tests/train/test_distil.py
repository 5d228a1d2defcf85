"""Distillation: trained and frozen parameters, adapters, views, precision, and the training time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lamella.plan import ModelReference, Plan
from lamella.runtime import apply
from lamella.stack import Stack
from lamella.train import Task, TooLittleTime, TrainConfig, blocks, distil, distillation_loss, pace
from lamella.zoo.nano import nano

TOKENS = torch.randint(3, 128, (16, 24), generator=torch.Generator().manual_seed(0))
SAMPLES = blocks(TOKENS, loss_on="all")
CONFIG = TrainConfig(steps=12, lr=3e-3, batch=8, log_every=1)


def opened(name: str = "llama") -> Stack:
    return Stack(nano(name))


def plan_of(stack: Stack, drop: str) -> Plan:
    return Plan(model=ModelReference.of(stack), drop=[drop])


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: each.detach().clone() for name, each in model.named_parameters(remove_duplicate=False)}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("drop", ["layers.1", "layers.1.attn"])
@pytest.mark.parametrize("lora", [None, 4])
def test_the_vocabulary_stays_and_the_rest_learns(name: str, drop: str, lora: int | None, tmp_path: Path) -> None:
    stack = opened(name)
    before, plan = weights(stack.model), plan_of(stack, drop)
    healed = distil(stack, plan, SAMPLES, config=CONFIG, vocabulary=False, lora=lora, out=tmp_path / "run")
    assert all(torch.equal(each, before[key]) for key, each in weights(stack.model).items())  # the original's own
    after = healed.stack
    assert torch.equal(after.unembedding.weight, stack.unembedding.weight)
    assert not torch.equal(after.layers[0].get_submodule("mlp").state_dict()[first(after)], first_weight(stack))
    assert healed.log.train[-1].loss < healed.log.train[0].loss
    whole = drop == "layers.1"
    assert len(after) == len(stack) - whole and (healed.plan.drop == []) == whole
    assert not any("lora" in key for key in weights(after.model))
    with torch.no_grad():  # what was healed runs under the plan that came with it, and is closer to the original
        inputs = TOKENS[:4]
        ours, cut = (apply(s, p)(inputs).logits.log_softmax(-1) for s, p in ((after, healed.plan), (stack, plan)))
        target = stack.model(inputs).logits.log_softmax(-1)
        kl = [float((target.exp() * (target - each)).sum(-1).mean()) for each in (ours, cut)]
    assert kl[0] < kl[1]


def first(stack: Stack) -> str:
    return next(iter(stack.layers[0].get_submodule("mlp").state_dict()))


def first_weight(stack: Stack) -> torch.Tensor:
    return stack.layers[0].get_submodule("mlp").state_dict()[first(stack)]


def test_bfloat16_computes_and_float32_keeps(tmp_path: Path) -> None:
    stack = opened()
    config = TrainConfig(steps=12, lr=3e-3, batch=8, log_every=1, bf16=True)
    healed = distil(stack, plan_of(stack, "layers.1"), SAMPLES, config=config, vocabulary=False, out=tmp_path / "run")
    exact = distil(stack, plan_of(stack, "layers.1"), SAMPLES, config=CONFIG, vocabulary=False, out=tmp_path / "exact")
    assert all(each.dtype == torch.float32 for each in healed.stack.model.parameters())
    ends = [each.log.train[-1].loss for each in (healed, exact)]
    assert ends[0] == pytest.approx(ends[1], rel=0.05) and ends[0] != ends[1]


def test_a_time_becomes_steps_and_stays_the_same_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    taken = iter([9.0, 0.5, 0.25])  # the first warms up
    monkeypatch.setattr(pace, "_step", lambda *_: next(taken))
    stack = opened()
    given = (stack.model, SAMPLES, Task(lambda *_: torch.tensor(0.0)), CONFIG)
    assert pace.config_for_time(*given, 10.0, out=tmp_path / "run").steps == 40
    assert pace.config_for_time(*given, 10.0, out=tmp_path / "run").steps == 40  # nothing is measured again


def test_a_step_is_measured_without_a_trace(tmp_path: Path) -> None:
    stack, teacher = opened(), opened()
    before = weights(stack.model)
    task = Task(lambda model, batch: distillation_loss(model, batch, teacher=teacher.model))
    config = pace.config_for_time(
        stack.model, SAMPLES, task, CONFIG, 60.0, trainable=lambda name: True, out=tmp_path / "run"
    )
    assert config.steps is not None and config.steps > 8
    assert all(torch.equal(each, before[key]) for key, each in weights(stack.model).items())
    assert all(each.grad is None for each in stack.model.parameters())


def test_a_time_for_no_steps_is_refused(tmp_path: Path) -> None:
    stack = opened()
    with pytest.raises(TooLittleTime, match="fewer than the 8 needed"):
        distil(stack, plan_of(stack, "layers.1"), SAMPLES, config=CONFIG, minutes=1e-8, out=tmp_path / "run")
