"""A trace is the gradient that a real adapter would have, also under a cut, and leaves the model alone."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import Tensor, nn

import lamella
from lamella.errors import ArchitectureError, PlanError
from lamella.methods.tracenas import GradientTraces, cosine, pearson
from lamella.plan import HeadWidth, ModelReference, Plan
from lamella.stack import Stack
from lamella.zoo.nano import nano

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gpt2"]
IDS = torch.randint(3, 128, (4, 12), generator=torch.Generator().manual_seed(0))
RANK, ALPHA = 4, 16.0


def opened(name: str, **overrides: Any) -> Stack:
    return Stack(nano(name, **overrides))


def cut_of(stack: Stack, keys_too: bool = False) -> Plan:
    """Layer 2 goes, layer 0 loses heads, layers 1 and 3 channels."""
    config = stack.config
    heads, kv_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", config.num_attention_heads)
    size = heads // kv_heads
    kept = list(range(1, heads)) if size == 1 else list(range(0, heads, size))
    width: dict[str, Any] = {
        "layers.0.attn.heads": HeadWidth(keep=kept, kv_of=[head // size for head in kept]),
        "layers.1.mlp.channels": [0, 3, 4, 9],
        "layers.3.mlp.channels": [1, 2],
    }
    return Plan(model=ModelReference.of(stack), drop=["layers.2"], width=width)


def masked_weights(stack: Stack, plan: Plan) -> Any:
    """The same cut as a copy of the model with zeroed weights, which is what the paper evaluates."""
    model = copy.deepcopy(stack.model)
    config = stack.config
    shared = getattr(config, "num_key_value_heads", None) not in (None, config.num_attention_heads)
    layers = Stack(model).layers
    fused = stack.architecture.name == "gpt2"

    def rows(module: Any, kept: Tensor) -> None:
        weight = module.weight.data.T if fused else module.weight.data
        weight[~kept] = 0
        if module.bias is not None:
            module.bias.data[~kept] = 0

    def columns(module: Any, kept: Tensor) -> None:
        (module.weight.data.T if fused else module.weight.data)[:, ~kept] = 0

    for layer, heads in plan.widths.heads.items():
        attention = layers[layer].attn if fused else layers[layer].self_attn
        size = attention.head_dim
        kept = torch.zeros(config.num_attention_heads, dtype=torch.bool)
        kept[heads.keep] = True
        kept = kept.repeat_interleave(size)
        if fused:
            rows(attention.c_attn, kept.repeat(3))
            columns(attention.c_proj, kept)
        else:
            for module in [attention.q_proj] if shared else [attention.q_proj, attention.k_proj, attention.v_proj]:
                rows(module, kept)
            columns(attention.o_proj, kept)
    for layer, channels in plan.widths.channels.items():
        mlp = layers[layer].mlp
        into, out = ([mlp.c_fc], mlp.c_proj) if fused else ([mlp.gate_proj, mlp.up_proj], mlp.down_proj)
        kept = torch.zeros(out.weight.shape[0 if fused else 1], dtype=torch.bool)
        kept[list(channels)] = True
        for module in into:
            rows(module, kept)
        columns(out, kept)
    return model


def weight_gradients(model: Any, dropped: list[int]) -> tuple[dict[str, Tensor], float]:
    """dL/dW of every matrix in the layers, by autograd on ordinary parameters."""
    stack = Stack(model)
    total = 0.0
    for ids in IDS.split(2):
        context = stack.context(ids)
        order = [layer for layer in range(len(stack)) if layer not in dropped]
        logits = stack.head(stack.execute(context, order))
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()) / 2
        loss.backward()
        total += float(loss)
    names = [name for name, _ in model.named_parameters() if name.startswith(stack.architecture.prefix)]
    return {name: model.get_parameter(name).grad for name in names}, total


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_trace_is_the_gradient_of_the_adapters(name: str, cut: bool) -> None:
    """s (dL/dW) A^T by autograd on masked weights, sublayer by sublayer."""
    stack = opened(name)
    traces = GradientTraces(stack, IDS, rank=RANK, alpha=ALPHA, batch=2)
    plan = cut_of(stack)
    found = traces.of(plan) if cut else traces.base
    model = masked_weights(stack, plan) if cut else copy.deepcopy(stack.model)
    gradients, loss = weight_gradients(model, [2] if cut else [])
    assert found.loss == pytest.approx(loss, abs=1e-5)
    assert sorted(found.sublayers) == [each for each in stack.positions if not cut or each.layer != 2]
    for position, trace in found.sublayers.items():
        expected = []
        for projection in traces.projections[position]:
            weight = f"{stack.architecture.prefix}{position.layer}.{projection.part.path}.weight"
            gradient = gradients[weight].T if name == "gpt2" else gradients[weight]
            expected.append((ALPHA / RANK * gradient @ projection.a.T).flatten())
        # The gradients that a mask cuts off flow through neither; biases of masked rows are masked with them.
        torch.testing.assert_close(trace, torch.cat(expected), rtol=1e-4, atol=1e-6)


def test_a_trace_is_what_real_adapters_get() -> None:
    stack = opened("llama")
    traces = GradientTraces(stack, IDS, rank=RANK, alpha=ALPHA, batch=4)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=names)
    model = peft.get_peft_model(copy.deepcopy(stack.model), config).eval()
    for position, projections in traces.projections.items():
        for projection in projections:
            layer = model.get_submodule(
                f"base_model.model.{stack.architecture.prefix}{position.layer}.{projection.part.path}"
            )
            layer.lora_A["default"].weight.data.copy_(projection.a)
    model(input_ids=IDS, labels=IDS).loss.backward()
    for position, projections in traces.projections.items():
        expected = []
        for projection in projections:
            layer = model.get_submodule(
                f"base_model.model.{stack.architecture.prefix}{position.layer}.{projection.part.path}"
            )
            assert not layer.lora_A["default"].weight.grad.any()
            expected.append(layer.lora_B["default"].weight.grad.flatten())
        torch.testing.assert_close(traces.base.sublayers[position], torch.cat(expected), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [*FAMILIES, "multi-head"])
def test_a_masked_model_computes_what_the_cut_one_does(name: str) -> None:
    heads = {"num_key_value_heads": nano("llama").config.num_attention_heads}
    stack = opened("llama", **heads) if name == "multi-head" else opened(name)
    plan = cut_of(stack)
    loss = GradientTraces(stack, IDS, rank=2, batch=4).of(plan).loss
    with torch.no_grad():
        logits = lamella.apply(stack, plan)(IDS).logits[:, :-1].flatten(0, 1)
    assert loss == pytest.approx(float(nn.functional.cross_entropy(logits, IDS[:, 1:].flatten())), abs=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_whole_model_agrees_with_itself_and_nothing_is_written_to_it(name: str) -> None:
    stack = opened(name)
    before = {key: value.clone() for key, value in stack.model.state_dict().items()}
    hooks = [len(module._forward_hooks) for module in stack.model.modules()]
    traces = GradientTraces(stack, IDS, rank=RANK)
    traces.of(cut_of(stack))
    again = traces.of(Plan(model=ModelReference.of(stack)))
    for sublayer, trace in again.sublayers.items():
        assert torch.equal(trace, traces.base.sublayers[sublayer])
        assert pearson(trace, traces.base.sublayers[sublayer]) == pytest.approx(1, abs=1e-5)
    assert all(torch.equal(value, before[key]) for key, value in stack.model.state_dict().items())
    assert [len(module._forward_hooks) for module in stack.model.modules()] == hooks
    assert all(parameter.grad is None for parameter in stack.model.parameters())


def test_padding_does_not_count() -> None:
    stack = opened("llama")
    row = IDS[:1, :8]
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), row], dim=1)
    mask = torch.tensor([[0] * 4 + [1] * 8])
    positions = GradientTraces(stack, {"input_ids": padded, "attention_mask": mask}, rank=RANK)
    expected = GradientTraces(stack, row, rank=RANK)
    assert positions.base.loss == pytest.approx(expected.base.loss, abs=1e-5)
    for sublayer, trace in expected.base.sublayers.items():
        torch.testing.assert_close(positions.base.sublayers[sublayer], trace, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(positions.saliency.channels, expected.saliency.channels, rtol=1e-4)


def test_saliency_is_weights_times_input_norms() -> None:
    stack = opened("llama")
    saliency = GradientTraces(stack, IDS, rank=2).saliency
    context, seen = stack.context(IDS), {}

    def note(name: str) -> Any:
        return lambda module, args: seen.update({name: args[0].flatten(0, 1).norm(dim=0)})

    attention, mlp = stack.layers[1].self_attn, stack.layers[1].mlp
    modules = {name: getattr(attention, f"{name}_proj") for name in "qkvo"}
    modules |= {name: getattr(mlp, f"{name}_proj") for name in ("gate", "up", "down")}
    handles = [module.register_forward_pre_hook(note(name)) for name, module in modules.items()]
    with torch.no_grad():
        stack.run(context.h, 0, 4, context)
    for handle in handles:
        handle.remove()
    weighted = {name: (modules[name].weight.abs() * seen[name]).detach() for name in modules}
    heads = stack.config.num_attention_heads
    np.testing.assert_allclose(saliency.channels[1], weighted["down"].sum(0), rtol=1e-4)
    np.testing.assert_allclose(saliency.heads[1], weighted["o"].sum(0).reshape(heads, -1).sum(1), rtol=1e-4)
    flat = torch.cat([weighted[name].flatten() for name in "qkvo"])
    assert saliency.sublayers[1, 0] == pytest.approx(float(flat.mean()), rel=1e-4)


def test_constant_traces_do_not_correlate_and_correlation_is_numpys() -> None:
    a, b = torch.randn(50), torch.randn(50)
    assert pearson(a, b) == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-6)
    assert pearson(a, torch.zeros(50)) == pearson(torch.full((50,), 3.0), a) == 0
    assert cosine(a, -2 * a) == pytest.approx(-1, abs=1e-6)


def test_what_cannot_be_traced_is_refused() -> None:
    with pytest.raises(ArchitectureError, match="gradient traces support"):
        GradientTraces(opened("opt"), IDS)
    stack = opened("llama")
    plan = Plan(model=ModelReference.of(stack), width={"hidden.channels": [0, 1]})
    with pytest.raises(PlanError, match="only support plans of layers, heads and MLP channels"):
        GradientTraces(stack, IDS, rank=2).of(plan)
