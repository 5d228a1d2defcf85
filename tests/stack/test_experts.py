"""Experts without an entry in the table: found where a layer calls them, and only if a token needs no others."""

from __future__ import annotations

import pytest
import torch

from lamella.stack import ARCHITECTURES, Experts, Stack, find_architecture
from lamella.stack.experts import find_experts
from lamella.zoo.nano import nano
from lamella.zoo.small import small

FOUND = {  # small models have 4 experts, of which a token uses 2
    "mixtral": Experts("mlp.gate", "mlp.experts", 4, 2),
    "gpt_oss": Experts("mlp.router", "mlp.experts", 4, 2),
    "deepseek_v3": Experts("mlp.gate", "mlp.experts", 4, 2),  # with shared experts, after a dense layer
}


@pytest.mark.parametrize("model_type", FOUND)
def test_experts_of_the_form_of_transformers_5_are_found(model_type: str) -> None:
    assert Stack(small(model_type)).experts == FOUND[model_type]


@pytest.mark.parametrize("model_type", FOUND)
def test_a_token_reads_its_own_experts_and_no_others(model_type: str) -> None:
    """Independent check: with random weights in all other experts, the layer's output for the token is the same."""
    stack = Stack(small(model_type))
    experts, layer = stack.experts, stack.layers[-1]
    context = stack.context(ids := torch.tensor([[7]]))
    router, chosen = layer.get_submodule(experts.router), []
    hook = router.register_forward_hook(lambda _, args, out: chosen.extend(out[-1].flatten().tolist()))
    before = stack.architecture["mlp"].run(layer, context.h, context.calls[-1])
    hook.remove()
    assert len(set(chosen)) == experts.used and ids.numel() == 1
    with torch.no_grad():
        for parameter in layer.get_submodule(experts.experts).parameters():
            parameter[[each for each in range(experts.count) if each not in chosen]] = torch.nan
    after = stack.architecture["mlp"].run(layer, context.h, context.calls[-1])
    assert torch.equal(after, before)


def test_an_entry_says_its_own_and_a_type_without_experts_has_none() -> None:
    assert Stack(nano("qwen3_moe")).experts == ARCHITECTURES["qwen3_moe"].experts
    assert Stack(small("granite")).experts is None
    assert Stack(small("llama4_text")).experts is None  # it computes all of them


def test_experts_that_read_the_others_are_not_found() -> None:
    model = small("mixtral")
    assert find_architecture(model.config).experts is None
    experts = model.model.layers[3].mlp.experts
    own = type(experts)

    class Mixing(own):  # type: ignore[misc, valid-type]
        def forward(self, *args: torch.Tensor) -> torch.Tensor:
            return own.forward(self, *args) + self.down_proj.mean()

    experts.__class__ = Mixing
    assert Stack(model).experts is None
    experts.__class__ = own
    assert Stack(model).experts == FOUND["mixtral"]


def test_experts_are_found_wherever_their_weights_begin_in_memory() -> None:
    """As in a checkpoint that is mapped into memory, where a tensor may begin at any byte."""
    model = nano("qwen3_moe", hidden_size=96, moe_intermediate_size=64)
    for layer in model.model.layers:
        for parameter in layer.mlp.experts.parameters():
            memory = torch.empty(parameter.numel() + 1)
            parameter.data = memory[1:].view_as(parameter).copy_(parameter)
    assert find_experts(Stack(model)) == Experts("mlp.gate", "mlp.experts", 4, 2)
