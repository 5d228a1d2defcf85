"""Native exports: models of which parts are gone, and the modelling file that lets plain transformers load them.

The file is the library's own source, carried along, so nothing is written twice. Lamella itself never runs it: whatever
lies in a folder, :func:`native_class` rebuilds the model from the library's code and what the config says.

A native checkpoint has a model type of its own (``lamella_llama``): software that does not run its modelling file must
refuse it, since loading it as a ``llama`` would fill the removed halves with random weights.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from string import Template
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

from lamella.errors import ArchitectureError, CheckpointError, ExportError
from lamella.plan import width
from lamella.plan.width import Widths, cut_model
from lamella.stack import Architecture, PartialLayer, find_architecture, halves, replace_forward, wiring

MODULE = "modeling_lamella"
MODEL_TYPE = "lamella_{}"

_TEMPLATE = Template('''\
"""A $base of which parts were removed. Written by Lamella; needs torch and transformers only."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from types import MethodType
from typing import Any

from torch import Tensor, nn
from transformers import $base, $config


$halves

$replace_forward

$remove_halves

$width

$leave_parts

class LamellaConfig($config):
    model_type = "$model_type"


class Lamella$base($base):
    """``config.lamella`` says of every layer whether its attention and its MLP run, and what is left of widths."""

    config_class = LamellaConfig

    def __init__(self, config: LamellaConfig) -> None:
        super().__init__(config)
        leave_parts(
            self,
            self.get_submodule("$layers"),
            config.lamella,
            $wiring,
            functions=($attn, $mlp),
            modules=($attn_modules, $mlp_modules),
            cache="$cache",
        )
