"""What an arm computes, as a digest: the code of its function and of all that it calls in the scripts, and its values.

Names of functions, comments and docstrings do not count, so that hours of work survive a function's new name.
"""

from __future__ import annotations

import ast
import dis
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

HARNESS = __name__.partition(".")[0]
GLOBAL = {"LOAD_GLOBAL", "LOAD_NAME"}
SPECIAL = {"__init__", "__post_init__", "__call__"}


def fingerprint(find: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """Return the digest of a call: of the function's code, and of what it is given.

    Code is followed through functions and classes of the script and of the harness; other modules count by name. JSON
    values, functions and frozen dataclasses count by their content, what has a ``digest``, like a plan, by that, and
    everything else by its type alone.

    Args:
        find: the function.
        arguments: its positional arguments.
        options: its keyword arguments.
    """
    scope = {HARNESS, _unwrapped(find).__module__.partition(".")[0]}
    described = [_value(each, scope, ()) for each in (find, arguments, options)]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]


def source_digest(files: list[Path]) -> str:
    """Return the digest of Python files without their comments, docstrings and formatting."""
    digest = hashlib.sha256()
    for file in files:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
                value = body[0].value
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    body[0] = ast.Pass()
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()


def _unwrapped(find: Any) -> Any:
    while isinstance(find, partial):
        find = find.func
    return find


def _value(value: Any, scope: set[str], seen: tuple[Any, ...]) -> Any:
    """Return a JSON value that stands for a value; ``seen`` are the functions and classes around it."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _value(each, scope, seen) for key, each in value.items()}
    if isinstance(value, list | tuple | range):
        return [_value(each, scope, seen) for each in value]
    if isinstance(value, set | frozenset):  # in which strings have another order in every process
        return sorted(json.dumps(_value(each, scope, seen)) for each in value)
    if isinstance(value, partial):
        return [_value(each, scope, seen) for each in (value.func, value.args, value.keywords)]
    if isinstance(value, property):
        return _value(value.fget, scope, seen)
    if isinstance(value, MethodType):
        return [_value(value.__func__, scope, seen), _value(value.__self__, scope, seen)]
    if isinstance(value, FunctionType | type) and value.__module__.partition(".")[0] in scope:
        if value in seen:  # recursion
            return seen.index(value)
        return _function(value, scope, seen) if isinstance(value, FunctionType) else _class(value, scope, seen)
    if isinstance(value, FunctionType | type):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(digest := getattr(value, "digest", None), str):
        return digest
    if is_dataclass(value) and value.__dataclass_params__.frozen:
        content = {each.name: _value(getattr(value, each.name), scope, seen) for each in fields(value)}
        return [_value(type(value), scope, seen), content]
    return type(value).__qualname__


def _class(made: type, scope: set[str], seen: tuple[Any, ...]) -> Any:
    own = {name: each for name, each in vars(made).items() if not name.startswith("__") or name in SPECIAL}
    if is_dataclass(made):
        own.pop("__init__", None)  # which follows from the fields
    return {name: _value(each, scope, (*seen, made)) for name, each in own.items()}


def _function(function: FunctionType, scope: set[str], seen: tuple[Any, ...]) -> Any:
    around = (*seen, function)
    closed = [_contents(each) for each in function.__closure__ or ()]
    defaults = [function.__defaults__, function.__kwdefaults__]
    return [_code(function.__code__, function, scope, around), _value([*defaults, *closed], scope, around)]


def _contents(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _code(code: CodeType, function: FunctionType, scope: set[str], seen: tuple[Any, ...]) -> Any:
    """Return the instructions of code with their constants; what script and harness define stands for its name."""
    found: list[Any] = []
    for each in dis.get_instructions(code):
        value: Any = each.arg
        if each.opcode in dis.hasconst:
            inner = each.argval
            if isinstance(inner, CodeType):
                value = _code(inner, function, scope, seen)
            else:
                value = _value(inner, scope, seen) if isinstance(inner, frozenset) else repr(inner)
        elif each.opname in GLOBAL:
            value = _named(each.argval, function, scope, seen)
        elif each.opcode in dis.hasname:
            value = each.argval  # an attribute, which may have the name of something else in the script
        found.append([each.opname, value])
    return found


def _named(name: str, function: FunctionType, scope: set[str], seen: tuple[Any, ...]) -> Any:
    value = function.__globals__.get(name)
    module = getattr(value, "__module__", None)
    is_own = isinstance(module, str) and module.partition(".")[0] in scope
    is_constant = name.isupper() and value is not None and not callable(value)
    return _value(value, scope, seen) if is_own or is_constant else name
