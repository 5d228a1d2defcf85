"""Optimizers: the groups of the default one, and learning rates of custom groups."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from lamella.errors import TrainingError
from lamella.train import Task, TrainConfig, adamw, blocks, choose, collate, fit, response_loss
from lamella.zoo.nano import nano

TOKENS = torch.randint(3, 128, (10, 12), generator=torch.Generator().manual_seed(0))
SAMPLES = blocks(TOKENS, (2, 8))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "opt", "qwen3_moe", "gemma3_text", "vit"])
def test_the_default_has_the_groups_that_trainer_makes(family: str, tmp_path: Path) -> None:
    model = nano(family)
    arguments = TrainingArguments(
        str(tmp_path), weight_decay=0.3, adam_beta2=0.9, optim="adamw_torch_fused", use_cpu=True
    )
    theirs = Trainer(model, arguments).create_optimizer()
    ours = adamw(model, choose(model), TrainConfig(weight_decay=0.3, betas=(0.9, 0.9)))
    assert type(ours) is torch.optim.AdamW
    for group, expected in zip(ours.param_groups, theirs.param_groups, strict=True):
        assert [id(each) for each in group["params"]] == [id(each) for each in expected["params"]]
        assert {name: group[name] for name in expected if name not in ("params", "lr")} == {
            name: each for name, each in expected.items() if name not in ("params", "lr")
        }
    assert all(group["params"] for group in ours.param_groups)


def test_no_vector_decays_whatever_it_is_called() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.GroupNorm(2, 4), nn.Linear(4, 4)))
    model.register_parameter("scale", nn.Parameter(torch.ones(4)))
    decayed, others = (
        group["params"] for group in adamw(model, choose(model), TrainConfig(weight_decay=0.3)).param_groups
    )
    assert {id(each) for each in decayed} == {id(model[0].weight), id(model[2][1].weight)}
    assert len(decayed) + len(others) == len(list(model.parameters()))


def test_the_fused_step_is_adamw_in_float64() -> None:
    model = nano("llama")
    wide = copy.deepcopy(model).double()
    ours, exact = (adamw(each, choose(each), TrainConfig(weight_decay=0.3)) for each in (model, wide))
    for group in exact.param_groups:
        group["fused"] = False
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        for each, same in zip(model.parameters(), wide.parameters(), strict=True):
            each.grad = torch.randn(each.shape, generator=generator)
            same.grad = each.grad.double()
        for optimizer in (ours, exact):
            for group in optimizer.param_groups:
                group["lr"] = 0.01
            optimizer.step()
    for each, same in zip(model.parameters(), wide.parameters(), strict=True):
        torch.testing.assert_close(each.double(), same, atol=1e-6, rtol=1e-5)


def halves(model: nn.Module, trained: Any, config: TrainConfig) -> torch.optim.Optimizer:
    """Plain gradient descent: norms at a quarter of the rate, all others at the rate."""
    norms = [each for name, each in trained.items() if "norm" in name]
    others = [each for name, each in trained.items() if "norm" not in name]
    return torch.optim.SGD([{"params": norms, "lr": 0.25}, {"params": others}], lr=1.0)


@pytest.mark.parametrize("schedule", ["linear", "rewarm"])
def test_groups_move_at_multiples_of_the_runs_rate(schedule: str, tmp_path: Path) -> None:
    """One step on one batch of descent that nothing clips: what moves is the rate times the gradient."""
    model = nano("llama")
    response_loss(model, collate(SAMPLES)).backward()
    gradients = {name: each.grad.clone() for name, each in model.named_parameters()}
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    model.zero_grad()
    config = TrainConfig(steps=1, lr=0.5, schedule=schedule, warmup=0, batch=10, clip=1e9)
    log = fit(model, SAMPLES, Task(response_loss), config, out=tmp_path, optimizer=halves)
    assert [point.lr for point in log.train] == [pytest.approx(0.125 if schedule == "linear" else 0.0125)]
    rate = 0.5 if schedule == "linear" else 0.05  # a single step of rewarm is its last
    for name, each in model.named_parameters():
        expected = before[name] - rate * (0.25 if "norm" in name else 1.0) * gradients[name]
        torch.testing.assert_close(each.detach(), expected, atol=1e-5, rtol=0)


def test_a_run_with_another_optimizer_is_not_resumed(tmp_path: Path) -> None:
    config = TrainConfig(steps=1, lr=1e-3)
    log = fit(nano("gpt2"), SAMPLES, Task(response_loss), config, out=tmp_path)
    assert "algorithm" not in log.settings
    with pytest.raises(TrainingError, match="algorithm None, not halves"):
        fit(nano("gpt2"), SAMPLES, Task(response_loss), config, out=tmp_path, optimizer=halves)
