"""Quantised checkpoints: opened in a floating-point format that can be compressed, or refused with advice."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import transformers

from lamella.errors import CheckpointError

OPENED = {  # quant_method of a config.json: (transformers class that dequantises while loading, required package)
    "mxfp4": ("Mxfp4Config", None),  # GPT-OSS
    "fp8": ("FineGrainedFP8Config", None),  # DeepSeek V3
    "mxfp8": ("FineGrainedFP8Config", None),
    "compressed-tensors": ("CompressedTensorsConfig", "compressed_tensors"),
}
NATIVE_FORMATS = ("torchao", "gguf")  # written by Lamella
ADVICE = {  # for formats that can be dequantised elsewhere
    "bitsandbytes": "dequantise it where bitsandbytes runs, with transformers.AutoModelForCausalLM.from_pretrained("
    "FOLDER, dtype='bfloat16').dequantize().save_pretrained(OUT), and give OUT",
}


def method_of(config: Any) -> str | None:
    """Return the quantisation method of a checkpoint according to its config; None if it is not quantised."""
    quantisation = getattr(config, "quantization_config", None)
    if isinstance(quantisation, dict):
        method = quantisation.get("quant_method")
    else:
        method = getattr(quantisation, "quant_method", None)
    return None if quantisation is None else str(getattr(method, "value", method))


def dequantisation_options(config: Any, place: Path | str) -> dict[str, Any]:
    """Return the options with which transformers dequantises a checkpoint while loading; none if it is not quantised.

    Args:
        config: config of the checkpoint.
        place: its local folder or hub id, for messages.

    Raises:
        CheckpointError: for a checkpoint that cannot be dequantised, with advice.
    """
    method = method_of(config)
    if method is None or method in NATIVE_FORMATS:
        return {}
    if method not in OPENED:
        advice = ADVICE.get(method, "give the original checkpoint, in bfloat16 or float16")
        raise CheckpointError(f"{place} is quantised ({method}), in a format that cannot be compressed: {advice}")
    name, package = OPENED[method]
    if package is not None and find_spec(package) is None:
        raise CheckpointError(
            f"{place} is quantised ({method}): pip install {package.replace('_', '-')}, with which it can be opened "
            "dequantised, or give the original checkpoint"
        )
    return {"quantization_config": getattr(transformers, name)(dequantize=True)}


def mark_dequantised(model: Any) -> Any:
    """Return a model that was dequantised while it was loaded, without its quantisation metadata."""
    for config in {id(each): each for each in (model.config, *_parts(model.config))}.values():
        config.__dict__.pop("quantization_config", None)
    model.__dict__.pop("hf_quantizer", None)
    model.is_quantized = False
    return model


def _parts(config: Any) -> list[Any]:
    return [part for name in (config.sub_configs or {}) if (part := getattr(config, name, None)) is not None]
