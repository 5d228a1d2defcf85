"""ARank against ranks by hand."""

from __future__ import annotations

import numpy as np
import torch

from lamella.methods.gamma_mod.arank import attention_ranks, lowest, rank_of
from lamella.stack import Stack
from lamella.zoo.nano import nano


@torch.no_grad()
def test_it_is_the_rank_of_what_an_eager_model_hands_out() -> None:
    model = nano("llama")
    stack = Stack(model)
    samples = [
        {"input_ids": torch.randint(3, 128, (1, 20), generator=torch.Generator().manual_seed(s))} for s in (0, 1)
    ]
    found = attention_ranks(stack, samples)
    model.set_attn_implementation("eager")
    for row, given in zip(found, samples, strict=True):
        for value, weights in zip(row, model(**given, output_attentions=True).attentions, strict=True):
            ranks = [np.linalg.matrix_rank(np.tril(head.numpy(), -1)) for head in weights[0]]
            assert float(value) == np.mean(ranks, dtype=np.float32) / np.float32(19)


def test_a_sink_has_rank_one_and_uniform_attention_the_highest() -> None:
    time = 12
    sink = torch.zeros(1, time, time)
    sink[..., 0] = 1
    uniform = torch.ones(time, time).tril() / torch.arange(1, time + 1)[:, None]
    assert rank_of(sink).tolist() == [1.0]
    assert rank_of(uniform[None]).tolist() == [time - 1.0]
    assert abs(float(rank_of(sink, "effective")) - 1) < 1e-5


def test_the_lowest_are_converted_but_for_the_protected() -> None:
    ranks = torch.tensor([0.1, 0.9, 0.5, 0.2, 0.3])
    assert lowest(ranks, 0.6) == [0, 3, 4]
    assert lowest(ranks, 0.6, protect=[0, -1]) == [1, 2, 3]
