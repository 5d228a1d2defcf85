"""The precision and device with which models are opened."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lamella.errors import LamellaError
from lamella.zoo import open_stack, opening, prefer
from lamella.zoo.small import small

NANO_LLAMA = Path(__file__).parents[1] / "models" / "nano-llama"


@pytest.fixture(autouse=True)
def no_preference() -> Iterator[None]:
    yield
    prefer()


@pytest.fixture
def half(tmp_path: Path) -> Path:
    """A checkpoint that is stored in bfloat16."""
    AutoModelForCausalLM.from_pretrained(NANO_LLAMA, dtype=torch.bfloat16).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(NANO_LLAMA).save_pretrained(tmp_path)
    return tmp_path


def dtype_of(model: Path, **options: object) -> torch.dtype:
    return open_stack(model, device="cpu", **options).model.dtype


def test_halves_are_opened_in_float32_on_a_cpu_unless_they_are_too_large(
    half: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert dtype_of(half) == torch.float32
    size = 2 * sum(file.stat().st_size for file in half.glob("*.safetensors"))  # in float32
    known = {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": 2 * size - 100}
    monkeypatch.setattr(os, "sysconf", known.__getitem__)
    for fast, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(opening, "computes_well", lambda dtype, device, fast=fast: fast)
        assert dtype_of(half) == expected
    monkeypatch.setattr(opening, "computes_well", lambda dtype, device: True)
    known["SC_PHYS_PAGES"] = 2 * size + 100
    assert dtype_of(half) == torch.float32
    assert dtype_of(half, dtype=torch.bfloat16) == torch.bfloat16


def test_preferences_are_defaults_of_options(lamella, half: Path) -> None:
    prefer("bfloat16", "cpu")
    assert dtype_of(NANO_LLAMA) == torch.bfloat16 and dtype_of(NANO_LLAMA, dtype=torch.float32) == torch.float32
    prefer()
    assert dtype_of(half) == torch.float32
    outcome = lamella("--dtype", "bfloat16", "chat", NANO_LLAMA, "--prompt", "A word", "--tokens", "2")
    assert outcome.code == 0 and dtype_of(half) == torch.bfloat16


def test_a_command_repeats_a_proof_on_request(lamella, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMELLA_CACHE", str(tmp_path / "cache"))
    model = tmp_path / "granite"
    small("granite").save_pretrained(model)
    AutoTokenizer.from_pretrained(NANO_LLAMA).save_pretrained(model)
    proved: list[str] = []
    monkeypatch.setattr(opening, "prove", lambda stack: proved.append(stack.name))
    command = ("chat", model, "--prompt", "A", "--tokens", "2")
    for expected, options in ((1, ()), (1, ()), (2, ("--prove-again",)), (3, ("--prove-again",))):
        prefer()
        assert lamella(*options, *command).code == 0
        assert len(proved) == expected


def test_what_cannot_be_preferred_is_refused(lamella) -> None:
    assert "choose one of float32" in lamella("--dtype", "int3", "chat", NANO_LLAMA, "--prompt", "A").refused()
    assert "no device 'cuda:99'" in lamella("--device", "cuda:99", "chat", NANO_LLAMA, "--prompt", "A").refused()
    with pytest.raises(LamellaError, match="no device 'nowhere'"):
        prefer(device="nowhere")
