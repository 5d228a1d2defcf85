"""Fingerprints that bind a plan to a model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# Entries that may differ between two loads of one architecture without changing what the layers compute.
_VOLATILE = frozenset(
    {"_name_or_path", "_model_name_or_path", "architectures", "auto_map", "bos_token_id", "dtype", "eos_token_id"}
    | {"generation_config", "id2label", "label2id", "lamella", "pad_token_id", "quantization_config", "torch_dtype"}
    | {"transformers_version", "unk_token_id", "use_cache", "pretraining_tp", "initializer_range"}
    | {"_diffusers_version", "_use_default_values", "_class_name", "lamella_dropped"}
)
SAMPLED = 64  # values of each tensor that enter the digest of a revision


def architecture(model: nn.Module) -> str:
    """Return the SHA-256 of a model's config and parameter shapes, which is the same for a model on the meta device."""
    shapes = {name: list(tensor.shape) for name, tensor in model.named_parameters()}
    text = json.dumps({"config": settings(model.config), "shapes": shapes}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def settings(config: Any) -> dict[str, Any]:
    """Return the entries of a config that affect what the layers compute."""
    return _stable(config.to_dict() if hasattr(config, "to_dict") else dict(config))  # diffusers has dictionaries


def _stable(config: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of a config and of its parts, without those that may differ between two loads."""
    return {
        key: _stable(value) if key.endswith("_config") and isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _VOLATILE
    }


def revision(model: nn.Module) -> str:
    """Return a digest that identifies the weights of a model without adapters.

    It covers a few values of each tensor in bfloat16, so it is the same for a checkpoint in float32 and in bfloat16,
    and differs after any training.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        values = parameter.detach().flatten()
        some = values[:: max(1, len(values) // SAMPLED)].bfloat16().float()
        digest.update(f"{name} {list(parameter.shape)};".encode() + some.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def tensors(model: nn.Module) -> str:
    """Return the SHA-256 of the names, shapes and values of all parameters in memory."""
    return _digest(model.named_parameters())


def state(model: nn.Module) -> str:
    """Return the SHA-256 of the names, shapes and values of the whole state dict, including buffers."""
    return weights(model.state_dict())


def weights(named: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the names, shapes and values of tensors."""
    return _digest(sorted(named.items()))


def _digest(named: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype};".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
