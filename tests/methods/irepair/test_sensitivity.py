"""Sensitivity: which layer a loss pulls at, against sums by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lamella.errors import CalibrationError, NumericsError
from lamella.methods.irepair import gradients_of, layer_parameters, next_token_loss, norms_of, sensitivity
from lamella.stack import Stack
from lamella.zoo.nano import nano

IDS = torch.randint(3, 128, (6, 12), generator=torch.Generator().manual_seed(1))
FAMILIES = ["llama", "gpt2", "gpt_neox", "opt", "qwen3_moe", "gemma3_text"]


def by_hand(model: torch.nn.Module, prefix: str, layers: int, batches: list[Tensor]) -> list[Tensor]:
    """Of each batch the norms of all layers, added up parameter by parameter from names alone."""
    rows = []
    for batch in batches:
        model.zero_grad()
        logits = model(batch).logits[:, :-1]
        torch.nn.functional.cross_entropy(logits.reshape(-1, 128), batch[:, 1:].reshape(-1)).backward()
        squares = [0.0] * layers
        for name, parameter in model.named_parameters():
            if name.startswith(prefix) and parameter.grad is not None:
                squares[int(name[len(prefix) :].split(".")[0])] += parameter.grad.double().pow(2).sum().item()
        rows.append(torch.tensor(squares, dtype=torch.float64).sqrt())
    model.zero_grad()
    return rows


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_norm_of_each_layer_s_gradient_summed_by_hand(family: str) -> None:
    stack = Stack(nano(family))
    batches = list(IDS.split(2))
    expected = torch.stack(by_hand(stack.model, stack.architecture.prefix, 4, batches)).mean(0)
    measured = torch.from_numpy(sensitivity(stack, batches).values)
    torch.testing.assert_close(measured, expected, rtol=1e-6, atol=1e-9)
    assert all(each.grad is None for each in stack.model.parameters())


def test_the_order_in_a_batch_and_of_batches_does_not_matter() -> None:
    stack = Stack(nano("llama"))
    plain = sensitivity(stack, [IDS]).values
    assert sensitivity(stack, [IDS.flip(0)]).values == pytest.approx(plain, rel=1e-5)
    assert sensitivity(stack, IDS.flip(0).split(3)).values == pytest.approx(
        sensitivity(stack, [IDS[3:], IDS[:3]]).values, rel=1e-5
    )


def test_averaged_gradients_let_what_differs_cancel() -> None:
    stack = Stack(nano("llama"))
    together = sensitivity(stack, [IDS]).values
    assert sensitivity(stack, IDS.split(2), average="gradients").values == pytest.approx(together, rel=1e-5)
    assert (sensitivity(stack, IDS.split(2)).values > together).all()


def test_per_parameter_divides_by_the_root_of_the_size() -> None:
    stack = Stack(nano("gpt2"))
    sizes = [math.sqrt(sum(p.numel() for p in layer.parameters())) for layer in stack.layers]
    plain = sensitivity(stack, [IDS]).values
    assert sensitivity(stack, [IDS], per_parameter=True).values == pytest.approx(plain / sizes, rel=1e-9)


def test_embeddings_norms_and_heads_belong_to_no_layer() -> None:
    for family in FAMILIES:
        stack = Stack(nano(family))
        names = {name for group in layer_parameters(stack) for name in group}
        others = {name for name, _ in stack.model.named_parameters()} - names
        assert len(layer_parameters(stack)) == 4 and others
        assert not any(f".{number}." in name for name in others for number in range(4))


def test_a_frozen_model_and_a_call_without_gradients_are_measured_too() -> None:
    stack = Stack(nano("llama"))
    expected = sensitivity(stack, [IDS]).values
    stack.model.requires_grad_(False)
    with torch.no_grad():
        assert (sensitivity(stack, [IDS]).values == expected).all()
    assert not any(each.requires_grad for each in stack.model.parameters())


def test_a_group_that_the_loss_does_not_depend_on_has_none() -> None:
    stack = Stack(nano("llama"))
    loss = next_token_loss(stack.model, IDS)
    apart = {"x": torch.nn.Parameter(torch.ones(3))}
    groups = [*layer_parameters(stack), apart]
    norms = norms_of(gradients_of(loss, groups), groups)
    assert norms[-1] == 0 and (norms[:-1] > 0).all()


def test_what_cannot_be_measured_is_refused_in_one_line() -> None:
    stack = Stack(nano("llama"))
    with pytest.raises(CalibrationError, match="at least one batch"):
        sensitivity(stack, [])
    with pytest.raises(CalibrationError, match="choose norms or gradients"):
        sensitivity(stack, [IDS], average="sums")  # type: ignore[arg-type]
    with torch.no_grad():
        stack.layers[2].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(NumericsError, match=r"non-finite gradient at layers\.\d") as error:
        sensitivity(stack, [IDS])
    assert "\n" not in str(error.value)
