"""The modelling file of a native export: the library's own source, carried along, so nothing is written twice.

A native checkpoint has a model type of its own (``lamella_llama``): software that does not run its modelling file must
refuse it, since loading it as a ``llama`` would fill the removed halves with random weights.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from string import Template
from typing import Any

from torch import nn

from lamella.errors import ExportError
from lamella.plan import width
from lamella.stack import Family, find_family, halves, replace_forward

MODULE = "modeling_lamella"
MODEL_TYPE = "lamella_{}"

_TEMPLATE = Template('''\
"""A $base of which parts were removed. Written by Lamella; needs torch and transformers only."""

import inspect
from collections.abc import Callable, Iterable
from types import MethodType
from typing import Any

from torch import Tensor, nn
from transformers import $base, $config


$halves

$replace_forward

$remove_halves

$width

class LamellaConfig($config):
    model_type = "$model_type"


class Lamella$base($base):
    """``config.lamella`` says of every layer whether its attention and its MLP run, and what is left of widths."""

    config_class = LamellaConfig

    def __init__(self, config: LamellaConfig) -> None:
        super().__init__(config)
        kept = config.lamella["halves"]
        layers = self.get_submodule("$layers")
        self.lamella_counts = config.lamella.get("width")
        if self.lamella_counts is not None:
            cut_model(self, layers, WIRINGS["$family"], Widths.of_counts(self.lamella_counts))
        remove_halves(layers, kept, $attn_modules, $mlp_modules)
        for slot, (attn, mlp) in enumerate(kept):
            if not (attn and mlp):
                partial = PartialLayer($attn if attn else None, $mlp if mlp else None, slot, "$cache")
                replace_forward(layers[slot], partial)
        self.lamella_dropped = frozenset(2 * slot + k for slot, runs in enumerate(kept) for k in (0, 1) if not runs[k])
''')


def remove_halves(
    layers: nn.ModuleList, kept: Iterable[tuple[bool, bool]], attn_modules: Iterable[str], mlp_modules: Iterable[str]
) -> None:
    """Delete the modules of the halves that do not run.

    Args:
        kept: for every layer, whether its attention and its MLP run.
        attn_modules, mlp_modules: the children of a layer that serve that half alone.
    """
    for layer, runs in zip(layers, kept, strict=True):
        for runs_half, names in zip(runs, (attn_modules, mlp_modules), strict=True):
            for name in () if runs_half else names:
                delattr(layer, name)


def modelling_file(model: Any) -> str:
    """The text of ``modeling_lamella.py`` for models of this class.

    Raises:
        ExportError: for a class or a family that lives outside transformers and Lamella, so it cannot be carried along.
    """
    family = _carried(model)
    return _TEMPLATE.substitute(
        base=type(model).__name__,
        config=type(model.config).__name__,
        model_type=MODEL_TYPE.format(model.config.model_type),
        halves=inspect.getsource(halves),
        replace_forward=inspect.getsource(replace_forward),
        remove_halves=inspect.getsource(remove_halves),
        width=inspect.getsource(width),
        family=family.name,
        layers=family.prefix.removesuffix("."),
        attn=family.attn.__name__,
        mlp=family.mlp.__name__,
        attn_modules=family.attn_modules,
        mlp_modules=family.mlp_modules,
        cache=family.cache,
    )


def config_entries(
    model: Any, auto_class: str, kept: Iterable[tuple[bool, bool]], counts: dict[str, Any] | None = None
) -> dict[str, Any]:
    """What ``config.json`` says beside the ordinary settings, so that transformers finds the modelling file.

    Args:
        kept: for every layer, whether its attention and its MLP run.
        counts: what is left of each width, where no ordinary setting can say it.
    """
    name = f"Lamella{type(model).__name__}"
    return {
        "model_type": MODEL_TYPE.format(model.config.model_type),
        "architectures": [name],
        "auto_map": {"AutoConfig": f"{MODULE}.LamellaConfig", auto_class: f"{MODULE}.{name}"},
        "lamella": {"form": "native", "halves": [list(runs) for runs in kept]} | ({"width": counts} if counts else {}),
    }


def _carried(model: Any) -> Family:
    family = find_family(model.config)
    for thing in (type(model), type(model.config)):
        if not thing.__module__.startswith("transformers."):
            raise ExportError(
                f"{thing.__name__} is no class of transformers, so a native export cannot name it: use --form portable"
            )
    for half in (family.attn, family.mlp):
        if half.__module__ != halves.__name__:
            raise ExportError(
                f"{half.__name__} lies in {half.__module__}, which a native export cannot carry: use --form portable"
            )
    return family
