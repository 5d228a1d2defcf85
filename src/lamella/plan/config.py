"""The config of a model whose layers are another selection of the original's."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from lamella.errors import ExportError

PER_LAYER_LISTS = ("layer_types", "mlp_layer_types", "no_rope_layers")


def reindex(config: Any, order: Sequence[int]) -> Any:
    """A copy of ``config`` for a model whose layer i is the original's layer ``order[i]``.

    Lists with an entry per layer, layer numbers and per-layer overrides follow the layers.
    """
    new = copy.deepcopy(config)
    old_count = config.num_hidden_layers
    for name in PER_LAYER_LISTS:
        values = getattr(config, name, None)
        if values is not None:
            setattr(new, name, [values[layer] for layer in order])
    if hasattr(config, "mlp_only_layers"):  # Qwen3-MoE: which layers are dense, by number and by a period
        dense = set(config.mlp_only_layers or ())
        dense |= {layer for layer in range(old_count) if (layer + 1) % config.decoder_sparse_step}
        new.mlp_only_layers = [index for index, layer in enumerate(order) if layer in dense]
        new.decoder_sparse_step = 1
    if "max_window_layers" in config.to_dict():  # Qwen2: redundant beside layer_types, but must not contradict it
        new.max_window_layers = sum(layer < config.max_window_layers for layer in order)
    if _overrides(config):
        raise ExportError("this config overrides settings per layer (per_layer_config), which cannot be re-indexed yet")
    new.num_hidden_layers = len(order)
    return new


def _overrides(config: Any) -> bool:
    return bool(config.to_diff_dict().get("per_layer_config"))
