"""Closed-form corrections: the least squares, the gaps that they close, and what they leave alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lamella.errors import CalibrationError, MethodError
from lamella.plan import ModelReference, Plan, PolicyReference
from lamella.plan.export import export
from lamella.plan.reference import StackReference
from lamella.runtime import apply
from lamella.stack import Stack
from lamella.train.refit import FIRST, LeastSquares, gaps_of, refit
from lamella.zoo import load
from lamella.zoo.nano import nano

TOKENS = torch.randint(3, 128, (10, 24), generator=torch.Generator().manual_seed(0))


def opened(name: str = "llama", **more: Any) -> Stack:
    return Stack(nano(name, **more))


def plan_of(stack: Stack, *drop: str, **more: Any) -> Plan:
    return Plan(model=ModelReference.of(stack), drop=list(drop), **more)


def parameters(model: Any) -> dict[str, Tensor]:
    return {name: each.detach().clone() for name, each in model.named_parameters(remove_duplicate=False)}


def changed(stack: Stack, model: Any) -> dict[str, float]:
    before = parameters(stack.model)
    moved = {name: float((each - before[name]).abs().max()) for name, each in parameters(model).items()}
    return {name: each for name, each in moved.items() if each > 0}


# The least squares


@given(
    st.integers(0, 2**16), st.booleans(), st.sampled_from([0.0, 1e-2, 1.0]), st.lists(st.integers(1, 40), max_size=5)
)
def test_streamed_sums_solve_what_all_tokens_at_once_solve(
    seed: int, biased: bool, ridge: float, cuts: list[int]
) -> None:
    draw = np.random.default_rng(seed)
    x, e, y = (draw.standard_normal((200, size)) for size in (6, 3, 3))
    counts = draw.choice([1.0, FIRST], 200)
    parts = np.split(np.arange(200), np.cumsum(cuts))
    given = [torch.from_numpy(each) for each in (x, e, y, counts)]
    streamed = [LeastSquares.of(*(each[part] for each in given), biased=biased) for part in parts]
    sums = streamed[0]
    for other in streamed[1:]:
        sums = sums + other
    found = sums.solve(ridge).numpy()

    w = counts / (y**2).sum(1)
    wide = np.c_[x, np.ones(200)] if biased else x
    gram = wide.T @ (wide * w[:, None])
    penalties = np.full(wide.shape[1], np.diag(gram)[:6].mean())
    penalties[6:] = np.diag(gram)[6:]
    rows = np.r_[wide * np.sqrt(w)[:, None], np.diag(np.sqrt(ridge * penalties))]
    expected = np.linalg.lstsq(rows, np.r_[e * np.sqrt(w)[:, None], np.zeros((wide.shape[1], 3))], rcond=None)[0]
    np.testing.assert_allclose(found, expected, atol=1e-9)

    error = (((e - wide @ expected) ** 2).sum(1) * w).sum() / counts.sum()
    assert sums.error(torch.from_numpy(expected)) == pytest.approx(error, rel=1e-9)


def test_an_infinite_ridge_corrects_nothing_and_a_large_one_hardly_anything() -> None:
    draw = torch.Generator().manual_seed(0)
    x, e, y = (torch.randn(50, size, generator=draw) for size in (6, 3, 3))
    sums = LeastSquares.of(x, e, y, torch.ones(50), biased=True)
    assert not sums.solve(math.inf).any()
    assert float(sums.solve(1e9).abs().max()) < 1e-6


def test_inputs_that_are_always_zero_leave_nothing_to_correct() -> None:
    zeros, ones = torch.zeros(20, 4), torch.ones(20, 3)
    sums = LeastSquares.of(zeros, ones, ones, torch.ones(20))
    assert not sums.solve(1e-3).any() and sums.error(sums.solve(1e-3)) == pytest.approx(1)


# Gaps


@pytest.mark.parametrize(
    ("drop", "parallel", "expected"),
    [
        ([], False, []),
        (["layers.1"], False, [("layers.0.mlp", (2, "attn"))]),
        (["layers.1", "layers.2", "layers.3"], False, [("layers.0.mlp", (4, "attn"))]),
        (["layers.0", "layers.2.mlp"], False, [("layers.2.attn", (3, "attn"))]),
        (["layers.1.attn", "layers.3.mlp"], False, [("layers.0.mlp", (1, "mlp")), ("layers.3.attn", (4, "attn"))]),
        (["layers.1.attn"], True, [("layers.1.mlp", (2, "attn"))]),
        (["layers.1.mlp", "layers.2.attn"], True, [("layers.1.attn", (2, "attn")), ("layers.2.mlp", (3, "attn"))]),
    ],
)
def test_a_gap_lies_between_the_last_sublayer_in_front_and_the_end_of_what_is_missing(
    drop: list[str], parallel: bool, expected: list[tuple[str, tuple[int, str]]]
) -> None:
    stack = opened()
    gaps = gaps_of(stack, plan_of(stack, *drop), parallel=parallel)
    assert [(gap.site.site, tuple(gap.behind)) for gap in gaps] == expected


# What is computed


def by_hooks(stack: Stack, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return x, e and y behind layer 1 of a llama, which is removed, from whole passes of transformers' own model."""
    seen: list[Tensor] = []
    down = stack.layers[0].mlp.down_proj
    hook = down.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    with torch.no_grad():
        states = stack.model.model(**inputs, output_hidden_states=True, use_cache=False).hidden_states
    hook.remove()
    return seen[0], states[2] - states[1], states[2]


