"""Parts of plans that are code: classes in a method's module, instantiated with the settings of a plan."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, get_type_hints

import torch
from pydantic import ConfigDict, ValidationError, create_model
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lamella.errors import PlanError
from lamella.plan.document import SidefileDocument

Part = TypeVar("Part", bound=nn.Module)


def parts_in(module: Any, kind: type[Part]) -> list[type[Part]]:
    """Return the classes of one kind that a method's module defines itself.

    Args:
        module: the module.
        kind: their base class.
    """
    return [
        each
        for each in vars(module).values()
        if inspect.isclass(each) and issubclass(each, kind) and each.__module__ == module.__name__
    ]


def open_part(
    make: Callable[..., Part], given: Mapping[str, Any], reference: Any, where: str, device: torch.device
) -> Part:
    """Build a part with the settings and the parameters of a plan.

    Args:
        make: class of the part.
        given: arguments that are not settings.
        reference: entry of the plan.
        where: what to call the part in messages.
        device: device of the part.

    Raises:
        PlanError: for unknown or missing settings, or a side file that is missing, damaged or of the wrong shape.
    """
    part = make(**given, **validated_settings(make, given, reference, where))
    if reference.file is None:
        return part
    fill(part, tensors_of(reference, where), where, reference.file)
    return part.to(device)


def validated_settings(
    make: Callable[..., Any], given: Mapping[str, Any], reference: Any, where: str
) -> dict[str, Any]:
    """Return the settings of a part, validated and converted to the types that the part declares.

    Args:
        make: class of the part, or a function.
        given: arguments that are not settings.
        reference: entry of the plan.
        where: what to call the part in messages.

    Raises:
        PlanError: for unknown or missing settings, or values that the part refuses.
    """
    params: dict[str, Any] = reference.params
    known = [name for name in inspect.signature(make).parameters if name not in given]
    unknown = sorted(set(params) - set(known))
    if unknown:
        raise PlanError(f"{where} has no parameter '{unknown[0]}'; its parameters are: {', '.join(known) or 'none'}")
    again = f"make the plan again with `lamella plan {reference.name}`"
    try:
        with torch.random.fork_rng(devices=[]):
            make(**given, **params)  # its own checks give the clearest message
        return _settings(make, params)
    except ValidationError as error:
        first = error.errors()[0]
        raise PlanError(f"{where}: {first['loc'][0]}: {first['msg']}: {again}") from None
    except (TypeError, ValueError, OverflowError) as error:
        raise PlanError(f"{where}: {error}: {again}") from None


def tensors_of(reference: SidefileDocument, where: str) -> dict[str, Tensor]:
    """Return the tensors of a part's side file.

    Args:
        reference: entry of the plan.
        where: what to call the part in messages.

    Raises:
        PlanError: for a file that is missing, damaged, or not the one that the plan was made with.
    """
    path = reference.located
    try:
        data = path.read_bytes()
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise PlanError(f"{where}: its file {path} cannot be read ({error.__class__.__name__})") from None
    if reference.sha256 is not None and hashlib.sha256(data).hexdigest() != reference.sha256:
        raise PlanError(f"{where}: its file {path} is not the one that the plan was made with: its hash differs")
    return tensors


def fill(part: nn.Module, tensors: Mapping[str, Tensor], where: str, file: str) -> None:
    """Load the tensors of a side file into a part.

    Args:
        part: the part.
        tensors: the tensors by name.
        where: what to call the part in messages.
        file: name of the side file, for messages.

    Raises:
        PlanError: for tensors with other names or shapes.
    """
    expected = part.state_dict()
    for name in sorted(expected.keys() | tensors.keys()):
        shapes = [list(found[name].shape) if name in found else None for found in (expected, tensors)]
        if shapes[0] != shapes[1]:
            raise PlanError(f"{where}: '{name}' is {shapes[1]} in {file}, but this model needs {shapes[0]}")
    part.load_state_dict(tensors)


def _settings(make: Callable[..., Any], params: dict[str, Any]) -> dict[str, Any]:
    """Return the settings as the types that the part declares."""
    hints = get_type_hints(make.__init__ if inspect.isclass(make) else make)
    fields: dict[str, Any] = {name: (hints.get(name, Any), ...) for name in params}
    config = ConfigDict(allow_inf_nan=False, arbitrary_types_allowed=True)
    checked = create_model("Settings", __config__=config, **fields).model_validate_json(json.dumps(params), strict=True)
    return {name: getattr(checked, name) for name in params}
