"""Attention weights of a single layer, compared with those of a fully eager model."""

from __future__ import annotations

import pytest
import torch

from lamella.errors import ArchitectureError
from lamella.stack import Stack, attend_with_weights, join, norm_before
from lamella.zoo.nano import nano
from lamella.zoo.small import small

IDS = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, :4] = 0


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2", "gpt_neox", "opt", "phi3", "cohere"])
@torch.no_grad()
def test_they_are_those_of_an_eager_model(name: str, padded: bool) -> None:
    model = (small if name in ("phi3", "cohere") else nano)(name)
    stack = Stack(model)
    given = {"input_ids": IDS} | ({"attention_mask": MASK} if padded else {})
    context = stack.context(given)
    assert stack.config._attn_implementation == "sdpa"
    h, found, streams = context.h, [], []
    for index, layer in enumerate(stack.layers):
        attn = stack.architecture["attn"]
        after, weights = attend_with_weights(attn, layer, h, context.calls[index], stack.architecture.causal)
        streams.append((join(after), join(attn.run(layer, h, context.calls[index]))))
        found.append(weights)
        h = stack.run(h, index, index + 1, context)
    assert stack.config._attn_implementation == "sdpa"  # of the model, which is not changed
    model.set_attn_implementation("eager")
    expected = model(**given, output_attentions=True).attentions
    real = MASK.bool() if padded else torch.ones_like(IDS, dtype=torch.bool)
    for weights, wanted, (one, other) in zip(found, expected, streams, strict=True):
        assert weights.shape == wanted.shape
        torch.testing.assert_close(weights.transpose(1, 2)[real], wanted.transpose(1, 2)[real], rtol=0, atol=5e-6)
        torch.testing.assert_close(one[real], other[real], rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("name", "attn", "mlp"),
    [
        ("llama", "input_layernorm", "post_attention_layernorm"),
        ("gemma3_text", "input_layernorm", "pre_feedforward_layernorm"),
        ("gpt2", "ln_1", "ln_2"),
        ("gpt_neox", "input_layernorm", "post_attention_layernorm"),
    ],
)
def test_the_norm_before_a_sublayer_is_found_by_running_it(name: str, attn: str, mlp: str) -> None:
    stack = Stack(nano(name))
    assert (norm_before(stack, 1), norm_before(stack, 1, "mlp")) == (attn, mlp)
    assert not any(module._forward_hooks for module in stack.model.modules())


def test_a_sublayer_that_reads_the_residual_stream_itself_is_refused() -> None:
    with pytest.raises(ArchitectureError, match="without a norm"):
        norm_before(Stack(nano("opt_post_norm")), 1)
