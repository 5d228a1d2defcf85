"""Checkpoints that are stored quantised: opened in numbers that can be cut, or refused with the way to go."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import transformers

from lamella.errors import CheckpointError

OPENED = {  # quant_method of a config.json: (class of transformers that dequantises while it loads, package it needs)
    "mxfp4": ("Mxfp4Config", None),  # GPT-OSS
    "fp8": ("FineGrainedFP8Config", None),  # DeepSeek V3
    "mxfp8": ("FineGrainedFP8Config", None),
    "compressed-tensors": ("CompressedTensorsConfig", "compressed_tensors"),
}
NATIVE_FORMATS = ("torchao", "gguf")  # what Lamella writes itself
ADVICE = {  # what can be dequantised elsewhere
    "bitsandbytes": "dequantise it where bitsandbytes runs, with transformers.AutoModelForCausalLM.from_pretrained("
    "FOLDER, dtype='bfloat16').dequantize().save_pretrained(OUT), and give OUT",
}


def method_of(config: Any) -> str | None:
    """How a checkpoint is quantised, as its config says; None for one that is not."""
    said = getattr(config, "quantization_config", None)
    method = said.get("quant_method") if isinstance(said, dict) else getattr(said, "quant_method", None)
    return None if said is None else str(getattr(method, "value", method))


def dequantisation_options(config: Any, place: Path | str) -> dict[str, Any]:
    """The options with which transformers loads a checkpoint in plain numbers; none for one that is stored so.

    Raises:
        CheckpointError: for a checkpoint that cannot be, with the way to one that can.
    """
    method = method_of(config)
    if method is None or method in NATIVE_FORMATS:
        return {}
    if method not in OPENED:
        way = ADVICE.get(method, "give the checkpoint that it was made from, in bfloat16 or float16")
        raise CheckpointError(f"{place} is stored quantised ({method}), in numbers that cannot be cut: {way}")
    name, package = OPENED[method]
    if package is not None and find_spec(package) is None:
        raise CheckpointError(
            f"{place} is stored quantised ({method}): pip install {package.replace('_', '-')}, with which it is opened "
            "dequantised, or give the checkpoint that it was made from"
        )
    return {"quantization_config": getattr(transformers, name)(dequantize=True)}


def mark_dequantised(model: Any) -> Any:
    """A model that was dequantised while it was loaded, which says so itself."""
    for config in {id(each): each for each in (model.config, *_parts(model.config))}.values():
        config.__dict__.pop("quantization_config", None)
    model.__dict__.pop("hf_quantizer", None)
    model.is_quantized = False
    return model


def _parts(config: Any) -> list[Any]:
    return [part for name in (config.sub_configs or {}) if (part := getattr(config, name, None)) is not None]
