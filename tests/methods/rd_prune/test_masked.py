"""Masked weights stay zero, whatever the optimizer does with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lamella.methods.rd_prune import MaskHook
from lamella.train import Task, TrainConfig, blocks, fit, response_loss
from lamella.zoo.nano import nano

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "nesterov with decay": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.5),
    "adam": lambda p: torch.optim.Adam(p, lr=0.05, weight_decay=0.5),
}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_neither_momentum_nor_decay_revives_a_weight(optimizer: str) -> None:
    model = net()
    inputs, targets = torch.randn(16, 1, 4, 4), torch.arange(16) % 3
    steps = OPTIMIZERS[optimizer](model.parameters())

    def step() -> float:
        loss = nn.functional.cross_entropy(model(inputs), targets)
        steps.zero_grad()
        loss.backward()
        steps.step()
        return float(loss.detach())

    step()  # so that there is a momentum when the masks come
    masks = {name: torch.rand(model.get_parameter(name).shape) > 0.5 for name in ("0.weight", "3.weight")}
    before = {name: model.get_parameter(name).detach().clone() for name in masks}
    hold = MaskHook(model, masks).apply
    for name, keep in masks.items():
        assert torch.equal(model.get_parameter(name), before[name] * keep)
    losses = []
    for _ in range(20):
        losses.append(step())
        assert any((model.get_parameter(name)[~keep] != 0).any() for name, keep in masks.items())  # it would
        hold()
        assert all(not model.get_parameter(name)[~keep].any() for name, keep in masks.items())
    assert losses[-1] < losses[0]


def test_fit_holds_them_in_its_checkpoints_too_and_resumes_bitwise(tmp_path: Path) -> None:
    samples = blocks(torch.randint(3, 128, (6, 12), generator=torch.Generator().manual_seed(0)), (2, 8))
    name = "model.layers.1.mlp.up_proj.weight"
    keep = torch.rand(nano("llama").get_parameter(name).shape, generator=torch.Generator().manual_seed(1)) > 0.5

    def trained(folder: Path, stop: int | None = None) -> Tensor:
        model = nano("llama")
        calls = 0

        def loss(given: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            nonlocal calls
            calls += 1
            if calls == stop:
                raise KeyboardInterrupt
            assert not given.get_parameter(name)[~keep].any()  # in every forward pass
            return response_loss(given, batch)

        loss.__qualname__ = "loss"
        config = TrainConfig(steps=6, lr=3e-3, batch=2, save_every=2, weight_decay=0.1)
        fit(model, samples, Task(loss), config, out=folder, hooks=[MaskHook(model, {name: keep})])
        return model.get_parameter(name).detach()

    whole = trained(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut", stop=4)
    (checkpoint,) = (tmp_path / "cut").glob("checkpoint-*")
    assert not load_file(checkpoint / "trained.safetensors")[name][~keep].any()
    assert torch.equal(trained(tmp_path / "cut"), whole)
