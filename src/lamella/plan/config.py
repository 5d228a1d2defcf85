"""The config of a model whose layers are a selection of the original's, or are narrower."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from lamella.errors import ExportError, PlanError
from lamella.plan.schema import Plan
from lamella.plan.width import Heads
from lamella.stack import ARCHITECTURES, Architecture, Stack, kind_of, numeric_attributes
from lamella.stack.wiring import Sizes

PER_LAYER_LISTS = ("layer_types", "mlp_layer_types", "no_rope_layers")
NOT_PER_LAYER = (
    "token_id",
    "token_ids",
    "architectures",
    "_tokens",
)  # lists whose length may equal the number of layers by coincidence


def reindex(config: Any, order: Sequence[int], architecture: Architecture) -> Any:
    """Return a copy of ``config`` for a model whose layer i is the original's layer ``order[i]``.

    Lists with one entry per layer, layer indices and per-layer overrides follow the layers.

    Args:
        config: config of the original stack.
        order: index of the original layer for each new layer.
        architecture: entry of the stack's architecture.

    Raises:
        ExportError: for a config with per-layer overrides.
    """
    new = copy.deepcopy(config)
    count = architecture.sizes["layers"]
    old_count = getattr(config, count)
    for name, values in _per_layer(config, old_count).items():
        setattr(new, name, [values[layer] for layer in order])
    if hasattr(config, "mlp_only_layers"):  # Qwen3-MoE: which layers are dense, by index and by a period
        dense = set(config.mlp_only_layers or ())
        dense |= {layer for layer in range(old_count) if (layer + 1) % config.decoder_sparse_step}
        new.mlp_only_layers = [index for index, layer in enumerate(order) if layer in dense]
        new.decoder_sparse_step = 1
    if "max_window_layers" in config.to_dict():  # Qwen2: redundant with layer_types, but must not contradict it
        new.max_window_layers = sum(layer < config.max_window_layers for layer in order)
    if hasattr(config, "stage_names"):  # DINOv2: names of the input and of each layer's output; the last is the output
        new.stage_names = new.stage_names[: len(order) + 1]
        new.set_output_features_output_indices(out_features=None, out_indices=None)
    if _overrides(config):
        raise ExportError("this config overrides settings per layer (per_layer_config), which cannot be re-indexed yet")
    setattr(new, count, len(order))
    return new


def _per_layer(config: Any, layers: int) -> dict[str, list[Any]]:
    """Return the lists of a config that have one entry per layer."""
    lists = {name: value for name, value in vars(config).items() if isinstance(value, list | tuple)}
    return {
        name: list(values)
        for name, values in lists.items()
        if name in PER_LAYER_LISTS or (len(values) == layers and not name.endswith(NOT_PER_LAYER))
    }


def check_alike(model: Any, stack: Stack, order: Sequence[int]) -> None:
    """Check that a new config builds the same layers as the original, before weights are loaded into them.

    Args:
        model: model that was built from the new config.
        stack: the original stack.
        order: index of the original layer for each new layer.

    Raises:
        ExportError: if a layer differs, because the config derives it from the layer's index in a way that
            :func:`reindex` does not handle.
    """
    layers = model.get_submodule(stack.architecture.prefix.removesuffix("."))
    for index, layer in enumerate(order):
        new, old = layers[index], stack.layers[layer]
        same = kind_of(new) == kind_of(old) and numeric_attributes(new) == numeric_attributes(old)
        if not same or not _same_buffers(stack, index, layer):
            raise ExportError(
                f"the config of {stack.architecture.name} models counts layers, so it cannot express that "
                f"layers.{layer} becomes layers.{index}: remove other layers, or single sublayers with --form native"
            )


def _same_buffers(stack: Stack, index: int, layer: int) -> bool:
    """Return whether the non-persistent buffers of a layer are the same at another index."""
    if index == layer:
        return True
    stored = stack.layers[layer].state_dict()
    made = {name: each for name, each in stack.layers[layer].named_buffers() if name not in stored}
    there = dict(stack.layers[min(index, len(stack) - 1)].named_buffers())
    return all(name in there and not each.is_meta and torch.equal(each, there[name]) for name, each in made.items())


def _overrides(config: Any) -> bool:
    return bool(config.to_diff_dict().get("per_layer_config"))


def common_sizes(plan: Plan) -> Sizes:
    """Return the sizes that an ordinary config can state for a model under a width plan.

    Args:
        plan: a plan with widths.

    Raises:
        PlanError: if no config can express the widths, with the reason.
    """
    whole, widths, architecture = plan.model.sizes, plan.widths, ARCHITECTURES[plan.model.family]
    assert whole is not None
    layers = sorted({run.layer for phase in ("prefill", "decode") for run in plan.runs(phase)})
    for layer, kept in widths.heads.items():
        if layer in layers and not kept.regular:
            raise PlanError(f"a config cannot express which key-value head each query head of layers.{layer} reads")
    everything = Heads(range(whole.heads), [head * whole.kv_heads // whole.heads for head in range(whole.heads)])
    channels = {len(widths.channels.get(layer, range(whole.channels))) for layer in layers}
    by_layer = [widths.heads.get(layer, everything) for layer in layers]
    heads = {(len(kept.keep), len(kept.kv_keep)) for kept in by_layer}
    for what, count in (("channels", len(channels)), ("heads", len(heads))):
        if count > 1:
            raise PlanError(f"a config cannot express that layers have different numbers of {what}")
    hidden = whole.hidden if widths.hidden is None else len(widths.hidden)
    if widths.rescale and architecture.wiring.shared_eps and hidden < whole.hidden:
        raise PlanError(f"{plan.model.family} models have one epsilon for all norms, and rescale needs two")
    [(queries, keys)] = heads
    if not architecture.fits(hidden, queries, whole.head_dim):
        why = "cannot express a head size, so the heads must fill the hidden size"
        if architecture.wiring.divides:
            why = f"needs a hidden size that is a multiple of the query heads: {hidden} is not a multiple of {queries}"
        raise PlanError(f"the config of {plan.model.family} models {why}")
    return Sizes(hidden, channels.pop(), queries, keys, whole.head_dim)


def resize(configs: Iterable[Any], architecture: Architecture, sizes: Sizes, eps: float) -> None:
    """Set these sizes in configs.

    Args:
        configs: configs of a model and of its parts, which are changed.
        architecture: entry of the stack's architecture, which names the fields.
        sizes: the new sizes.
        eps: factor for the epsilon of the norms.
    """
    values = {
        "hidden": sizes.hidden,
        "channels": sizes.channels,
        "heads": sizes.heads,
        "kv_heads": sizes.kv_heads,
        "head_dim": sizes.head_dim,
    }
    for config in configs:
        for axis, size in values.items():
            if axis in architecture.sizes:
                setattr(config, architecture.sizes[axis], size)
        if eps != 1:
            config.rms_norm_eps *= eps


TOKEN_IDS = ("token_id", "token_ids")  # ends of the names of settings that are ids of tokens
TOKEN_LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids")


def rename_tokens(settings: Mapping[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """Return the settings of a config that are ids of tokens, such as ``eos_token_id``, with their new ids.

    Args:
        settings: settings by name, of a config or of a generation config.
        kept: old ids of the kept tokens, ascending.

    Raises:
        PlanError: for a setting that names a token which is not kept.
    """
    new = {old: index for index, old in enumerate(kept)}

    def renamed(name: str, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [renamed(name, each) for each in value]
        if value is None or value < 0:  # some configs write -1 for none
            return value
        if value not in new:
            raise PlanError(f"width: vocab: lacks token {value}, which is the {name} of the model: keep it")
        return new[value]

    return {name: renamed(name, value) for name, value in settings.items()
            if name.endswith(TOKEN_IDS) or name in TOKEN_LISTS}  # fmt: skip


def cut_vocabulary_of(config: Any, kept: Sequence[int]) -> None:
    """Set the size of a smaller vocabulary in a config, and the new ids of its tokens.

    Args:
        config: config of a model, or its generation config, which has no size; it is changed.
        kept: old ids of the kept tokens, ascending.
    """
    for name, value in rename_tokens(vars(config), kept).items():
        setattr(config, name, value)
    if hasattr(config, "vocab_size"):
        config.vocab_size = len(kept)
