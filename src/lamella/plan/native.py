"""Native exports: models that no config of transformers can describe, with the modelling file that transformers needs.

Some lack parts; others are rewritten as a whole (:mod:`lamella.plan.rewriting`).

The modelling file consists of the library's own source, so nothing is written twice. Lamella itself never runs it:
:func:`native_class` rebuilds the model from the library's code and the config, whatever the folder contains.

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
"""A $base with parts removed. Written by Lamella; needs torch and transformers only."""

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
    """A model with the sublayers and widths that ``config.lamella`` lists."""

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
    """A model rewritten as ``config.lamella`` specifies."""

    config_class = LamellaConfig

    def __init__(self, config: LamellaConfig) -> None:
        super().__init__(config)
        rewrite(self, $wirings, Form(**config.lamella["rewrite"]["params"]))
''')


def remove_sublayers(layers: Any, kept: Iterable[Iterable[str]], modules: Mapping[str, Iterable[str]]) -> None:
    """Delete the modules of the sublayers that do not run.

    Args:
        layers: the layers, which are changed.
        kept: for every layer, the names of the sublayers that run.
        modules: by the name of a sublayer, the children of a layer that only this sublayer uses.
    """
    for layer, names in zip(layers, kept, strict=True):
        for gone in modules.keys() - set(names):
            for name in modules[gone]:
                if hasattr(layer, name):  # not every kind of layer has all of them
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
    """Remove from a model without weights the parts that a native export does not have.

    Args:
        model: the model, which is changed.
        layers: its layers.
        metadata: for every layer, the names of the ``sublayers`` that run; and the remaining ``width``.
        wiring: the axes of its modules; None if it cannot be narrowed.
        functions: functions of its sublayers, by name and in order.
        modules: by the name of a sublayer, the children of a layer that only this sublayer uses.
        cache: keyword under which a layer receives the cache.
        result: turns hidden states into what a layer returns, for layers that return more than hidden states.
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
    """Return the text of ``modeling_lamella.py`` for models of this class.

    Args:
        model: the model.

    Raises:
        ExportError: for a class or functions defined outside transformers and Lamella, which cannot be included.
    """
    architecture = _check_exportable(model)
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
    """Return the text of ``modeling_lamella.py`` for rewritten models of this class.

    Args:
        model: the original model.
        reference: the rewriting.

    Raises:
        ExportError: for a class defined outside transformers and Lamella, which cannot be included.
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
    """Check that each module initialises its own non-persistent buffers when a checkpoint is loaded.

    Some models initialise the buffers of all layers at once, which fails if some are removed.

    Args:
        model: the model.
        layers: its layers.

    Raises:
        ExportError: if they are not.
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
                    f"native: a {type(model).__name__} initialises layers.{path}.{name} of all its layers at once, "
                    "which fails if a layer lacks it: use --form portable"
                )


def is_own(model: Any) -> bool:
    """Return whether a model is of a class defined by Lamella, which transformers alone cannot load."""
    return type(model) is own_class(model.config.model_type)


def _origin(model: Any) -> str:
    """Return the import or the source of the classes of model and config."""
    if is_own(model):
        from lamella.stack import diffusion

        return _alone(diffusion_config) + _alone(diffusion)
    return f"from transformers import {type(model).__name__}, {type(model.config).__name__}"


def _definitions(source: DerivedCode) -> str:
    """Return the functions of a derived sublayer, with imports of the names that they use."""
    names = f"from {source.module} import {', '.join(source.names)}\n\n\n" if source.names else ""
    return f"\n\n{names}{source.text}\n"


def _named(run: Any) -> str:
    """Return the expression for a sublayer's function in the modelling file."""
    if not isinstance(run, ByKind):
        return run.__name__
    functions = ", ".join(f'"{kind}": {function.__name__}' for kind, function in run.functions.items())
    return f'ByKind("{run.name}", {{{functions}}})'


def _alone(module: Any) -> str:
    """Return the source of a module without its imports from this package, whose source precedes it in the file."""
    lines = inspect.getsource(module).splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith("from lamella."))


