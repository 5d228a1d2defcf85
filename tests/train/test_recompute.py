"""Gradient checkpointing: the result is bit-exact, and less memory is held; models, views and batch norms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import lamella
from lamella.plan import ModelReference, PhasedPath, Plan
from lamella.runtime import apply
from lamella.stack import share
from lamella.train import Task, TrainConfig, add_lora, blocks, fit, own, response_loss
from lamella.train.recompute import recomputing, repeated_blocks
from lamella.zoo.nano import nano

NANO_LLAMA = Path(__file__).parents[1] / "models" / "nano-llama"
TOKENS = torch.randint(3, 60, (8, 24), generator=torch.Generator().manual_seed(0))
ORDER = [0, 1, 1, 2]


class ConvBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.norm(self.conv(x)).relu())


def convolutional() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(*(ConvBlock() for _ in range(4))), nn.Flatten())


def held(loss: Any) -> int:
    """Return the bytes that a forward pass keeps for the backward pass."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss()
    return sum(kept.values())


def test_blocks_are_found_in_models_of_every_library() -> None:
    import timm
    from torchvision.models import swin_t

    for model, count in (
        (nano("llama"), len(nano("llama").model.layers)),
        (timm.create_model("vit_tiny_patch16_224", depth=3), 3),
        (convolutional(), 4),
    ):
        assert len(repeated_blocks(model)) == count
    assert repeated_blocks(swin_t()) and not repeated_blocks(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))


@pytest.mark.parametrize("name", ["whole", "cut", "repeated", "lora"])
def test_training_ends_at_the_same_weights_to_the_bit(name: str, tmp_path: Path) -> None:
    found = []
    for again in (False, True):
        stack = lamella.open(NANO_LLAMA)
        reference = ModelReference.of(stack)
        plan = {
            "cut": Plan(model=reference, drop=["layers.1.attn", "layers.2"]),
            "repeated": Plan(model=reference, path={"text": PhasedPath(prefill=ORDER, decode=ORDER)}),
        }.get(name, Plan(model=reference))
        view = apply(stack, plan)
        trainable: Any = add_lora(view, r=4, alpha=4, seed=0).trains if name == "lora" else lambda _: True
        own(view, trainable)
        config = TrainConfig(steps=3, lr=1e-2, batch=2, gradient_checkpointing=again)
        task = Task(response_loss)
        log = fit(
            view, blocks(TOKENS, 4), task, config, out=tmp_path / str(again), trainable=trainable or (lambda n: True)
        )
        found.append((view.state_dict(), [point.loss for point in log.train]))
    (plain, losses), (recomputed, others) = found
    assert losses == others
    assert all(torch.equal(recomputed[key], value) for key, value in plain.items())


def test_batch_norms_and_dropout_count_once() -> None:
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    states = []
    for enabled in (False, True):
        model = convolutional().train()
        torch.manual_seed(2)
        with recomputing(model, enabled):
            model(x).square().mean().backward()
        states.append({**model.state_dict(), **{f"{n}.grad": p.grad for n, p in model.named_parameters()}})
        assert all("forward" not in each.__dict__ for each in model.modules())
    assert all(torch.equal(states[1][name], value) for name, value in states[0].items())


def test_a_forward_pass_keeps_less() -> None:
    model = share(nano("llama"))
    with recomputing(model):
        less = held(lambda: model(TOKENS, labels=TOKENS, use_cache=False).loss)
    whole = held(lambda: model(TOKENS, labels=TOKENS, use_cache=False).loss)
    assert less < 0.7 * whole


def test_forward_passes_without_gradients_and_views_are_as_before() -> None:
    stack = lamella.open(NANO_LLAMA)
    view = apply(stack, Plan(model=ModelReference.of(stack), drop=["layers.1.attn"]))
    with torch.no_grad():
        before = view(TOKENS).logits
        with recomputing(view):
            assert torch.equal(view(TOKENS).logits, before)
        assert torch.equal(view(TOKENS).logits, before)
