"""Native exports: models that no config of transformers says, and the modelling file that lets it load them.

Of some, parts are gone; others are written otherwise as a whole (:mod:`lamella.plan.rewriting`).

The file is the library's own source, carried along, so nothing is written twice. Lamella itself never runs it: whatever
lies in a folder, :func:`native_class` rebuilds the model from the library's code and what the config says.

A native checkpoint has a model type of its own (``lamella_llama``): software that does not run its modelling file must
refuse it, since loading it as a ``llama`` would fill the removed parts with random weights.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from string import Template
from typing import Annotated, Any, Literal

import torch
import transformers
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import CONFIG_MAPPING

from lamella.errors import ArchitectureError, CheckpointError, ExportError
from lamella.plan import width
from lamella.plan.entries import RewriteReference
from lamella.plan.rewriting import carry_out, code_of, wirings_of
from lamella.plan.width import Widths, cut_model
from lamella.stack import (
    Architecture,
    ByKind,
    DerivedCode,
    PartialLayer,
    diffusion_config,
    find_architecture,
    find_architectures,
    own_class,
    replace_forward,
    sublayers,
    wiring,
)

MODULE = "modeling_lamella"
MODEL_TYPE = "lamella_{}"

_TEMPLATE = Template('''\
"""A $base of which parts were removed. Written by Lamella; needs torch and transformers only."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from types import MethodType
from typing import Any

from torch import Tensor, nn

$classes


$sublayers
$derived
$replace_forward

$remove_sublayers

$width

$leave_parts

class LamellaConfig($config):
    model_type = "$model_type"


class Lamella$base($base):
    """``config.lamella`` says which sublayers of every layer are there, and what is left of widths."""

    config_class = LamellaConfig

    def __init__(self, config: LamellaConfig) -> None:
        super().__init__(config)
        leave_parts(
            self,
            self.get_submodule("$layers"),
            config.lamella,
            $wiring,
            functions={$functions},
            modules=$modules,
            cache="$cache",
            result=$result,
        )
''')

_REWRITTEN = Template('''\
"""A $base that Lamella has rewritten ($method); it computes the same. Needs torch and transformers only."""

$classes


$code

class LamellaConfig($config):
    model_type = "$model_type"


class Lamella$base($base):
    """``config.lamella`` says what it is rewritten to."""

    config_class = LamellaConfig

    def __init__(self, config: LamellaConfig) -> None:
        super().__init__(config)
        rewrite(self, $wirings, Form(**config.lamella["rewrite"]["params"]))
