"""Skipped experts, compared with the mixture computed from its definition, one token after the other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lamella.plan import ModelReference, Plan, PolicyReference
from lamella.runtime import LayerCall, Pass, Policy, empty_cache, parallel, with_policy
from lamella.stack import Stack
from lamella.zoo.nano import nano
from lamella.zoo.small import small

IDS = torch.randint(3, 128, (3, 12), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, :4] = 0
LENGTHS = torch.tensor([8, 8, 8])


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


class Lighter(Policy):
    """Skips the chosen experts whose weight is below a threshold, in layers from the second on."""

    def __init__(self, stack: Stack, threshold: float) -> None:
        super().__init__(stack)
        self.threshold, self.where = threshold, stack.experts
        self.kept: list[Tensor] = []

    def layer(self, call: LayerCall, h: Tensor, run: Pass) -> Tensor:
        mid = call.attn(h)
        return call.mlp(mid) if call.index == 0 else call.experts(mid, self.where, self.keep)

    def keep(self, ids: Tensor, weights: Tensor) -> Tensor:
        self.kept.append(weights >= self.threshold)
        return self.kept[-1]


def viewed(stack: Stack, policy: Policy) -> object:
    named = Plan(model=ModelReference.of(stack), policies={"text": PolicyReference(name="first")})
    return with_policy(stack, named, policy)


def expected_mlp(layer: torch.nn.Module, read: Tensor, used: int, threshold: float, renormalises: bool) -> Tensor:
    """The mixture of one token after the other [tokens, hidden], of what weighs at least the threshold."""
    out = torch.zeros_like(read)
    mixture = layer.mlp
    for token, x in enumerate(read):
        shares = (mixture.gate.weight @ x).softmax(0)
        best = shares.topk(used)
        weights = best.values / best.values.sum() if renormalises else best.values
        for weight, expert in zip(weights, best.indices, strict=True):
            if weight >= threshold:
                gate, up = (mixture.experts.gate_up_proj[expert] @ x).chunk(2)
                out[token] += weight * (mixture.experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up))
    return out


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 2.0])
@pytest.mark.parametrize("name", ["qwen3_moe", "olmoe"])
def test_skipped_experts_are_excluded_from_the_sum(name: str, threshold: float) -> None:
    stack = Stack(nano(name))
    policy = Lighter(stack, threshold)
    view = viewed(stack, policy)
    renormalises = bool(stack.config.norm_topk_prob)
    context = stack.context({"input_ids": IDS, "attention_mask": MASK})
    h = stack.run(context.h, 0, 1, context)
    for index in range(1, len(stack)):
        layer = stack.layers[index]
        mid = stack.architecture["attn"].run(layer, h, context.calls[index])
        read = layer.post_attention_layernorm(mid).flatten(0, 1)
        used = stack.config.num_experts_per_tok
        h = mid + expected_mlp(layer, read, used, threshold, renormalises).view_as(mid)
    real = MASK.bool()
    found = parallel(view, IDS, LENGTHS, MASK).logits
    torch.testing.assert_close(found[real], stack.head(h)[real], rtol=0, atol=2e-5)
    if threshold == 0:
        assert torch.equal(found, stack.model(input_ids=IDS, attention_mask=MASK).logits)
    if threshold == 0.3:
        assert 0 < sum(int(each.sum()) for each in policy.kept) < sum(each.numel() for each in policy.kept)


@pytest.mark.parametrize(
    ("name", "least"),
    [("mixtral", 0.3), ("gpt_oss", 0.3), ("deepseek_v3", 1.2), ("glm4_moe", 0.3), ("granitemoe", 0.3)],
)
def test_pairs_apart_are_the_same_as_weights_of_zero(name: str, least: float) -> None:
    """In derived types too, some of which have shared experts or layers without any."""
    stack = Stack(small(name))
    view = viewed(stack, Lighter(stack, least))
    found = parallel(view, IDS, LENGTHS, MASK).logits

    def zeroed(_: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        weights = [each.is_floating_point() and each.shape[1:] == (2,) for each in args]
        return tuple(each * (each >= least) if light else each for each, light in zip(args, weights, strict=True))

    assert stack.experts is not None
    for layer in stack.layers[1:]:
        layer.get_submodule(stack.experts.experts).register_forward_pre_hook(zeroed)
    expected = stack.model(input_ids=IDS, attention_mask=MASK).logits
    torch.testing.assert_close(found[MASK.bool()], expected[MASK.bool()], rtol=0, atol=2e-5)
    assert (found - Stack(small(name)).model(input_ids=IDS, attention_mask=MASK).logits).abs().max() > 1e-3


def test_generation_equals_the_whole_sequence() -> None:
    stack = Stack(nano("qwen3_moe"))
    stack.model.generation_config.eos_token_id = None
    view = viewed(stack, Lighter(stack, 0.3))
    prompt, mask = IDS[:, :8], MASK[:, :8]
    ids = view.generate(input_ids=prompt, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0)
    grown = torch.cat([mask, torch.ones(3, 5, dtype=mask.dtype)], dim=1)
    logits = parallel(view, ids, LENGTHS, grown).logits
    assert torch.equal(logits[:, 7:-1].argmax(-1), ids[:, 8:])
    cache = empty_cache(view, 8)
    first = view(input_ids=ids[:, :8], attention_mask=grown[:, :8], cache=cache, use_cache=True).logits
    rest = view(input_ids=ids[:, 8:], attention_mask=grown, cache=cache, use_cache=True).logits
    torch.testing.assert_close(torch.cat([first, rest], 1)[grown.bool()], logits[grown.bool()], rtol=0, atol=2e-5)
