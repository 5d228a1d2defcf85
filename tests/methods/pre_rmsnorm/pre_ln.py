"""Nano models of every Pre-LN type that is known, in float64, with random affines."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from lamella.methods.pre_rmsnorm.checking import output
from lamella.methods.pre_rmsnorm.rewrite import Form
from lamella.plan import RewriteReference
from lamella.plan.rewriting import with_rewrite
from lamella.stack import Model, open_model
from lamella.zoo.nano import nano, nano_inputs, randomise

TEXT = ("gpt2", "opt", "gpt_neox", "gpt_neox_serial", "bloom")
IMAGES = ("vit", "clip", "dinov2", "dinov2_with_registers")
FAMILIES = (*TEXT, *IMAGES, "whisper")
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
TOWERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "clip": (transformers.CLIPVisionModel, transformers.CLIPVisionConfig, {"intermediate_size": 64}),
    "dinov2": (transformers.Dinov2Model, transformers.Dinov2Config, {"mlp_ratio": 2}),
    "dinov2_with_registers": (
        transformers.Dinov2WithRegistersModel,
        transformers.Dinov2WithRegistersConfig,
        {"mlp_ratio": 2, "num_register_tokens": 3},
    ),
}


def built(name: str, offset: float = 0.0, **settings: Any) -> Model:
    """A nano model in float64.

    Args:
        offset: added to every number of the token embedding (of images, the positions'), which makes errors with ties
            loud.
        settings: fields of its config that differ.
    """
    if name == "bloom":
        sizes = {"vocab_size": 128, "hidden_size": 32, "n_layer": 3, "n_head": 4}
        model = transformers.BloomForCausalLM(transformers.BloomConfig(**sizes | settings))
        randomise(model, 0)
    elif name in TOWERS:
        kind, config, sizes = TOWERS[name]
        model = kind(config(**SIZES | sizes | {"image_size": 16, "patch_size": 4} | settings))
        randomise(model, 0)
    else:
        model = nano(name, **settings)
    model = model.double().eval()
    with torch.no_grad():
        table_of(model, name).add_(offset)
    return open_model(model, name=name)


def table_of(model: Any, name: str) -> torch.Tensor:
    """A table that writes the beginning of the stream."""
    if name == "clip":
        return model.embeddings.position_embedding.weight
    if name in IMAGES:
        return getattr(model, "vit", model).embeddings.position_embeddings
    return model.get_input_embeddings().weight


def inputs(name: str) -> dict[str, torch.Tensor]:
    given = nano_inputs("vit" if name in IMAGES else "gpt2" if name == "bloom" else name)
    if name == "bloom":  # at padding its attention is no number
        del given["attention_mask"]
    return {key: each.double() if each.is_floating_point() else each for key, each in given.items()}


def written(model: Model, form: Form) -> Any:
    """The transformers model that a form makes of it."""
    return with_rewrite(model, RewriteReference(name="pre-rmsnorm", params=vars(form))).model


def error(model: Any, other: Any, given: dict[str, torch.Tensor]) -> float:
    """The largest difference of what two transformers models give in the end."""
    with torch.no_grad():
        return float((output(model, given) - output(other, given)).abs().max())
