"""Nano models: every feature is present, no parameter is trivial, and weights are seeded."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lamella.data import load_text, windows
from lamella.errors import ArchitectureError
from lamella.zoo import NANO, nano

ROOT = Path(__file__).parents[2]
NANO_LLAMA = ROOT / "tests" / "models" / "nano-llama"


def inputs(name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    if name == "vit":
        return torch.randn(2, 3, 16, 16, generator=generator)
    return torch.randint(3, 128, (2, 24), generator=generator)


@pytest.mark.parametrize("name", NANO)
@torch.no_grad()
def test_logits_are_finite_and_neither_flat_nor_one_hot(name: str) -> None:
    model = nano(name)
    assert not model.training and model.dtype == torch.float32
    logits = model(inputs(name)).logits
    assert logits.isfinite().all() and 0.5 < logits.std() < 3


@pytest.mark.parametrize("name", NANO)
@torch.no_grad()
def test_the_seed_fixes_the_weights(name: str) -> None:
    x = inputs(name)
    assert torch.equal(nano(name)(x).logits, nano(name)(x).logits)
    assert not torch.equal(nano(name)(x).logits, nano(name, seed=1)(x).logits)


@pytest.mark.parametrize("name", NANO)
def test_no_parameter_is_constant(name: str) -> None:
    constant = [key for key, p in nano(name).named_parameters() if p.numel() > 1 and p.std() < 0.01]
    assert constant == []


def test_traits_are_there() -> None:
    assert nano("gemma3_text").config.layer_types == ["sliding_attention", "full_attention"] * 2
    assert nano("gemma3_text").config.sliding_window == 8
    assert nano("gpt_neox").config.use_parallel_residual and not nano("gpt_neox_serial").config.use_parallel_residual
    assert nano("opt").config.do_layer_norm_before and not nano("opt_post_norm").config.do_layer_norm_before
    assert nano("llama").config.num_key_value_heads == 2


def test_overrides_change_the_config_and_typos_are_refused() -> None:
    assert nano("llama", num_hidden_layers=2).config.num_hidden_layers == 2
    with pytest.raises(ArchitectureError, match="has no field 'num_hidden_layer'"):
        nano("llama", num_hidden_layer=2)
    with pytest.raises(ArchitectureError, match="no nano model 'lama'; there are: llama"):
        nano("lama")


@torch.no_grad()
def test_the_committed_nano_llama_has_learned_its_language() -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(NANO_LLAMA), AutoTokenizer.from_pretrained(NANO_LLAMA)
    blocks = windows(tokenizer, load_text("pydoc", "test"), count=8, length=256)
    counts = torch.bincount(blocks.flatten(), minlength=model.config.vocab_size).double()
    share = counts[counts > 0] / counts.sum()
    unigram = -(share * share.log()).sum()  # the best that any model without context can do on these very tokens
    assert model(blocks, labels=blocks).loss < 0.75 * unigram
    assert sum(file.stat().st_size for file in NANO_LLAMA.iterdir()) <= 4 * 2**20
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.decode(tokenizer("déjà vu ✓")["input_ids"]) == "déjà vu ✓"


def test_the_training_script_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["train_nano.py", "--steps", "2", "-o", str(tmp_path)])
    runpy.run_path(str(ROOT / "scripts" / "train_nano.py"), run_name="__main__")
    assert "final test loss" in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.num_hidden_layers == 6
