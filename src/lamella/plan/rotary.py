"""Rotary positions as transformers 4 spells them, in the config of an export.

Transformers 5 writes ``rope_parameters``. Transformers 4, and what is built on it, does not know the name, and takes a
base of its own and no scaling without a word. So a config says both, which transformers 5 reads as before::

    "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, ...}
    "rope_theta": 500000.0
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, ...}
"""

from __future__ import annotations

import copy
from typing import Any

from transformers import PreTrainedConfig

from lamella.plan.native import MODEL_TYPE

BASE, SHARE = "rope_theta", "partial_rotary_factor"
NAMES = dict.fromkeys(("gpt_neox", "gpt_neox_japanese"), ("rotary_emb_base", "rotary_pct"))  # that are not these
BY_LAYER_TYPE = {  # bases of full and of sliding attention; what is scaled is full attention
    **dict.fromkeys(("gemma3_text", "gemma3n_text"), ("rope_theta", "rope_local_base_freq")),
    "olmo3": ("rope_theta", "rope_theta"),
    "modernbert-decoder": ("global_rope_theta", "local_rope_theta"),
}
LONGROPE = {"phi3": ("type", "short_factor", "long_factor")}  # whose scaling may say nothing else


def with_older_names(settings: dict[str, Any], config: Any) -> dict[str, Any]:
    """The settings of a config.json with the names of transformers 4 beside ``rope_parameters``.

    What the file says already stays. Nothing is added that this transformers would read as another config, nor where
    positions differ by the type of a layer in a way that transformers 4 had no names for.

    Args:
        settings: what ``config``, one of transformers, has written.
    """
    settings = settings | {
        name: with_older_names(settings[name], part)
        for name, part in vars(config).items()
        if isinstance(part, PreTrainedConfig) and isinstance(settings.get(name), dict)
    }
    model_type = config.model_type.removeprefix(MODEL_TYPE.format(""))
    for name, value in _older_names(model_type, settings.get("rope_parameters")).items():
        if name not in settings and _is_read_alike(settings, settings | {name: value}, config):
            settings = settings | {name: value}
    return settings


def _older_names(model_type: str, rope: Any) -> dict[str, Any]:
    """What transformers 4 calls these ``rope_parameters``, as far as it has names for them."""
    if not isinstance(rope, dict):
        return {}
    if model_type in BY_LAYER_TYPE:
        full, sliding = rope.get("full_attention"), rope.get("sliding_attention")
        names = BY_LAYER_TYPE[model_type]
        if full is None or sliding is None or _scaling(model_type, sliding):
            return {}
        bases = dict(zip(names, (full.get(BASE), sliding.get(BASE)), strict=True))
        if len(bases) == 1 and full.get(BASE) != sliding.get(BASE):
            return {}
        return {name: base for name, base in bases.items() if base is not None} | _scaled(model_type, full)
    base, share = NAMES.get(model_type, (BASE, SHARE))
    if not isinstance(rope.get(BASE), int | float):
        return {}  # of every type of layers its own
    said = {base: rope[BASE]} | ({share: rope[SHARE]} if SHARE in rope else {})
    return said | _scaled(model_type, rope)


def _scaled(model_type: str, rope: dict[str, Any]) -> dict[str, Any]:
    return {"rope_scaling": scaling} if (scaling := _scaling(model_type, rope)) else {}


def _scaling(model_type: str, rope: dict[str, Any]) -> dict[str, Any]:
    """How positions are scaled, or what else is particular about them; nothing where they are plain."""
    scaling = {name: value for name, value in rope.items() if name not in (BASE, SHARE)}
    if rope.get("rope_type") == "longrope" and model_type in LONGROPE:
        scaling = {name: rope[name] for name in LONGROPE[model_type] if name in rope}
    plain = rope.get("rope_type", "default") == "default" and not scaling.keys() - {"rope_type", "type"}
    return {} if plain else scaling


def _is_read_alike(settings: dict[str, Any], said: dict[str, Any], config: PreTrainedConfig) -> bool:
    """Whether this transformers makes the same of both."""
    try:
        ours, theirs = (
            type(config).from_dict(copy.deepcopy(each) | {"model_type": config.model_type}).to_dict()
            for each in (settings, said)
        )
    except Exception:  # of any class of configs, anything
        return False
    return bool(ours == theirs)