def test_the_correction_is_that_of_all_tokens_at_once_without_padding() -> None:
    stack = opened()
    mask = torch.ones_like(TOKENS)
    for row, padding in enumerate([0, 5, 0, 20, 1, 0, 0, 3, 0, 7]):
        mask[row, :padding] = 0
    inputs = {"input_ids": TOKENS, "attention_mask": mask}
    healed = refit(stack, plan_of(stack, "layers.1"), inputs, ridges=(0.05,))

    x, e, y = (each.double()[mask.bool()] for each in by_hooks(stack, inputs))
    first = (mask.cumsum(1) * mask == 1)[mask.bool()]
    w = torch.where(first, FIRST, 1.0) / y.square().sum(1)
    gram = x.T @ (x * w[:, None])
    rows = torch.cat([x * w.sqrt()[:, None], (0.05 * gram.diagonal().mean()).sqrt() * torch.eye(64)])
    expected = torch.linalg.lstsq(rows, torch.cat([e * w.sqrt()[:, None], torch.zeros(64, 32)])).solution.T
    weight = "model.layers.0.mlp.down_proj.weight"
    assert changed(stack, healed.stack.model).keys() == {weight}
    found = healed.stack.model.get_parameter(weight).double() - stack.model.get_parameter(weight).double()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@dataclass
class Alone:
    """Rows of different lengths, one after another and without padding."""

    rows: list[Tensor]

    def batches(self, size: int) -> Any:
        return ({"input_ids": row[None]} for row in self.rows)

    def describe(self) -> dict[str, Any]:
        return {}


def test_padding_does_not_matter() -> None:
    stack = opened()
    plan, lengths = plan_of(stack, "layers.1", "layers.2.attn"), [24, 3, 17, 9, 24, 12, 20, 5, 11, 6]
    mask = torch.stack([(torch.arange(24) >= 24 - length).long() for length in lengths])
    padded = refit(stack, plan, {"input_ids": TOKENS * mask, "attention_mask": mask})
    alone = refit(stack, plan, Alone([row[24 - length :] for row, length in zip(TOKENS, lengths, strict=True)]))
    for name, each in parameters(padded.stack.model).items():
        torch.testing.assert_close(each, alone.stack.model.get_parameter(name), atol=1e-5, rtol=1e-4)


