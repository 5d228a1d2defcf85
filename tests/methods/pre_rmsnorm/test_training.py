"""Training, and turning the stream: what the trainable form promises, and what only an RMSNorm model allows."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from pre_ln import FAMILIES, built, error, inputs, written
from torch import nn

from lamella.errors import MethodError
from lamella.methods.pre_rmsnorm import pre_ln_state, rotate, trainable
from lamella.methods.pre_rmsnorm.rewrite import Form, RMSNorm, find_branches
from lamella.plan.rewriting import wirings_of
from lamella.stack import open_model, share

FOLDED = Form(fold="affine", tied="untie")


def losses(model: Any, steps: int, decay: float) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=decay)
    found = []
    with torch.enable_grad():
        for _ in range(steps):
            ids = torch.randint(3, 120, (4, 16), generator=generator)
            logits = model(input_ids=ids).logits  # whose own loss would be one in float32
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(float(loss.detach()))
    return found


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "beit"])
def test_the_trainable_form_computes_the_same_with_the_same_parameters(name: str) -> None:
    model, given = built(name, offset=30.0), inputs(name)
    ours = trainable(model)
    assert error(model.model, ours, given) < 1e-9
    state, own = pre_ln_state(ours), model.model.state_dict()
    assert state.keys() == own.keys() and all(torch.equal(each, own[key]) for key, each in state.items())
    assert not {id(each) for each in ours.parameters()} & {id(each) for each in model.model.parameters()}


def test_a_vector_that_scales_without_a_module_cannot_be_trained() -> None:
    with pytest.raises(MethodError, match=r"beit\.layers\.0\.lambda_1 scales a branch without a module of its own"):
        trainable(built("beit"))


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("name", ["gpt2", "gpt_neox"])
def test_training_it_is_training_the_pre_ln_model(name: str, decay: float) -> None:
    settings = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if name == "gpt2" else {}
    model = built(name, **settings)
    ours, once = trainable(model), copy.deepcopy(written(model, Form()))  # recentred once, with tensors of its own
    expected, found, left = (losses(each, 50, decay) for each in (model.model, ours, once))
    assert max(abs(a - b) for a, b in zip(expected, found, strict=True)) <= 1e-8
    own = model.model.state_dict()
    assert all(torch.allclose(each, own[key], atol=1e-8) for key, each in pre_ln_state(ours).items())
    assert abs(expected[0] - left[0]) <= 1e-10
    assert max(abs(a - b) for a, b in zip(expected, left, strict=True)) > 1e-5


def test_dropout_on_branches_makes_another_model_of_it_while_training_alone() -> None:
    model, given = built("gpt2", resid_pdrop=0.1, embd_pdrop=0.0, attn_pdrop=0.0), inputs("gpt2")
    ours = trainable(model)
    assert error(model.model, ours, given) < 1e-10
    torch.manual_seed(0)
    expected = model.model.train()(**given).logits
    torch.manual_seed(0)
    found = ours.train()(**given).logits
    assert float((expected - found).detach().abs().max()) > 1e-3


def test_branches_that_are_dropped_at_random_make_no_other_model_of_it() -> None:
    model, given = built("dinov2", drop_path_rate=0.5), inputs("dinov2")
    ours, outputs = trainable(model), []
    for each in (model.model.train(), ours.train()):
        torch.manual_seed(0)
        outputs.append(each(**given).last_hidden_state)
    assert torch.allclose(*outputs, atol=1e-10)
    with torch.no_grad():
        assert not torch.allclose(outputs[0], model.model.eval()(**given).last_hidden_state, atol=1e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_residual_stream_of_an_rms_model_can_be_turned_and_that_of_a_pre_ln_model_cannot(name: str) -> None:
    model, given = built(name), inputs(name)
    turned, _ = torch.linalg.qr(torch.randn(32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    rms = open_model(written(model, FOLDED))
    assert error(model.model, rotate(rms, turned), given) < 1e-9
    layers = centring(rms)
    assert error(model.model, layers.model, given) < 1e-9  # a LayerNorm is right as well, where there is no mean
    assert error(model.model, rotate(layers, turned, nn.LayerNorm), given) > 1e-3


def centring(model: Any) -> Any:
    """The model with LayerNorms again."""
    view = share(model.model)
    for branch in find_branches(view, wirings_of(model.architectures), RMSNorm):
        for norm in branch.norms:
            layer = nn.LayerNorm(norm.module.normalized_shape, eps=norm.module.eps, elementwise_affine=False)
            layer.weight, layer.bias = norm.module.weight, norm.module.bias  # none, but where nothing reads it
            view.set_submodule(norm.path, layer)
    return open_model(view)


def test_a_residual_stream_whose_norms_have_gains_is_not_turned() -> None:
    rms = open_model(written(built("gpt2"), Form()))
    with pytest.raises(MethodError, match=r"transformer.h.0.ln_1 has a gain or a bias.*fold the affine first"):
        rotate(rms, torch.eye(32, dtype=torch.float64))