''')


def remove_halves(layers: Any, kept: Iterable[tuple[bool, bool]], modules: tuple[Iterable[str], Iterable[str]]) -> None:
    """Delete the modules of the halves that do not run.

    Args:
        kept: for every layer, whether its attention and its MLP run.
        modules: for attention and MLP, the children of a layer that serve that half alone.
    """
    for layer, runs in zip(layers, kept, strict=True):
        for runs_half, names in zip(runs, modules, strict=True):
            for name in () if runs_half else names:
                delattr(layer, name)


def leave_parts(
    model: Any,
    layers: Any,
    said: Mapping[str, Any],
    wiring: Any,
    functions: tuple[Callable[..., Any], Callable[..., Any]],
    modules: tuple[Iterable[str], Iterable[str]],
    cache: str,
) -> None:
    """Leave of a model without weights what a native export has of it.

    Args:
        said: for every layer, whether its attention and its MLP run (``halves``), and what is left of widths.
        wiring: how its widths hang together; None where they cannot be cut.
        functions, modules: attention and MLP of its layers, and the children that serve them alone.
        cache: the keyword under which a layer receives the cache.
    """
    model.lamella_counts = said.get("width")
    if model.lamella_counts is not None:
        cut_model(model, layers, wiring, Widths.of_counts(model.lamella_counts))
    kept = said["halves"]
    remove_halves(layers, kept, modules)
    for slot, runs in enumerate(kept):
        if not all(runs):
            attn, mlp = (half if runs_half else None for half, runs_half in zip(functions, runs, strict=True))
            replace_forward(layers[slot], PartialLayer(attn, mlp, slot, cache))
    model.lamella_dropped = frozenset(2 * slot + k for slot, runs in enumerate(kept) for k in (0, 1) if not runs[k])


def modelling_file(model: Any) -> str:
    """The text of ``modeling_lamella.py`` for models of this class.

    Raises:
        ExportError: for a class or functions that live outside transformers and Lamella, so they cannot be carried.
    """
    architecture = _carried(model)
    return _TEMPLATE.substitute(
        base=type(model).__name__,
        config=type(model.config).__name__,
        model_type=MODEL_TYPE.format(model.config.model_type),
        halves=inspect.getsource(halves),
        replace_forward=inspect.getsource(replace_forward),
        remove_halves=inspect.getsource(remove_halves),
        width=_alone(wiring) + _alone(width),
        leave_parts=inspect.getsource(leave_parts),
        wiring=repr(architecture.wired),
        layers=architecture.prefix.removesuffix("."),
        attn=architecture["attn"].run.__name__,
        mlp=architecture["mlp"].run.__name__,
        attn_modules=architecture["attn"].modules,
        mlp_modules=architecture["mlp"].modules,
        cache=architecture.cache,
    )


def _alone(module: Any) -> str:
    """The source of a module without what it imports from this package, which is carried along before it."""
    lines = inspect.getsource(module).splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith("from lamella."))


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


# Opening what was exported.


LayerName = Annotated[str, Field(pattern=r"^\d{1,6}$")]
Count = Annotated[int, Field(ge=1)]
Heads = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class _Counts(BaseModel):
    """What is left of each width; see :meth:`lamella.plan.width.Widths.counts`."""

    model_config = ConfigDict(extra="forbid")

    channels: dict[LayerName, Count]
    kv_of: dict[LayerName, Heads]
    stream: Count | None
    rescale: bool


class Said(BaseModel):
    """What the ``lamella`` of a config.json says: which halves are there, or that the whole model runs a plan."""

    model_config = ConfigDict(extra="forbid")

    form: Literal["native"]
    halves: list[tuple[bool, bool]] | None = None
    width: _Counts | None = None
    plan: Literal["plan.json"] | None = None


def said_of(settings: Mapping[str, Any], where: str) -> Said | None:
    """What a config.json says of a native export; None for other checkpoints.

    Raises:
        CheckpointError: when it says what no export does.
    """
    cut = str(settings.get("model_type")).startswith(MODEL_TYPE.format(""))
    if "lamella" not in settings and not cut:
        return None
    try:
        said = Said.model_validate(settings.get("lamella"))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, ("lamella", *first["loc"])))
        raise CheckpointError(f"{where}: {field}: {first['msg']}: this is no export of Lamella, get it again") from None
    if cut != (said.halves is not None) or cut == (said.plan is not None):
        raise CheckpointError(f"{where}: its model_type and its lamella contradict each other: get it again")
    return said


def config_class(model_type: str) -> Any:
    """The config of a native export, by its model type; that of transformers with this type."""
    return _classes(model_type)[0]


def native_class(model_type: str) -> Any:
    """The model of a native export, by its model type: the class of transformers, from which parts are taken.

    Raises:
        ArchitectureError: for a model type that native exports do not have.
    """
    return _classes(model_type)[1]


@cache
def _classes(model_type: str) -> tuple[Any, Any]:
    plain = model_type.removeprefix(MODEL_TYPE.format(""))
    if plain not in CONFIG_MAPPING:
        raise ArchitectureError(f"unknown architecture '{model_type}': transformers has no {plain}")
    known = CONFIG_MAPPING[plain]
    config = type("LamellaConfig", (known,), {"model_type": model_type, "__module__": __name__})
    architecture = find_architecture(config)
    mapping = MODEL_FOR_CAUSAL_LM_MAPPING if architecture.causal else MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    base: Any = mapping[known]

    def init(self: Any, config: Any) -> None:
        super(model, self).__init__(config)
        leave_parts(
            self,
            self.get_submodule(architecture.prefix.removesuffix(".")),
            config.lamella,
            architecture.wired,
            (architecture["attn"].run, architecture["mlp"].run),
            (architecture["attn"].modules, architecture["mlp"].modules),
            architecture.cache,
        )

    body = {"__init__": init, "config_class": config, "__module__": __name__}
    model: Any = type(f"Lamella{base.__name__}", (base,), body)
    return config, model


def _carried(model: Any) -> Architecture:
    architecture = find_architecture(model.config)
    for thing in (type(model), type(model.config)):
        if not thing.__module__.startswith("transformers."):
            raise ExportError(
                f"{thing.__name__} is no class of transformers, so a native export cannot name it: use --form portable"
            )
    for half in (architecture["attn"].run, architecture["mlp"].run):
        if half.__module__ != halves.__name__:
            raise ExportError(
                f"{half.__name__} lies in {half.__module__}, which a native export cannot carry: use --form portable"
            )
    return architecture
