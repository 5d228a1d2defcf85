"""KORE: where it starts, what it cannot move, and that its two forms and plain peft compute the same."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lamella.data import Passages, Text
from lamella.data.context import InputContext
from lamella.errors import MethodError
from lamella.methods.kore import input_covariance, kore
from lamella.methods.kore.method import add_adapters, split_weights
from lamella.plan import ModelReference, Plan
from lamella.results import Tuned
from lamella.runner import run
from lamella.runtime import apply
from lamella.stack import Stack, share
from lamella.train import Adapter, linear_at, merge

NANO_LLAMA = Path(__file__).parents[2] / "models" / "nano-llama"
TRAINED: dict[str, Any] = {"steps": 6, "lr": 1e-2, "batch": 2}
IDS = torch.randint(5, 200, (2, 16), generator=torch.Generator().manual_seed(3))


def opened() -> Stack:
    return Stack(AutoModelForCausalLM.from_pretrained(NANO_LLAMA), NANO_LLAMA)


@pytest.fixture(scope="module")
def stack() -> Stack:
    return opened()


@pytest.fixture(scope="module")
def context() -> InputContext:
    return InputContext(lambda: AutoTokenizer.from_pretrained(NANO_LLAMA))


@pytest.fixture(scope="module")
def new(context: InputContext) -> Passages:
    return Passages.open("stdlib", context, sequences=8, length=32)


@pytest.fixture(scope="module")
def old(context: InputContext) -> Text:
    return Text.open("pydoc", context, sequences=8, length=32)


@pytest.fixture(scope="module")
def tuned(stack: Stack, new: Passages, old: Text) -> Tuned:
    return kore(stack, new, old, r=6, **TRAINED)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS, use_cache=False).logits


@pytest.mark.parametrize("form", ["lora", "residual"])
def test_before_training_it_is_the_model(stack: Stack, old: Text, form: Any) -> None:
    view, names = share(stack.model), linear_at(stack.model)
    split = split_weights(view, names, input_covariance(view, names, old), 6)
    add_adapters(view, names, split, 6, [f"layers.{each}" for each in range(len(stack))], form, 0)
    assert (logits(view) - logits(stack.model)).abs().max() < 1e-5


def test_the_caller_keeps_its_model(new: Passages, old: Text) -> None:
    stack = opened()
    before = {name: each.clone() for name, each in stack.model.state_dict().items()}
    for form in ("lora", "residual"):
        kore(stack, new, old, r=6, form=form, **TRAINED)
    assert all(torch.equal(before[name], each) for name, each in stack.model.state_dict().items())


def test_a0_does_not_move_and_the_model_does(stack: Stack, old: Text, tuned: Tuned) -> None:
    view, names = share(stack.model), linear_at(stack.model)
    split = split_weights(view, names, input_covariance(view, names, old), 6)
    for name in names:
        assert torch.equal(tuned.adapter.pairs[name][0], split[name].a)
    assert (logits(tuned.view) - logits(stack.model)).abs().max() > 1e-3


@pytest.mark.slow
def test_both_forms_take_one_way(stack: Stack, new: Passages, old: Text) -> None:
    long = TRAINED | {"steps": 100, "lr": 2e-3}
    ends = [kore(stack, new, old, r=6, form=form, **long) for form in ("lora", "residual")]
    assert (logits(ends[0].view) - logits(ends[1].view)).abs().max() < 1e-4
    assert (logits(ends[0].view) - logits(stack.model)).abs().max() > 1e-2


@torch.no_grad()
def test_old_inputs_move_no_output_by_more_than_the_bound(stack: Stack, old: Text, tuned: Tuned) -> None:
    """RMS of dW x over old tokens, at their original values, against |B|_2 sqrt(tr(A0 C A0^T)), C the plain mean."""
    seen: dict[str, list[Tensor]] = {}
    hooks = [
        stack.model.get_submodule(name).register_forward_hook(
            lambda _, given, out, name=name: seen.setdefault(name, []).append(given[0][0].double())
        )
        for name in tuned.adapter.modules
    ]
    for row in old.tokens:
        stack.model(row[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    for name, (a, b) in tuned.adapter.pairs.items():
        x = torch.cat(seen[name])
        change = x @ a.double().T @ b.double().T
        c = x.T @ x / len(x)
        bound = torch.linalg.matrix_norm(b.double(), 2) * (a.double() @ c @ a.double().T).trace().sqrt()
        assert change.square().sum(1).mean().sqrt() <= bound * (1 + 1e-6)


def test_plain_peft_loads_and_merges_it(stack: Stack, tmp_path: Path) -> None:
    given = {"sequences": 8, "length": 32, "r": 6, **TRAINED}
    outcome = run("kore", NANO_LLAMA, train="stdlib", old="pydoc", out=tmp_path / "adapter", **given)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(NANO_LLAMA), tmp_path / "adapter")
    ours = logits(outcome.result.view)  # type: ignore[attr-defined]
    least = 1e-5 * ours.abs().max()
    assert (logits(loaded) - ours).abs().max() < least
    assert (logits(loaded.merge_and_unload()) - ours).abs().max() < least
    assert (logits(stack.model) - ours).abs().max() > 1e-3


def test_what_an_earlier_round_measured_is_added(stack: Stack, new: Passages, old: Text, tmp_path: Path) -> None:
    file = tmp_path / "old.safetensors"
    first = kore(stack, new, old, r=6, save_covariance=file, **TRAINED | {"steps": 1})
    second = kore(stack, new, old, r=6, covariance=file, **TRAINED | {"steps": 1})
    assert second.findings["tokens"] == 2 * first.findings["tokens"]
    assert second.findings["energy"] == pytest.approx(first.findings["energy"], rel=1e-3)  # the same text twice


def test_what_was_measured_serves_the_model_that_came_out(
    stack: Stack, new: Passages, old: Text, tmp_path: Path
) -> None:
    file = tmp_path / "old.safetensors"
    first = kore(stack, new, old, r=6, save_covariance=file, **TRAINED)
    first.adapter.write(tmp_path / "first")
    merged = merge(stack, Adapter.open(tmp_path / "first"))
    merged.model.save_pretrained(tmp_path / "merged")
    again = Stack(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    second = kore(again, new, old, r=6, covariance=file, save_covariance=file, **TRAINED)
    assert second.findings["tokens"] == 2 * first.findings["tokens"]
    third = Stack(second.stack.model)
    assert kore(third, new, old, r=6, covariance=file, **TRAINED).findings["tokens"] == 3 * first.findings["tokens"]
    other = opened()
    with torch.no_grad():
        other.model.model.layers[0].mlp.up_proj.weight += 1
    with pytest.raises(MethodError, match="belongs to other weights"):
        kore(other, new, old, r=6, covariance=file, **TRAINED)


def test_a_cut_model_is_measured_and_trained_as_it_runs(stack: Stack, new: Passages, old: Text) -> None:
    plan = Plan(model=ModelReference.of(stack), drop=["layers.2", "layers.3.mlp"])
    tuned = kore(stack, new, old, plan, r=6, **TRAINED)
    assert not any(".layers.2." in name or ".layers.3.mlp" in name for name in tuned.adapter.modules)
    assert (logits(tuned.view) - logits(apply(stack, plan))).abs().max() > 1e-3


def test_a_small_null_space_and_little_text_are_told(stack: Stack, new: Passages, context: InputContext) -> None:
    little = Text.open("pydoc", context, sequences=1, length=16)
    notes = kore(stack, new, little, r=60, **TRAINED | {"steps": 1}).notes
    assert any("16 tokens of old samples" in note for note in notes)


def test_the_rank_that_old_samples_allow_is_said_before_training(
    stack: Stack,
    new: Passages,
    context: InputContext,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    much = Text.open("pydoc", context, sequences=8, length=64)
    with monkeypatch.context() as patched:
        patched.setattr("lamella.methods.kore.method.fit", lambda *given, **more: pytest.fail("it trains"))
        with pytest.raises(pytest.fail.Exception):
            kore(stack, new, much, r=60, **TRAINED)
    said = capsys.readouterr().err
    allowed = int(re.search(r"these samples allow a rank of (\d+)", said)[1])  # type: ignore[index]
    below = kore(stack, new, much, r=allowed, **TRAINED | {"steps": 1})
    assert allowed < 60 and max(below.findings["energy"].values()) <= 0.01
    assert not any("allow a rank" in note for note in below.notes)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"r": 10**4}, "give a rank between 1 and"),
        ({"r": 4, "form": "residual", "weight_decay": 0.1}, "weight decay"),
        ({"r": 4, "form": "residual", "freeze": False}, "freeze it"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    stack: Stack, new: Passages, old: Text, given: dict[str, Any], said: str
) -> None:
    with pytest.raises(MethodError, match=said) as refused:
        kore(stack, new, old, **given, **TRAINED)
    assert "\n" not in str(refused.value)
