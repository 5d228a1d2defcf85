"""Checks whether layers of one checkpoint can replace those of another: same architecture, different training.

A difference inside the layers breaks a hybrid silently, so each one is reported. Everything outside the layers may
differ: post-training adds tokens, and thus rows of the embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch

from lamella.errors import ArchitectureError, CheckpointError, PlanError
from lamella.plan import checkpoint, fingerprint
from lamella.stack import Stack

OUTSIDE = frozenset({"vocab_size", "tie_word_embeddings", "final_logit_softcapping", "layerdrop"})
LENGTHS = frozenset({"max_position_embeddings", "n_positions", "n_ctx"})
PLAIN_ROPE = (None, "default", "linear", "llama3")  # rotations that are independent of the maximum length
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}  # safetensors names
LISTED = 3  # differences per message


def check_pair(stack: Stack, base: Stack) -> None:
    """Check that layers of ``base`` can replace those of ``stack``.

    Args:
        stack: the post-trained model.
        base: the pre-trained model.

    Raises:
        ArchitectureError: if the family, the number of layers or settings that affect layers differ, by field.
        PlanError: if tensors of the layers differ in name, shape or dtype, by tensor; or a model is quantised.
    """
    ours, theirs = ((each.architecture.name, len(each)) for each in (stack, base))
    if ours != theirs:
        raise ArchitectureError(
            f"{stack.name} is a {ours[0]} of {ours[1]} layers, {base.name} a {theirs[0]} of {theirs[1]}: give two "
            "checkpoints of one architecture"
        )
    for each in (stack, base):
        if getattr(each.config, "quantization_config", None):
            raise PlanError(f"{each.name} is quantised: quantised layers cannot be mixed; give it unquantised")
    fields = differing_fields(stack.config, base.config)
    if fields:
        differences = [f"{name} is {ours} and {theirs}" for name, (ours, theirs) in fields.items()]
        raise ArchitectureError(
            f"the configs of {stack.name} and {base.name} differ in settings of the layers: {_shorten(differences)}; "
            "give two "
            "checkpoints of one architecture"
        )
    ours_by_name, theirs_by_name = _tensors(stack), _tensors(base)
    differences = [
        f"{name} is {_describe(ours_by_name.get(name))} and {_describe(theirs_by_name.get(name))}"
        for name in sorted(ours_by_name.keys() | theirs_by_name.keys(), key=_natural)
        if ours_by_name.get(name) != theirs_by_name.get(name)
    ]
    if differences:
        raise PlanError(f"the layers of {stack.name} and {base.name} differ: {_shorten(differences)}")


def differing_fields(ours: Any, theirs: Any) -> dict[str, tuple[Any, Any]]:
    """Return the settings of two configs that differ and affect layers, by their dotted names.

    Args:
        ours: one config.
        theirs: the other config.
    """
    ours_by_name, theirs_by_name = (_flat(fingerprint.settings(config)) for config in (ours, theirs))
    lengths = LENGTHS if all(_rope(config) in PLAIN_ROPE for config in (ours, theirs)) else frozenset()
    return {
        name: (ours_by_name.get(name), theirs_by_name.get(name))
        for name in sorted(ours_by_name.keys() | theirs_by_name.keys())
        if ours_by_name.get(name) != theirs_by_name.get(name)
        and name not in OUTSIDE | lengths
        and not name.endswith(("dropout", "pdrop"))  # only affects training
    }


def check_same_tokens(tokenizer: Any, base: Any) -> None:
    """Check that two tokenizers have the same vocabulary, except for added tokens such as those of a chat template.

    Args:
        tokenizer: one tokenizer.
        base: the other tokenizer.

    Raises:
        ArchitectureError: with a token that differs.
    """
    ours, theirs = (
        {token: number for token, number in each.get_vocab().items() if token not in each.get_added_vocab()}
        for each in (tokenizer, base)
    )
    wrong = sorted((number, token) for token, number in theirs.items() if ours.get(token) != number)
    wrong += sorted((number, token) for token, number in ours.items() if token not in theirs)
    if wrong:
        token = wrong[0][1]
        raise ArchitectureError(
            f"the tokenizers differ in {len(wrong)} tokens: '{token}' is {ours.get(token, 'none')} in the model and "
            f"{theirs.get(token, 'none')} in the base; give two checkpoints with one tokenizer"
        )


def _tensors(stack: Stack) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return dtype and shape of each tensor of the layers; the dtype on disk, if the model comes from safetensors."""
    prefix, stored = stack.architecture.prefix, {}
    if stack.path is not None and checkpoint.is_safetensors(stack.path):
        with suppress(CheckpointError):  # the names of its layers are only understood by transformers
            _, layers = checkpoint.read(stack.path).layers(prefix, len(stack))
            stored = {
                f"{prefix}{i}.{name}": tensor.dtype for i in range(len(stack)) for name, tensor in layers[i].items()
            }
    return {
        name: (stored.get(name, DTYPES.get(tensor.dtype, str(tensor.dtype))), tuple(tensor.shape))
        for name, tensor in stack.model.named_parameters()
        if name.startswith(prefix)
    }


def _describe(tensor: tuple[str, tuple[int, ...]] | None) -> str:
    return "missing" if tensor is None else f"{tensor[0]} {list(tensor[1])}"


def _shorten(differences: list[str]) -> str:
    more = f", and {len(differences) - LISTED} more" if len(differences) > LISTED else ""
    return ", ".join(differences[:LISTED]) + more


def _natural(name: str) -> list[Any]:
    """Return a sort key that orders layer 2 before layer 10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def _rope(config: Any) -> str | None:
    settings = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return settings.get("rope_type") if isinstance(settings, Mapping) else None
