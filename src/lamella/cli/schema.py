"""The JSON schema of a command's inputs and options, generated from its signature."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen

from lamella.registry import Method
from lamella.signature import EMPTY, Parameter, entries, kind_of, limits, notes_of, settings_of

TYPES = {bool: "boolean", int: "integer", float: "number", str: "string"}
BOUNDS = {Ge: ("minimum", "ge"), Gt: ("exclusiveMinimum", "gt"), Le: ("maximum", "le"), Lt: ("exclusiveMaximum", "lt")}
DIALECT = "https://json-schema.org/draft/2020-12/schema"


def schema_of(entry: Method, name: str) -> dict[str, Any]:
    """Return the JSON schema of a command's inputs and options, by their names in Python and in ``--config``.

    Args:
        entry: the command.
        name: the command as typed.
    """
    contract = entry.declared
    properties = {each.name: _input(each) for each in contract.inputs.values()}
    for each in contract.inputs.values():
        properties |= {s.name: _option(s) for s in settings_of(each).values() if s.name not in properties}
    properties |= {each.name: _option(each) for each in contract.options.values() if _is_plain(each)}
    required = [each.name for each in contract.inputs.values() if each.default is EMPTY and _needed(each)]
    return {
        "$schema": DIALECT,
        "title": f"lamella {name}",
        "description": entry.summary,
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def _needed(each: Parameter) -> bool:
    """Return whether an input has no default."""
    kind = kind_of(each)
    return not (getattr(kind, "nameless", False) or hasattr(kind, "default")) and each.split != "test"


def _is_plain(option: Parameter) -> bool:
    return any(map(_is_written, option.kinds))


def _input(each: Parameter) -> dict[str, Any]:
    """Return the schema of an input, which is given by name: a file, a folder, or a built-in name."""
    one: dict[str, Any] = {"type": "string"}
    kind = kind_of(each)
    if each.is_mapping:
        one = {"type": "object", "additionalProperties": one}
    elif each.is_repeated or getattr(kind, "many", False):
        one = {"type": "array", "items": one}
    return one | ({"description": each.help} if each.help else {})


def _option(each: Parameter) -> dict[str, Any]:
    """Return the schema of an option: its types, choices, bounds and default."""
    forms = [_form(kind, limits(each)) for kind in each.kinds if _is_written(kind)]
    if each.default is None:
        forms.append({"type": "null"})
    found: dict[str, Any] = forms[0] if len(forms) == 1 else {"anyOf": forms}
    default = list(each.default) if isinstance(each.default, tuple) else each.default
    found |= {"default": default} if isinstance(default, bool | int | float | str | list | None) else {}
    return found | ({"description": each.help} if each.help else {})


def _is_written(kind: Any) -> bool:
    """Return whether JSON can represent the values of a type."""
    return kind in TYPES or get_origin(kind) is Literal or (get_origin(kind) is tuple and _is_written(entries(kind)[0]))


def _form(kind: Any, notes: Iterable[Any]) -> dict[str, Any]:
    """Return the schema of one type."""
    if get_origin(kind) is Literal:
        return {"enum": list(get_args(kind))}
    if get_origin(kind) is not tuple:
        bounds = {BOUNDS[type(each)][0]: getattr(each, BOUNDS[type(each)][1]) for each in notes if type(each) in BOUNDS}
        return {"type": TYPES[kind]} | (bounds if kind in (int, float) else {})
    first, *rest = [each for each in get_args(kind) if each is not Ellipsis]
    items = [_form(bare, notes_of(each)) for each, bare in zip([first, *rest], entries(kind), strict=False)]
    if Ellipsis not in get_args(kind):
        return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}
    found: dict[str, Any] = {"type": "array", "items": items[0]}
    for each in notes:
        found |= {"minItems": each.min_length} if isinstance(each, MinLen) else {}
        found |= {"maxItems": each.max_length} if isinstance(each, MaxLen) else {}
    return found
