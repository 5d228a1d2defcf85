"""Whether layers of one checkpoint can stand in the other: two trainings of one architecture, and nothing else.

A difference inside the layers breaks a hybrid without a word, so each is named. What lies outside the layers may
differ: post-training adds tokens, and with them rows of the embedding.
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
PLAIN_ROPE = (None, "default", "linear", "llama3")  # rotations that do not depend on the longest length
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}  # as on disk
NAMED = 3  # differences that a message names


def check_pair(stack: Stack, base: Stack) -> None:
    """Check that layers of ``base`` can stand in ``stack``.

    Raises:
        ArchitectureError: when families, numbers of layers or settings differ that act inside a layer, field by field.
        PlanError: when tensors of the layers differ in name, shape or dtype, tensor by tensor; or one is quantised.
    """
    ours, theirs = ((each.architecture.name, len(each)) for each in (stack, base))
    if ours != theirs:
        raise ArchitectureError(
            f"{stack.name} is a {ours[0]} of {ours[1]} layers, {base.name} a {theirs[0]} of {theirs[1]}: give two "
            "checkpoints of one architecture"
        )
    for each in (stack, base):
        if getattr(each.config, "quantization_config", None):
            raise PlanError(f"{each.name} is quantised: its layers and others do not mix; give it unquantised")
    fields = differing_fields(stack.config, base.config)
    if fields:
        said = [f"{name} is {ours} and {theirs}" for name, (ours, theirs) in fields.items()]
        raise ArchitectureError(
            f"the configs of {stack.name} and {base.name} differ in what acts inside a layer: {_some(said)}; give two "
            "checkpoints of one architecture"
        )
    mine, others = _tensors(stack), _tensors(base)
    said = [
        f"{name} is {_described(mine.get(name))} and {_described(others.get(name))}"
        for name in sorted(mine.keys() | others.keys(), key=_natural)
        if mine.get(name) != others.get(name)
    ]
    if said:
        raise PlanError(f"the layers of {stack.name} and {base.name} differ: {_some(said)}")


def differing_fields(ours: Any, theirs: Any) -> dict[str, tuple[Any, Any]]:
    """The settings of two configs that differ and act inside a layer, by their dotted names."""
    mine, others = (_flat(fingerprint.settings(config)) for config in (ours, theirs))
    lengths = LENGTHS if all(_rope(config) in PLAIN_ROPE for config in (ours, theirs)) else frozenset()
    return {
        name: (mine.get(name), others.get(name))
        for name in sorted(mine.keys() | others.keys())
        if mine.get(name) != others.get(name)
        and name not in OUTSIDE | lengths
        and not name.endswith(("dropout", "pdrop"))  # acts while training alone
    }


def check_same_tokens(tokenizer: Any, base: Any) -> None:
    """Check that two tokenizers give the same numbers to the same tokens; added ones, as for a chat, may differ.

    Raises:
        ArchitectureError: naming a token that differs.
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
    """Dtype and shape of each tensor of the layers; the dtype on disk, where the model comes from safetensors."""
    prefix, stored = stack.architecture.prefix, {}
    if stack.path is not None and checkpoint.is_safetensors(stack.path):
        with suppress(CheckpointError):  # its layers have names that only transformers understands
            _, layers = checkpoint.read(stack.path).layers(prefix, len(stack))
            stored = {
                f"{prefix}{i}.{name}": tensor.dtype for i in range(len(stack)) for name, tensor in layers[i].items()
            }
    return {
        name: (stored.get(name, DTYPES.get(tensor.dtype, str(tensor.dtype))), tuple(tensor.shape))
        for name, tensor in stack.model.named_parameters()
        if name.startswith(prefix)
    }


def _described(tensor: tuple[str, tuple[int, ...]] | None) -> str:
    return "not there" if tensor is None else f"{tensor[0]} {list(tensor[1])}"


def _some(said: list[str]) -> str:
    more = f", and {len(said) - NAMED} more" if len(said) > NAMED else ""
    return ", ".join(said[:NAMED]) + more


def _natural(name: str) -> list[Any]:
    """Layer 2 before layer 10."""
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