class Linear(nn.Module):
    """An MLP without an activation."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.up_proj, self.down_proj = nn.Linear(32, 64, bias=False), nn.Linear(64, 32, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        return self.down_proj(self.up_proj(h))


def test_removed_layers_that_a_linear_layer_can_express_are_recovered() -> None:
    stack = opened()
    for number, layer in enumerate(stack.layers[:3]):  # their MLPs are linear, and the last two have nothing else
        layer.mlp, layer.post_attention_layernorm = Linear(number), nn.Identity()
    for layer in stack.layers[1:3]:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
    plan = plan_of(stack, "layers.1", "layers.2")
    healed = refit(stack, plan, TOKENS, ridges=(1e-12,))
    with torch.no_grad():
        expected, cut, found = (each(TOKENS).logits for each in (stack.model, apply(stack, plan), healed.view))
    assert float((cut - expected).abs().max()) > 0.1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert healed.findings["refit"][0]["after"] < 1e-9


def narrow(stack: Stack, **keep: list[int]) -> Plan:
    width: dict[str, Any] = {}
    for layer in range(len(stack)):
        if "channels" in keep:
            width[f"layers.{layer}.mlp.channels"] = keep["channels"]
        if "heads" in keep:
            groups = stack.model.config.num_attention_heads // StackReference.of(stack).sizes.kv_heads
            width[f"layers.{layer}.attn.heads"] = {"keep": keep["heads"], "kv_of": [n // groups for n in keep["heads"]]}
    if "hidden" in keep:
        width["hidden.channels"] = keep["hidden"]
    return plan_of(stack, width=width)


def test_removed_channels_that_are_copies_of_others_are_recovered() -> None:
    stack = opened()
    for layer in stack.layers:
        for projection in (layer.mlp.gate_proj, layer.mlp.up_proj):
            projection.weight.data[32:] = projection.weight.data[:32]
    plan = narrow(stack, channels=list(range(32)))
    healed = refit(stack, plan, TOKENS, ridges=(1e-10,))
    with torch.no_grad():
        expected, cut, found = (each(TOKENS).logits for each in (stack.model, apply(stack, plan), healed.view))
    assert float((cut - expected).abs().max()) > 0.1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "keep",
    [{"channels": [3, 1, *range(8, 40)]}, {"heads": [1, 2]}, {"channels": [*range(40)], "hidden": [*range(2, 32)]}],
)
def test_narrower_sublayers_come_closer_and_nothing_else_changes(name: str, keep: dict[str, list[int]]) -> None:
    stack = opened(name)
    plan = narrow(stack, **keep)
    healed = refit(stack, plan, TOKENS)
    assert len(healed.findings["refit"]) == len(stack) * (2 if "hidden" in keep else 1)
    assert all(each["after"] <= each["before"] for each in healed.findings["refit"])
    assert distance(stack, healed.view) < distance(stack, apply(stack, plan))
    outs = tuple(f"{each.out}." for each in stack.architecture.sublayers)
    moved = changed(stack, healed.stack.model)
    assert moved and all(any(out in name for out in outs) for name in moved)
    if name == "llama" and "channels" in keep:
        weight = healed.stack.layers[1].mlp.down_proj.weight
        dropped = sorted(set(range(64)) - set(keep["channels"]))
        assert torch.equal(weight[:, dropped], stack.layers[1].mlp.down_proj.weight[:, dropped])


@torch.no_grad()
def distance(stack: Stack, view: Any) -> float:
    """KL from the original on other tokens."""
    tokens = torch.randint(3, 128, (8, 24), generator=torch.Generator().manual_seed(1))
    target, ours = (each(tokens).logits.log_softmax(-1) for each in (stack.model, view))
    return float((target.exp() * (target - ours)).sum(-1).mean())


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gpt_neox_serial", "opt", "qwen3", "seed_oss"])
@pytest.mark.parametrize("drop", [["layers.1", "layers.2"], ["layers.1.attn"], ["layers.3.mlp"]])
def test_every_architecture_with_a_plain_residual_stream_comes_closer(name: str, drop: list[str]) -> None:
    stack = opened(name)
    plan = plan_of(stack, *drop)
    healed = refit(stack, plan, TOKENS)
    assert all(each["after"] < each["before"] for each in healed.findings["refit"])
    assert distance(stack, healed.view) < distance(stack, apply(stack, plan))


def test_a_bias_is_corrected_as_well() -> None:
    stack = opened("gpt2")
    healed = refit(stack, plan_of(stack, "layers.1"), TOKENS)
    assert changed(stack, healed.stack.model).keys() == {
        f"transformer.h.0.mlp.c_proj.{name}" for name in ("weight", "bias")
    }


# What is left alone


def test_without_a_cut_nothing_changes() -> None:
    stack = opened()
    healed = refit(stack, plan_of(stack), TOKENS)
    assert not changed(stack, healed.stack.model) and healed.findings["refit"] == []
    same = refit(stack, narrow(stack, channels=list(range(64))), TOKENS)
    assert all(each < 1e-6 for each in changed(stack, same.stack.model).values())
    assert len(same.findings["refit"]) == 4


def test_an_infinite_ridge_leaves_the_weights_and_the_callers_model_is_never_changed() -> None:
    stack = opened()
    before = parameters(stack.model)
    healed = refit(stack, plan_of(stack, "layers.1"), TOKENS, ridges=(math.inf,))
    assert not changed(stack, healed.stack.model)
    [found] = healed.findings["refit"]
    assert found["ridge"] is None and found["before"] == found["after"] > 0
    refit(stack, plan_of(stack, "layers.1"), TOKENS)
    assert all(torch.equal(each, before[name]) for name, each in parameters(stack.model).items())


def test_the_same_text_gives_the_same_weights_and_a_plain_export(tmp_path: Path) -> None:
    stack = opened()
    plan = plan_of(stack, "layers.1", "layers.3")
    one, two = (refit(stack, plan, TOKENS) for _ in range(2))
    assert one.findings == two.findings and not changed(one.stack, two.stack.model)
    export(one.stack, one.plan, tmp_path / "out")
    exported = load(tmp_path / "out").model
    assert exported.config.num_hidden_layers == 2
    with torch.no_grad():
        assert torch.equal(exported(TOKENS).logits, one.view(TOKENS).logits)


# Refusals


@pytest.mark.parametrize("name", ["gemma3_text", "opt_post_norm", "qwen3_moe"])
def test_a_sublayer_that_does_not_end_in_a_plain_sum_is_refused(name: str) -> None:
    stack = opened(name)
    with pytest.raises(MethodError, match="does not end in a linear layer that adds to the residual stream"):
        refit(stack, plan_of(stack, "layers.1"), TOKENS)


def test_plans_texts_and_models_to_which_it_does_not_apply_are_refused() -> None:
    stack = opened()
    with pytest.raises(MethodError, match="nothing is left in front"):
        refit(stack, plan_of(stack, "layers.0"), TOKENS)
    with pytest.raises(MethodError, match="has policies"):
        refit(stack, plan_of(stack, policies={"text": PolicyReference(name="first")}), TOKENS)
    with pytest.raises(MethodError, match="repeats or moves"):
        refit(stack, plan_of(stack, path={"text": {"prefill": [1, 0, 2, 3], "decode": [1, 0, 2, 3]}}), TOKENS)
    with pytest.raises(CalibrationError, match="give at least two"):
        refit(stack, plan_of(stack, "layers.1"), TOKENS[:1])
    diffusion = opened("llada")
    with pytest.raises(MethodError, match="masked tokens"):
        refit(diffusion, plan_of(diffusion, "layers.1"), TOKENS)