def config_entries(
    model: Any, auto_class: str, kept: Iterable[Iterable[str]], counts: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Return the entries of ``config.json`` that let transformers find the modelling file.

    Args:
        model: the model.
        auto_class: auto class of transformers that opens it.
        kept: for every layer, the names of the sublayers that run.
        counts: remaining widths, if no ordinary setting can express them.
    """
    metadata = {"sublayers": [list(names) for names in kept]} | ({"width": counts} if counts else {})
    return _entries(model, auto_class, metadata)


def rewritten_entries(model: Any, auto_class: str, reference: RewriteReference) -> dict[str, Any]:
    """Return the entries of ``config.json`` for a rewritten model; see :func:`config_entries`.

    Args:
        model: the original model.
        auto_class: auto class of transformers that opens it.
        reference: the rewriting.
    """
    return _entries(model, auto_class, {"rewrite": reference.model_dump()})


def _entries(model: Any, auto_class: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
    name = f"Lamella{type(model).__name__}"
    return {
        "model_type": MODEL_TYPE.format(model.config.model_type),
        "architectures": [name],
        "auto_map": {"AutoConfig": f"{MODULE}.LamellaConfig", auto_class: f"{MODULE}.{name}"},
        "lamella": {"form": "native", **metadata},
    }


# Opening native exports.


LayerName = Annotated[str, Field(pattern=r"^\d{1,6}$")]
Count = Annotated[int, Field(ge=1)]
Heads = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class _Counts(BaseModel):
    """The remaining widths; see :meth:`lamella.plan.width.Widths.counts`."""

    model_config = ConfigDict(extra="forbid")

    channels: dict[LayerName, Count]
    kv_of: dict[LayerName, Heads]
    hidden: Count | None
    rescale: bool


Name = Literal["attn", "cross", "mlp"]
SUBLAYERS: tuple[Name, Name] = ("attn", "mlp")  # sublayers of a decoder layer


class NativeMetadata(BaseModel):
    """The ``lamella`` entry of a config.json.

    Attributes:
        form: always ``native``.
        sublayers: for every layer, the names of the sublayers that are present.
        width: the remaining widths, if no ordinary setting can express them.
        rewrite: the rewriting of the model.
        plan: name of the file with a plan that the whole model runs.
    """

    model_config = ConfigDict(extra="forbid")

    form: Literal["native"]
    sublayers: list[list[Name]] | None = None
    width: _Counts | None = None
    rewrite: RewriteReference | None = None
    plan: Literal["plan.json"] | None = None

    @property
    def is_own_class(self) -> bool:
        """Whether the model's class is not in transformers: its parts are removed, or it is rewritten."""
        return self.sublayers is not None or self.rewrite is not None


def read_metadata(settings: Mapping[str, Any], where: str) -> NativeMetadata | None:
    """Return the metadata of a native export from its config; None for other checkpoints.

    Args:
        settings: content of config.json.
        where: what to call the file in messages.

    Raises:
        CheckpointError: for metadata that no export writes.
    """
    cut = str(settings.get("model_type")).startswith(MODEL_TYPE.format(""))
    if "lamella" not in settings and not cut:
        return None
    try:
        metadata = NativeMetadata.model_validate(settings.get("lamella"))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, ("lamella", *first["loc"])))
        raise CheckpointError(
            f"{where}: {field}: {first['msg']}: this is not an export of Lamella, get it again"
        ) from None
    if cut != metadata.is_own_class or cut == (metadata.plan is not None):
        raise CheckpointError(f"{where}: its model_type and its lamella contradict each other: get it again")
    return metadata


@cache
def config_class(model_type: str) -> Any:
    """Return the config class of a native export: a subclass of that of transformers, with its own model type.

    Args:
        model_type: model type of the export, such as ``lamella_llama``.

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
    """Return the model class of a native export: that of transformers with parts removed, or rewritten.

    Args:
        model_type: model type of its config.
        auto: auto class of transformers that opens the original model.

    Raises:
        ArchitectureError: for a model type that native exports do not have.
    """
    config = config_class(model_type)
    base: Any = getattr(transformers, auto)._model_mapping[config.__base__]
    if isinstance(base, tuple):  # DeiT has a second class, whose head is distilled from a teacher
        base = base[0]

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


def _check_exportable(model: Any) -> Architecture:
    architecture = find_architecture(model.config)
    _check_class(model)
    for run in (each.run for each in architecture.sublayers if not architecture.sources):
        if run.__module__ != sublayers.__name__:
            raise ExportError(
                f"{run.__name__} is defined in {run.__module__}, which a native export cannot include: use --form "
                "portable"
            )
    return architecture


def _check_class(model: Any) -> None:
    for kind in () if is_own(model) else (type(model), type(model.config)):
        if not kind.__module__.startswith("transformers."):
            raise ExportError(
                f"{kind.__name__} is not a class of transformers, so a native export cannot name it: use --form "
                "portable"
            )