''')


def remove_sublayers(layers: Any, kept: Iterable[Iterable[str]], modules: Mapping[str, Iterable[str]]) -> None:
    """Delete the modules of the sublayers that do not run.

    Args:
        kept: for every layer, the names of the sublayers that run.
        modules: by the name of a sublayer, the children of a layer that serve it alone.
    """
    for layer, names in zip(layers, kept, strict=True):
        for gone in modules.keys() - set(names):
            for name in modules[gone]:
                if hasattr(layer, name):  # layers of several kinds have not all of them
                    delattr(layer, name)


def leave_parts(
    model: Any,
    layers: Any,
    metadata: Mapping[str, Any],
    wiring: Any,
    functions: Mapping[str, Callable[..., Any]],
    modules: Mapping[str, Iterable[str]],
    cache: str,
    result: Callable[..., Any] | None = None,
) -> None:
    """Leave of a model without weights what a native export has of it.

    Args:
        metadata: for every layer, the names of the ``sublayers`` that run, and what is left of ``width``.
        wiring: how its widths hang together; None where they cannot be cut.
        functions, modules: of its sublayers, by name and in their order: what computes them, and the children of a
            layer that serve them alone.
        cache: the keyword under which a layer receives the cache.
        result: what a layer returns for a stream, where that is more than the stream.
    """
    model.lamella_counts = metadata.get("width")
    if model.lamella_counts is not None:
        cut_model(model, layers, wiring, Widths.of_counts(model.lamella_counts))
    kept = metadata["sublayers"]
    remove_sublayers(layers, kept, modules)
    for slot, names in enumerate(kept):
        if not functions.keys() <= set(names):
            left = {name: run if name in names else None for name, run in functions.items()}
            replace_forward(layers[slot], PartialLayer(left, slot, cache, result=result))
    model.lamella_dropped = frozenset(
        (slot, name) for slot, names in enumerate(kept) for name in functions if name not in names
    )


def modelling_file(model: Any) -> str:
    """The text of ``modeling_lamella.py`` for models of this class.

    Raises:
        ExportError: for a class or functions that live outside transformers and Lamella, so they cannot be carried.
    """
    architecture = _carried(model)
    return _TEMPLATE.substitute(
        base=type(model).__name__,
        config=type(model.config).__name__,
        classes=_origin(model),
        model_type=MODEL_TYPE.format(model.config.model_type),
        sublayers=inspect.getsource(sublayers),
        derived="".join(map(_definitions, architecture.sources)),
        replace_forward=inspect.getsource(replace_forward),
        remove_sublayers=inspect.getsource(remove_sublayers),
        width=_alone(wiring) + _alone(width),
        leave_parts=inspect.getsource(leave_parts),
        wiring=repr(architecture.wired),
        layers=architecture.prefix.removesuffix("."),
        functions=", ".join(f'"{each.name}": {_named(each.run)}' for each in architecture.sublayers),
        modules={each.name: each.modules for each in architecture.sublayers},
        cache=architecture.cache,
        result=architecture.result,
    )


def rewritten_file(model: Any, reference: RewriteReference) -> str:
    """The text of ``modeling_lamella.py`` for models of this class, written otherwise.

    Raises:
        ExportError: for a class that lives outside transformers and Lamella, so it cannot be carried.
    """
    _check_class(model)
    return _REWRITTEN.substitute(
        base=type(model).__name__,
        config=type(model.config).__name__,
        classes=_origin(model),
        model_type=MODEL_TYPE.format(model.config.model_type),
        method=reference.name,
        code=_alone(wiring) + _alone(code_of(reference)),
        wirings=repr(wirings_of(find_architectures(model.config))),
    )


def check_buffers(model: Any, layers: Any) -> None:
    """Check that whatever no checkpoint holds of a layer is filled by the module that has it, when it is loaded.

    Some models fill it in all layers at once, which then lack what was removed.

    Raises:
        ExportError: when it is not.
    """
    for path, module in layers.named_modules():
        for name in sorted(module._non_persistent_buffers_set):
            again = copy.deepcopy(module, {id(each): each.to("meta") for each in module.parameters()})
            buffer = again._buffers[name]
            if buffer is None or not buffer.is_floating_point():
                continue
            again._buffers[name] = torch.full_like(buffer, torch.nan)
            model._init_weights(again)
            if again._buffers[name].isnan().any():
                raise ExportError(
                    f"native: a {type(model).__name__} fills layers.{path}.{name} of all its layers at once, which a "
                    "layer without it hinders: use --form portable"
                )


def is_own(model: Any) -> bool:
    """Whether a model is of a class of the library's own, which transformers alone does not load."""
    return type(model) is own_class(model.config.model_type)


def _origin(model: Any) -> str:
    """Where the file has the classes of model and config from: transformers, or the source of the library's own."""
    if is_own(model):
        from lamella.stack import diffusion

        return _alone(diffusion_config) + _alone(diffusion)
    return f"from transformers import {type(model).__name__}, {type(model.config).__name__}"


def _definitions(source: DerivedCode) -> str:
    """The functions of a derived sublayer, which use names of the module that they come from."""
    names = f"from {source.module} import {', '.join(source.names)}\n\n\n" if source.names else ""
    return f"\n\n{names}{source.text}\n"


def _named(run: Any) -> str:
    """The expression for a sublayer's function in the modelling file."""
    if not isinstance(run, ByKind):
        return run.__name__
    functions = ", ".join(f'"{kind}": {function.__name__}' for kind, function in run.functions.items())
    return f'ByKind("{run.name}", {{{functions}}})'


def _alone(module: Any) -> str:
    """The source of a module without what it imports from this package, which is carried along before it."""
    lines = inspect.getsource(module).splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith("from lamella."))


def config_entries(
    model: Any, auto_class: str, kept: Iterable[Iterable[str]], counts: dict[str, Any] | None = None
) -> dict[str, Any]:
    """What ``config.json`` says beside the ordinary settings, so that transformers finds the modelling file.

    Args:
        kept: for every layer, the names of the sublayers that run.
        counts: what is left of each width, where no ordinary setting can say it.
    """
    metadata = {"sublayers": [list(names) for names in kept]} | ({"width": counts} if counts else {})
    return _entries(model, auto_class, metadata)


def rewritten_entries(model: Any, auto_class: str, reference: RewriteReference) -> dict[str, Any]:
    """:func:`config_entries` of a model that is written otherwise."""
    return _entries(model, auto_class, {"rewrite": reference.model_dump()})


def _entries(model: Any, auto_class: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
    name = f"Lamella{type(model).__name__}"
    return {
        "model_type": MODEL_TYPE.format(model.config.model_type),
        "architectures": [name],
        "auto_map": {"AutoConfig": f"{MODULE}.LamellaConfig", auto_class: f"{MODULE}.{name}"},
        "lamella": {"form": "native", **metadata},
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
    hidden: Count | None
    rescale: bool


Name = Literal["attn", "cross", "mlp"]
SUBLAYERS: tuple[Name, Name] = ("attn", "mlp")  # of a layer of a decoder


class NativeMetadata(BaseModel):
    """What the ``lamella`` of a config.json says: which sublayers are there, what the model is rewritten to, or that
    the whole model runs a plan.
    """

    model_config = ConfigDict(extra="forbid")

    form: Literal["native"]
    sublayers: list[list[Name]] | None = None
    width: _Counts | None = None
    rewrite: RewriteReference | None = None
    plan: Literal["plan.json"] | None = None

    @property
    def is_own_class(self) -> bool:
        """Whether the model is of a class that transformers lacks: the one that it was made of, changed."""
        return self.sublayers is not None or self.rewrite is not None


def read_metadata(settings: Mapping[str, Any], where: str) -> NativeMetadata | None:
    """What a config.json says of a native export; None for other checkpoints.

    Raises:
        CheckpointError: when it says what no export does.
    """
    cut = str(settings.get("model_type")).startswith(MODEL_TYPE.format(""))
    if "lamella" not in settings and not cut:
        return None
    try:
        metadata = NativeMetadata.model_validate(settings.get("lamella"))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, ("lamella", *first["loc"])))
        raise CheckpointError(f"{where}: {field}: {first['msg']}: this is no export of Lamella, get it again") from None
    if cut != metadata.is_own_class or cut == (metadata.plan is not None):
        raise CheckpointError(f"{where}: its model_type and its lamella contradict each other: get it again")
    return metadata


@cache
def config_class(model_type: str) -> Any:
    """The config of a native export, by its model type: that of transformers with this type.

    Raises:
        ArchitectureError: for a model type that native exports do not have.
    """
    plain = model_type.removeprefix(MODEL_TYPE.format(""))
    if plain not in CONFIG_MAPPING:
        raise ArchitectureError(f"unknown architecture '{model_type}': transformers has no {plain}")
    own_class(plain)
    return type("LamellaConfig", (CONFIG_MAPPING[plain],), {"model_type": model_type, "__module__": __name__})


@cache
def native_class(model_type: str, auto: str) -> Any:
    """The model of a native export: the class of transformers, from which parts are taken, or which is rewritten.

    Args:
        model_type: of its config.
        auto: the class of transformers that opens the model without what was done to it.

    Raises:
        ArchitectureError: for a model type that native exports do not have.
    """
    config = config_class(model_type)
    base: Any = getattr(transformers, auto)._model_mapping[config.__base__]

    def init(self: Any, config: Any) -> None:
        super(model, self).__init__(config)
        metadata = read_metadata({"model_type": model_type, "lamella": config.lamella}, model_type)
        assert metadata is not None
        if metadata.rewrite is not None:
            carry_out(self, find_architectures(config), metadata.rewrite)
            return
        architecture = find_architecture(config)
        leave_parts(
            self,
            self.get_submodule(architecture.prefix.removesuffix(".")),
            metadata.model_dump(),
            architecture.wired,
            {each.name: each.run for each in architecture.sublayers},
            {each.name: each.modules for each in architecture.sublayers},
            architecture.cache,
            architecture.result,
        )

    body = {"__init__": init, "config_class": config, "__module__": __name__}
    model: Any = type(f"Lamella{base.__name__}", (base,), body)
    return model


def _carried(model: Any) -> Architecture:
    architecture = find_architecture(model.config)
    _check_class(model)
    for run in (each.run for each in architecture.sublayers if not architecture.sources):
        if run.__module__ != sublayers.__name__:
            raise ExportError(
                f"{run.__name__} lies in {run.__module__}, which a native export cannot carry: use --form portable"
            )
    return architecture


def _check_class(model: Any) -> None:
    for thing in () if is_own(model) else (type(model), type(model.config)):
        if not thing.__module__.startswith("transformers."):
            raise ExportError(
                f"{thing.__name__} is no class of transformers, so a native export cannot name it: use --form portable"
            )
