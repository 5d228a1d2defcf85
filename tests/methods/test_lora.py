"""The LoRA baseline: plain peft reads what it writes, whole models and cut ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from lamella.data import Passages
from lamella.data.context import InputContext
from lamella.errors import MethodError
from lamella.methods.lora import lora
from lamella.plan import ModelReference, PhasedPath, Plan
from lamella.runner import run
from lamella.runtime import apply
from lamella.stack import Stack

NANO_LLAMA = Path(__file__).parents[1] / "models" / "nano-llama"


@pytest.fixture
def stack() -> Stack:
    return Stack(AutoModelForCausalLM.from_pretrained(NANO_LLAMA), NANO_LLAMA)


@pytest.fixture(scope="module")
def samples() -> Passages:
    reader = InputContext(lambda: AutoTokenizer.from_pretrained(NANO_LLAMA))
    return Passages.open("stdlib", reader, sequences=8, length=32)


def test_plain_peft_loads_and_merges_what_a_run_has_written(stack: Stack, tmp_path: Path) -> None:
    given = {"sequences": 8, "length": 32, "steps": 4, "lr": 1e-2}
    outcome = run("lora", NANO_LLAMA, train="stdlib", out=tmp_path / "adapter", **given)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(NANO_LLAMA), tmp_path / "adapter")
    ids = torch.randint(5, 200, (2, 12))
    with torch.no_grad():
        ours = outcome.result.view(ids).logits  # type: ignore[attr-defined]
        assert (loaded(ids).logits - ours).abs().max() < 1e-4
        assert (loaded.merge_and_unload()(ids).logits - ours).abs().max() < 1e-4
        assert (stack.model(ids).logits - ours).abs().max() > 1e-3


def test_a_cut_model_is_trained_as_it_runs(stack: Stack, samples: Passages, tmp_path: Path) -> None:
    plan = Plan(model=ModelReference.of(stack), drop=["layers.2", "layers.3.mlp"])
    tuned = lora(stack, samples, plan, steps=4, lr=1e-2)
    assert not any(".layers.2." in name or ".layers.3.mlp" in name for name in tuned.adapter.modules)
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(NANO_LLAMA), tuned.adapter.write(tmp_path / "adapter")
    )
    merged = Stack(loaded.merge_and_unload())
    ids = torch.randint(5, 200, (2, 12))
    with torch.no_grad():
        assert (apply(merged, plan)(ids).logits - tuned.view(ids).logits).abs().max() < 1e-4


def test_a_layer_that_runs_twice_is_refused(stack: Stack, samples: Passages) -> None:
    again = [0, 1, 1, 2, 3, 4, 5]
    path = {"text": PhasedPath(prefill=again, decode=again)}
    twice = Plan(model=ModelReference.of(stack), path=path)
    with pytest.raises(MethodError, match="only removes"):
        lora(stack, samples, twice, steps=1)
