"""Nano checkpoints of the families that llama.cpp supports, with the tokenizer of the nano Llama."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lamella.result import Evidence
from lamella.runner import run
from lamella.zoo import nano, open_tokenizer

NANO_LLAMA = Path(__file__).parents[2] / "models" / "nano-llama"
WINDOWS = ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"]
GGUF = {  # what differs from the nano models, so that a GGUF file can hold them
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"attention_bias": False},
    "gemma3_text": {"num_hidden_layers": 7, "layer_types": WINDOWS},
}

Saved = Callable[..., Path]


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    """A function that writes a nano model with a tokenizer and returns its folder."""

    def write(family: str = "llama", **overrides: Any) -> Path:
        folder = tmp_path / f"nano-{family}"
        nano(family, **{"vocab_size": 520, **GGUF.get(family, {}), **overrides}).save_pretrained(folder)
        open_tokenizer(NANO_LLAMA).save_pretrained(folder)
        return folder

    return write


def quantize(model: str | Path, out: Path, kind: str = "q8_0") -> Path:
    """Write a checkpoint in fewer bits into the folder ``out``: the GGUF file, or for int8 the folder itself."""
    run("quantize", model, kind=kind, out=out)
    return out if kind == "int8" else out / findings(out)["file"]


def findings(out: Path) -> dict[str, Any]:
    """Return the findings in the evidence of a folder."""
    return Evidence.read(out).findings
