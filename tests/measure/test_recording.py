"""Recorded inputs and outputs of a sublayer, compared with hooks on the model's own forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lamella.measure import record
from lamella.stack import Position, Stack
from lamella.zoo.nano import nano

IDS = torch.randint(3, 128, (3, 12), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, :5] = 0


def test_a_feed_forward_sublayer_is_recorded_as_the_models_own_forward_computes_it() -> None:
    model = nano("llama")
    layer, seen = model.model.layers[1], {}

    def read(module: Any, args: Any, out: Tensor) -> None:
        seen["added"] = out

    def before(module: Any, args: tuple[Tensor, ...]) -> None:
        seen["x"] = args[0]

    hooks = [layer.mlp.register_forward_hook(read), layer.post_attention_layernorm.register_forward_pre_hook(before)]
    with torch.no_grad():
        model(input_ids=IDS, attention_mask=MASK)
    for hook in hooks:
        hook.remove()
    found = record(Stack(model), {"input_ids": IDS, "attention_mask": MASK}, Position(1, "mlp"))
    real = MASK.bool()
    assert found.x.shape == (int(MASK.sum()), 32)
    torch.testing.assert_close(found.x, seen["x"][real], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.y, seen["added"][real], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["gpt_neox", "gemma3_text", "gpt2"])
def test_recorded_outputs_sum_to_the_hidden_states_after_the_layer(name: str) -> None:
    stack = Stack(nano(name))
    found = record(stack, IDS, Position(2, "mlp"))
    streams = []
    with torch.no_grad():
        for row in IDS:
            context = stack.context(row[None])
            streams.append(stack.run(context.h, 0, 3, context)[0])
    torch.testing.assert_close(found.x + found.y, torch.cat(streams), rtol=1e-5, atol=1e-6)
