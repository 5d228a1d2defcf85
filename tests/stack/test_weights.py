"""Weight matrices: weights that are multiplied, once each, and no lookup tables."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lamella.stack import matrices, share
from lamella.zoo.nano import NANO, nano


def test_linear_maps_and_convolutions_are_matrices_and_biases_norms_and_tables_are_not() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3), nn.LayerNorm(3), nn.Embedding(5, 3)
    )
    assert list(matrices(model)) == ["0.weight", "3.weight"]
    assert [matrix.size for matrix in matrices(model).values()] == [18, 24]


@pytest.mark.parametrize("name", NANO)
def test_every_family_has_the_matrices_of_its_layers(name: str) -> None:
    model = nano(name)
    found = matrices(model)
    inside = [n for n, p in model.named_parameters() if p.ndim > 1 and (".layers." in n or ".h." in n)]
    routers = {
        n for n in inside if n.endswith("mlp.gate.weight")
    }  # they route tokens and do not transform hidden states
    assert set(inside) - routers == {n for n in found if ".layers." in n or ".h." in n}
    assert all(found[n].size == dict(model.named_parameters())[n].numel() for n in found)


def test_a_head_that_is_tied_to_the_embedding_is_none_and_one_of_its_own_is() -> None:
    assert "lm_head.weight" in matrices(nano("llama"))
    assert "lm_head.weight" not in matrices(nano("llama", tie_word_embeddings=True))
    assert not any("lm_head" in name for name in matrices(nano("gpt2")))


def test_torch_s_own_attention_is_read() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16)
    assert list(matrices(model)) == [
        "self_attn.in_proj_weight",
        "self_attn.out_proj.weight",
        "linear1.weight",
        "linear2.weight",
    ]


def test_a_matrix_that_two_modules_share_is_one_and_is_replaced_in_both() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    (matrix,) = matrices(model).values()
    copy = share(model)
    matrix.put(copy, torch.zeros(3, 3))
    assert not copy(torch.ones(1, 3)).any() and copy[0].weight is copy[1].weight
    assert model(torch.ones(1, 3)).any() and matrix.of(model) is model[0].weight
