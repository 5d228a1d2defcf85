"""Training a view never changes the model with which it shares tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lamella.errors import TrainingError
from lamella.plan import ModelReference, PhasedPath, Plan
from lamella.runtime import apply
from lamella.stack import Stack, share
from lamella.train import Task, TrainConfig, blocks, choose, fit, own, response_loss
from lamella.zoo.nano import nano

SAMPLES = blocks(torch.randint(3, 128, (8, 12), generator=torch.Generator().manual_seed(0)), 4)


def not_embedding(name: str) -> bool:
    return "embed_tokens" not in name


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: each.detach().clone() for name, each in model.named_parameters()}


@pytest.mark.parametrize("tied", [False, True])
def test_training_a_view_leaves_the_original_as_it_was(tied: bool, tmp_path: Path) -> None:
    model = nano("llama", tie_word_embeddings=tied)
    stack = Stack(model)
    view = apply(stack, Plan(model=ModelReference.of(stack), drop=["layers.1.mlp"]))
    before = values(model)
    flags = [each.requires_grad for each in model.parameters()]
    names = own(view, not_embedding)
    fit(view, SAMPLES, Task(response_loss), TrainConfig(steps=3, lr=1e-2), out=tmp_path, trainable=not_embedding)
    after = values(view)
    assert all(torch.equal(value, before[name]) for name, value in values(model).items())
    unread = {name for name in after if "layers.1.mlp" in name or "layers.1.post_attention" in name}
    assert {name for name in after if not torch.equal(after[name], before[name])} == set(names) - unread
    assert "model.embed_tokens.weight" not in names and ("lm_head.weight" in names) != tied
    assert [each.requires_grad for each in model.parameters()] == flags
    assert all(each.grad is None for each in model.parameters()) and all(
        each.grad is None for each in view.parameters()
    )
    assert not view.training


def test_only_what_is_owned_stops_being_shared() -> None:
    model = nano("llama")
    view = share(model)
    own(view, lambda name: "layers.2." in name)
    theirs = dict(model.named_parameters())
    for name, parameter in view.named_parameters():
        assert (parameter is theirs[name]) == ("layers.2." not in name)
        assert torch.equal(parameter, theirs[name])


def test_tied_parameters_stay_tied() -> None:
    model = nano("llama", tie_word_embeddings=True)
    view = share(model)
    own(view)
    assert view.lm_head.weight is view.model.embed_tokens.weight
    assert view.lm_head.weight is not model.lm_head.weight


def test_a_layer_that_runs_twice_stays_one_layer() -> None:
    stack, order = Stack(nano("llama")), [0, 1, 1, 2, 3]
    view = apply(stack, Plan(model=ModelReference.of(stack), path={"text": PhasedPath(prefill=order, decode=order)}))
    own(view)
    first, second = view.model.layers[1], view.model.layers[2]
    assert first.mlp.up_proj.weight is second.mlp.up_proj.weight
    assert first.mlp.up_proj.weight is not stack.layers[1].mlp.up_proj.weight


def test_what_is_tied_is_chosen_under_all_its_names_or_not_at_all() -> None:
    model: Any = nano("llama", tie_word_embeddings=True)
    assert set(choose(model, not_embedding)) == {name for name in dict(model.named_parameters()) if not_embedding(name)}
    with pytest.raises(TrainingError, match="no parameter of LlamaForCausalLM is chosen"):
        choose(model, lambda name: name == "lm_head.weight")
    model.requires_grad_(False)
    model.model.norm.requires_grad_(True)
    assert list(choose(model)) == ["model.norm.weight"]
