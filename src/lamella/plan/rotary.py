"""Rotary position settings under the names of transformers 4, in the config of an export.

Transformers 5 writes ``rope_parameters``. Transformers 4, and libraries that build on it, ignore that name and silently
use a default base and no scaling. So a config has both, which transformers 5 reads as before::

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
NAMES = dict.fromkeys(
    ("gpt_neox", "gpt_neox_japanese"), ("rotary_emb_base", "rotary_pct")
)  # where they differ from these
BY_LAYER_TYPE = {  # bases of full and sliding attention; only full attention is scaled
    **dict.fromkeys(("gemma3_text", "gemma3n_text"), ("rope_theta", "rope_local_base_freq")),
    "olmo3": ("rope_theta", "rope_theta"),
    "modernbert-decoder": ("global_rope_theta", "local_rope_theta"),
}
LONGROPE = {"phi3": ("type", "short_factor", "long_factor")}  # whose scaling may have no other entries


def with_older_names(settings: dict[str, Any], config: Any) -> dict[str, Any]:
    """Return the settings of a config.json with the names of transformers 4 in addition to ``rope_parameters``.

    Existing entries stay. Nothing is added that the installed transformers would read as a different config, nor where
    the rotary settings differ by layer type in a way that transformers 4 had no names for.

    Args:
        settings: what ``config`` has written.
        config: a config of transformers.
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
    """Return these ``rope_parameters`` under the names of transformers 4, as far as it has names for them."""
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
        return {}  # each layer type has its own
    older = {base: rope[BASE]} | ({share: rope[SHARE]} if SHARE in rope else {})
    return older | _scaled(model_type, rope)


def _scaled(model_type: str, rope: dict[str, Any]) -> dict[str, Any]:
    return {"rope_scaling": scaling} if (scaling := _scaling(model_type, rope)) else {}


def _scaling(model_type: str, rope: dict[str, Any]) -> dict[str, Any]:
    """Return how positions are scaled and other non-default settings; empty for plain rotary positions."""
    scaling = {name: value for name, value in rope.items() if name not in (BASE, SHARE)}
    if rope.get("rope_type") == "longrope" and model_type in LONGROPE:
        scaling = {name: rope[name] for name in LONGROPE[model_type] if name in rope}
    plain = rope.get("rope_type", "default") == "default" and not scaling.keys() - {"rope_type", "type"}
    return {} if plain else scaling


def _is_read_alike(settings: dict[str, Any], extended: dict[str, Any], config: PreTrainedConfig) -> bool:
    """Return whether the installed transformers reads both settings as the same config."""
    try:
        ours, theirs = (
            type(config).from_dict(copy.deepcopy(each) | {"model_type": config.model_type}).to_dict()
            for each in (settings, extended)
        )
    except Exception:  # config classes raise errors of many types
        return False
    return bool(ours == theirs)
