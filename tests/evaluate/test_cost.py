"""The cost model, compared with manual counts and with models that are actually smaller."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lamella.evaluate import PlanCost, StepTimes, cost, measure_step, step_times
from lamella.plan import ModelReference, PhasedPath, Plan
from lamella.plan.export import export
from lamella.runtime import apply
from lamella.stack import Stack
from lamella.zoo.nano import NANO, nano
from lamella.zoo.small import small

CAUSAL = [name for name in NANO if name != "vit"]
HIDDEN, INTERMEDIATE, VOCABULARY, HEADS, KV_HEADS, HEAD_DIM = 32, 64, 128, 4, 2, 8
ATTN = HIDDEN * HEADS * HEAD_DIM * 2 + 2 * HIDDEN * KV_HEADS * HEAD_DIM + HIDDEN  # q, o, k and v, norm
MLP = 3 * HIDDEN * INTERMEDIATE + HIDDEN


def opened(name: str, **overrides) -> Stack:
    return Stack(nano(name, **overrides))


def dropped(stack: Stack, *sites: str) -> Plan:
    return Plan(model=ModelReference.of(stack), drop=list(sites))


def test_a_llama_is_counted_by_hand() -> None:
    stack = opened("llama")
    embedding = head = VOCABULARY * HIDDEN
    whole = cost(stack, context=100)
    assert whole == PlanCost(
        sublayers=8,
        parameters=embedding + head + 4 * (ATTN + MLP) + HIDDEN,
        macs=4 * (ATTN + MLP) + head + 4 * 2 * 100 * HEADS * HEAD_DIM,
        bytes_per_token=4 * (4 * (ATTN + MLP) + head) + 4 * 2 * KV_HEADS * HEAD_DIM * 4 * 100,
        kv_bytes_per_token=4 * 2 * KV_HEADS * HEAD_DIM * 4,
    )
    small = cost(stack, dropped(stack, "layers.0.attn", "layers.2"), context=100)
    assert small.sublayers == 5
    assert small.parameters == whole.parameters - 2 * ATTN - MLP
    assert small.macs == whole.macs - 2 * ATTN - MLP - 2 * 2 * 100 * HEADS * HEAD_DIM
    assert small.kv_bytes_per_token == 2 * 2 * KV_HEADS * HEAD_DIM * 4  # attentions * k and v * heads * size * bytes
    assert small.bytes_per_token == 4 * (2 * ATTN + 3 * MLP + head) + small.kv_bytes_per_token * 100
    assert small.as_dict()["sublayers"] == 5


def test_experts_count_whole_as_parameters_and_in_part_as_work() -> None:
    stack = opened("qwen3_moe")
    whole, small = cost(stack), cost(stack, dropped(stack, "layers.1.mlp"))
    expert = 3 * HIDDEN * 32
    router, norm = 4 * HIDDEN, HIDDEN
    assert whole.parameters - small.parameters == 4 * expert + router + norm
    assert whole.macs - small.macs == 2 * expert + router + norm
    assert whole.bytes_per_token - small.bytes_per_token == 4 * (2 * expert + router + norm)
    assert whole.parameters == sum(parameter.numel() for parameter in stack.model.parameters())


def test_experts_of_a_derived_type_count_as_those_of_an_entry() -> None:
    stack = Stack(small("mixtral"))
    whole, smaller = cost(stack), cost(stack, dropped(stack, "layers.1.mlp"))
    expert = 3 * HIDDEN * INTERMEDIATE
    router, norm = 4 * HIDDEN, HIDDEN
    assert whole.parameters - smaller.parameters == 4 * expert + router + norm
    assert whole.macs - smaller.macs == 2 * expert + router + norm


@pytest.mark.parametrize("name", CAUSAL)
def test_the_whole_model_has_all_its_parameters_the_tied_ones_once(name: str) -> None:
    stack = opened(name)
    assert cost(stack).parameters == sum(parameter.numel() for parameter in stack.model.parameters())
    assert cost(stack) == cost(stack, dropped(stack))


@pytest.mark.parametrize("name", CAUSAL)
def test_parameters_are_those_of_a_model_without_the_removed_modules(name: str) -> None:
    stack = opened(name)
    pruned = copy.deepcopy(stack.model)
    layers = pruned.get_submodule(stack.architecture.prefix.removesuffix("."))
    del layers[3]
    for child in stack.architecture["attn"].modules:
        delattr(layers[1], child)
    expected = sum(parameter.numel() for parameter in pruned.parameters())
    assert cost(stack, dropped(stack, "layers.3", "layers.1.attn")).parameters == expected


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gpt2"])
def test_parameters_are_those_of_a_plain_export(name: str, tmp_path: Path) -> None:
    stack = opened(name)
    plan = dropped(stack, "layers.1", "layers.2")
    export(stack, plan, tmp_path / "out", form="plain")
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert cost(stack, plan).parameters == sum(parameter.numel() for parameter in small.parameters())
    assert small.config.num_hidden_layers == 2


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "opt", "qwen3"])
def test_kv_bytes_are_those_that_the_cache_grows_by(name: str) -> None:
    stack = opened(name)
    plan = dropped(stack, "layers.0.attn", "layers.2")
    ids = torch.randint(3, 128, (1, 10), generator=torch.Generator().manual_seed(0))

    def held(tokens: int) -> int:
        layers = apply(stack, plan)(ids[:, :tokens], use_cache=True).cache.layers
        tensors = [
            t for layer in layers if getattr(layer, "keys", None) is not None for t in (layer.keys, layer.values)
        ]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    assert held(10) - held(9) == cost(stack, plan).kv_bytes_per_token


def test_a_phased_plan_keeps_its_parameters_and_saves_work() -> None:
    stack = opened("llama")
    path = {"text": PhasedPath(prefill=[0, 1, 2, 3], decode=[0, 3])}
    phased, whole = cost(stack, Plan(model=ModelReference.of(stack), path=path)), cost(stack)
    static = cost(stack, dropped(stack, "layers.1", "layers.2"))
    assert phased.parameters == whole.parameters
    assert (phased.macs, phased.bytes_per_token, phased.sublayers) == (static.macs, static.bytes_per_token, 4)
    assert phased.kv_bytes_per_token == static.kv_bytes_per_token


def test_a_repeated_layer_works_twice_and_is_stored_once() -> None:
    stack = opened("llama")
    path = {"text": PhasedPath(prefill=[0, 1, 1, 2, 3], decode=[0, 1, 1, 2, 3])}
    twice, whole = cost(stack, Plan(model=ModelReference.of(stack), path=path)), cost(stack)
    assert twice.parameters == whole.parameters and twice.sublayers == 10
    assert twice.macs - whole.macs == ATTN + MLP + 2 * 256 * HEADS * HEAD_DIM
    assert twice.kv_bytes_per_token == whole.kv_bytes_per_token * 5 // 4


def test_half_precision_halves_the_bytes() -> None:
    stack, half = opened("llama"), Stack(nano("llama").to(torch.bfloat16))
    assert cost(half).bytes_per_token * 2 == cost(stack).bytes_per_token
    assert cost(half).kv_bytes_per_token * 2 == cost(stack).kv_bytes_per_token


def test_step_times_add_up() -> None:
    stack = opened("llama")
    times = StepTimes(attn=3.0, mlp=2.0, rest=10.0)
    assert times.step(None, 4) == 4 * 5 + 10
    plan = dropped(stack, "layers.0.attn", "layers.1", "layers.2.mlp")
    assert times.step(plan, 4) == 30 - 3 - 5 - 2
    assert times.speedup(plan) == pytest.approx(30 / 20)
    assert times.speedup_without(plan.skipped, 4) == pytest.approx(30 / 20)
    assert times.speedup_without(frozenset(), 4) == times.speedup(dropped(stack)) == 1.0
    path = {"text": PhasedPath(prefill=[0, 1, 2, 3], decode=[0, 3])}
    assert times.speedup(Plan(model=ModelReference.of(stack), path=path)) == pytest.approx(30 / 20)


@pytest.mark.parametrize("stalls", [0.0, 0.3, 0.6])
def test_step_times_are_the_same_on_a_busy_machine(stalls: float, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = opened("llama")
    drawn, now = random.Random(0), [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def takes(seconds: float) -> Callable[..., None]:
        """A hook for what takes so long, and much longer where the machine turns to something else."""

        def pass_time(*_: object) -> None:
            now[0] += seconds + (drawn.uniform(1, 100) if drawn.random() < stalls else 0)

        return pass_time

    for place, layer in enumerate(stack.layers):
        layer.self_attn.register_forward_hook(takes(2 + place))  # 2, 3, 4 and 5
        layer.mlp.register_forward_hook(takes(2))
    stack.model.get_input_embeddings().register_forward_hook(takes(1))
    stack.model.get_output_embeddings().register_forward_hook(takes(9))
    times = measure_step(stack, prompt=8)
    assert (times.attn, times.mlp, times.rest) == pytest.approx((3.5, 2, 10))
    assert times.step(None, 4) == pytest.approx(4 * 5.5 + 10)  # nothing is lost, and nothing counted twice


def test_measured_step_times_are_positive_and_leave_the_model_alone() -> None:
    stack = opened("llama")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        before = stack.model(ids).logits
        times = measure_step(stack, prompt=8, steps=4)
        assert torch.equal(stack.model(ids).logits, before)
    assert times.attn > 0 and times.mlp > 0 and times.rest >= 0
    assert not [name for name, m in stack.model.named_modules() if "forward" in vars(m)]
    assert isinstance(stack.model, nn.Module)


def test_step_times_are_measured_once_for_each_opened_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[Stack] = []

    def measure(stack: Stack) -> StepTimes:
        measured.append(stack)
        return StepTimes(attn=1e-3, mlp=1e-3, rest=len(measured) * 1e-3)

    monkeypatch.setattr(import_module("lamella.evaluate.cost"), "measure_step", measure)
    one, other = Stack(nano("llama")), Stack(nano("llama"))
    assert step_times(one) is step_times(one) and step_times(other).rest == 2e-3
    assert measured == [one, other]
