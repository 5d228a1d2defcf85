"""LoRA on views: the original never changes, and every step can be undone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lamella.errors import TrainingError
from lamella.plan import ModelReference, PhasedPath, Plan, apply_tensors, parameters_at
from lamella.runtime import apply, parallel
from lamella.stack import Stack
from lamella.train import Lora, Task, TrainConfig, add_lora, blocks, fit, response_loss
from lamella.zoo.nano import nano

TOKENS = torch.randint(3, 128, (8, 12), generator=torch.Generator().manual_seed(0))
PROMPT = 5
SAMPLES = blocks(TOKENS, PROMPT)
TARGETS = {
    "llama": ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj"),
    "gpt2": ("c_attn", "c_proj"),
    "gpt_neox": ("query_key_value", "dense_h_to_4h"),
    "opt": ("q_proj", "fc1", "fc2"),
}
PLANS: dict[str, dict[str, Any]] = {
    "phased": {"path": {"text": PhasedPath(prefill=[0, 1, 2, 3], decode=[0, 2, 3])}},
    "sublayers": {"drop": ["layers.1.attn", "layers.2.mlp"]},
    "repeated": {"path": {"text": PhasedPath(prefill=[0, 1, 1, 3], decode=[0, 1, 1, 3])}},
}
CASES = [(family, plan) for family in TARGETS for plan in ("phased", "sublayers")] + [("llama", "repeated")]


def view_of(family: str, plan: str) -> tuple[Stack, Any]:
    stack = Stack(nano(family))
    return stack, apply(stack, Plan(model=ModelReference.of(stack), **PLANS[plan]))


@torch.no_grad()
def logits(view: Any) -> Tensor:
    return parallel(view, TOKENS, torch.full((len(TOKENS),), PROMPT)).logits


def trained(view: Any, family: str, out: Path, **options: Any) -> Lora:
    lora = add_lora(view, r=4, alpha=8, targets=TARGETS[family], **options)
    fit(view, SAMPLES, Task(response_loss), TrainConfig(steps=4, lr=3e-2), out=out, trainable=lora.trains)
    return lora


@pytest.mark.parametrize(("family", "plan"), CASES)
def test_adapters_train_merge_unmerge_and_go(family: str, plan: str, tmp_path: Path) -> None:
    stack, view = view_of(family, plan)
    before = {name: each.clone() for name, each in stack.model.named_parameters()}
    flags = {name: each.requires_grad for name, each in stack.model.named_parameters()}
    plain, names = logits(view), [name for name, _ in view.named_parameters()]

    lora = add_lora(view, r=4, alpha=8, targets=TARGETS[family])
    assert torch.equal(logits(view), plain)
    fit(view, SAMPLES, Task(response_loss), TrainConfig(steps=4, lr=3e-2), out=tmp_path, trainable=lora.trains)
    adapted = logits(view)
    assert (adapted - plain).abs().max() > 1e-2

    lora.merge()
    torch.testing.assert_close(logits(view), adapted, atol=1e-5, rtol=1e-5)
    lora.unmerge()
    assert torch.equal(logits(view), adapted)
    lora.remove()
    assert torch.equal(logits(view), plain)
    assert [name for name, _ in view.named_parameters()] == names

    assert {name: each.requires_grad for name, each in stack.model.named_parameters()} == flags
    assert all(torch.equal(each, before[name]) for name, each in stack.model.named_parameters())


def test_merge_and_remove_make_a_plain_model(tmp_path: Path) -> None:
    stack, view = view_of("llama", "phased")
    names = [name for name, _ in view.named_parameters()]
    lora = trained(view, "llama", tmp_path)
    adapted = logits(view)
    lora.merge()
    with pytest.raises(TrainingError, match="merged already"):
        lora.merge()
    lora.remove()
    torch.testing.assert_close(logits(view), adapted, atol=1e-5, rtol=1e-5)
    assert [name for name, _ in view.named_parameters()] == names
    assert view.model.layers[0].mlp.gate_proj.weight is stack.layers[0].mlp.gate_proj.weight
    assert view.model.layers[0].mlp.up_proj.weight is not stack.layers[0].mlp.up_proj.weight
    assert add_lora(view, targets=["up_proj"]).modules


def test_an_adapted_view_generates_as_its_parallel_run_says(tmp_path: Path) -> None:
    _, view = view_of("llama", "phased")
    trained(view, "llama", tmp_path)
    view.generation_config.eos_token_id = None
    written = view.generate(TOKENS[:1, :PROMPT], max_new_tokens=8, do_sample=False)
    again = parallel(view, written, torch.tensor([PROMPT])).logits.argmax(-1)
    assert torch.equal(written[:, PROMPT:], again[:, PROMPT - 1 : -1])


def test_tensors_go_into_another_view_of_the_same_shape(tmp_path: Path) -> None:
    _, view = view_of("llama", "phased")
    lora = trained(view, "llama", tmp_path)
    _, fresh = view_of("llama", "phased")
    add_lora(fresh, r=4, alpha=8, targets=TARGETS["llama"], seed=7).load(lora.tensors())
    assert torch.equal(logits(fresh), logits(view))
    _, other = view_of("llama", "phased")
    with pytest.raises(TrainingError, match=r"tensors of other adapters: .*\[4, 32\], here \[2, 32\]"):
        add_lora(other, r=2, targets=TARGETS["llama"]).load(lora.tensors())
    _, fewer = view_of("llama", "phased")
    with pytest.raises(TrainingError, match="here None"):
        add_lora(fewer, r=4, targets=["q_proj"]).load(lora.tensors())


def test_the_random_half_comes_from_the_seed_and_from_nothing_else() -> None:
    def adapters(seed: int) -> list[Tensor]:
        _, view = view_of("llama", "phased")
        state = torch.random.get_rng_state()
        lora = add_lora(view, seed=seed)
        assert torch.equal(torch.random.get_rng_state(), state)
        return list(lora.tensors().values())

    first = adapters(1)
    assert all(map(torch.equal, first, adapters(1)))
    assert not all(map(torch.equal, first, adapters(2)))


def test_dropout_is_for_training_only(tmp_path: Path) -> None:
    _, view = view_of("llama", "phased")
    trained(view, "llama", tmp_path, dropout=0.5)
    assert torch.equal(logits(view), logits(view))


def test_modules_are_named_by_their_last_part_or_whole() -> None:
    _, view = view_of("llama", "phased")
    lora = add_lora(view, targets=["k_proj", "model.layers.2.mlp.up_proj"])
    attention = [f"model.layers.{layer}.self_attn.k_proj" for layer in range(4)]
    assert sorted(lora.modules) == sorted([*attention, "model.layers.2.mlp.up_proj"])
    with pytest.raises(TrainingError, match="has adapters already"):
        add_lora(view)
    with pytest.raises(TrainingError, match=r"no linear module is named 'c_attn': there are .*q_proj"):
        add_lora(view_of("llama", "phased")[1], targets=["q_proj", "c_attn"])


def test_adapters_that_are_off_in_some_layers_are_those_layers_restored(tmp_path: Path) -> None:
    """Post is pre with LoRA: leaving adapters out and copying the layers of pre into the merged model are one thing."""
    pre = Stack(nano("llama"))
    view = apply(pre, Plan(model=ModelReference.of(pre)))
    lora = trained(view, "llama", tmp_path)
    post = logits(view)
    with lora.off(["model.layers.1.", "model.layers.2."]):
        ours = logits(view)
    assert torch.equal(logits(view), post)
    lora.merge()
    lora.remove()
    names = parameters_at(pre, ["layers.1", "layers.2"])
    copied = apply_tensors(view, {name: pre.model.get_parameter(name) for name in names})
    torch.testing.assert_close(ours, logits(copied), rtol=0, atol=1e-5)
    assert not torch.allclose(ours, post, atol=1e-3)


def test_adapters_come_back_after_an_exception(tmp_path: Path) -> None:
    _, view = view_of("llama", "sublayers")
    lora = trained(view, "llama", tmp_path)
    before = logits(view)
    with pytest.raises(KeyboardInterrupt), lora.off(["model."]):
        raise KeyboardInterrupt
    assert torch.equal(logits(view), before)
