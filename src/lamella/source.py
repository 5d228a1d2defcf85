"""Static reading of Python modules: what a module defines, without importing it or its imports.

The command line lists methods and shows their help from their source, so that neither torch nor a method is imported.
Signatures are therefore written with literals: types, constants, and dataclasses with constant arguments. Anything else
is :data:`UNKNOWN`.
"""

from __future__ import annotations

import ast
import importlib
import operator
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, Literal

REAL = ("annotated_types", "lamella.signature", "pathlib", "math")  # modules that are cheap to import, and are imported
BUILT_IN = {
    each.__name__: each for each in (bool, int, float, str, bytes, object, type, tuple, list, dict, set, frozenset)
}
ARITHMETIC = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Pow: operator.pow,
}


class _Unknown:
    """A value or a type that cannot be determined from the source."""

    __name__ = "unknown"

    def __repr__(self) -> str:
        return "UNKNOWN"


UNKNOWN = _Unknown()


@dataclass(frozen=True)
class OneOf:
    """A union of types."""

    kinds: tuple[Any, ...]


@dataclass(frozen=True)
class Function:
    """A function as declared in its source."""

    module: Module
    node: ast.FunctionDef

    @property
    def __name__(self) -> str:
        return self.node.name

    @property
    def __doc__(self) -> str:  # type: ignore[override]
        return ast.get_docstring(self.node) or ""

    def evaluate(self, node: ast.expr | None) -> Any:
        """Evaluate an expression in the function's module."""
        return self.module.evaluate(node)


@dataclass(frozen=True)
class Class:
    """A class as declared in its source. Class attributes and methods are its attributes."""

    module: Module
    node: ast.ClassDef

    @property
    def __name__(self) -> str:
        return self.node.name

    @property
    def __doc__(self) -> str:  # type: ignore[override]
        return ast.get_docstring(self.node) or ""

    @cached_property
    def ancestors(self) -> tuple[Class, ...]:
        """The class itself, followed by its known bases, depth first."""
        bases = [
            self.module.evaluate(base.value if isinstance(base, ast.Subscript) else base) for base in self.node.bases
        ]
        found = [each for base in bases if isinstance(base, Class) for each in base.ancestors]
        return (self, *dict.fromkeys(found))

    @property
    def is_dataclass(self) -> bool:
        """Whether the class or one of its bases is a dataclass."""
        return any("dataclass" in ast.unparse(each) for own in self.ancestors for each in own.node.decorator_list)

    @cached_property
    def fields(self) -> Mapping[str, Field]:
        """The fields that the constructor of a dataclass takes, those of its bases first."""
        found: dict[str, Field] = {}
        for own in reversed(self.ancestors):
            for node in own.node.body:
                is_field = isinstance(node, ast.AnnAssign) and "ClassVar" not in ast.unparse(node.annotation)
                if is_field and isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                    found[node.target.id] = Field(own.module, node)
        return {name: each for name, each in found.items() if each.is_init}

    def is_a(self, name: str) -> bool:
        """Return whether a class of that name is among the ancestors."""
        return any(each.__name__ == name for each in self.ancestors)

    def load(self) -> Any:
        """Import the module and return the class itself."""
        return getattr(importlib.import_module(self.module.name), self.__name__)

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__"):
            for own in self.ancestors:
                for node in own.node.body:
                    if isinstance(node, ast.FunctionDef) and node.name == name:
                        return Function(own.module, node)
                    if (value := _assigned(node, name)) is not None:
                        return own.module.evaluate(value)
        raise AttributeError(name)

    def __call__(self, *args: Any, **values: Any) -> Instance:
        """Return an instance of a dataclass with these values."""
        return Instance(self, dict(zip(self.fields, args, strict=False)) | values)


@dataclass(frozen=True)
class Field:
    """One field of a dataclass."""

    module: Module
    node: ast.AnnAssign

    @property
    def is_init(self) -> bool:
        """Whether the constructor takes the field."""
        return "init=False" not in (ast.unparse(self.node.value) if self.node.value else "")

    @property
    def default(self) -> Any:
        """The default; :data:`UNKNOWN` if there is none, or it cannot be determined."""
        value = self.node.value
        if isinstance(value, ast.Call) and ast.unparse(value.func) == "field":
            arguments = {each.arg: each.value for each in value.keywords}
            if "default_factory" in arguments:
                factory = self.module.evaluate(arguments["default_factory"])
                return factory() if callable(factory) else UNKNOWN
            value = arguments.get("default")
        return UNKNOWN if value is None else self.module.evaluate(value)


@dataclass(frozen=True)
class Instance:
    """An instance of a dataclass, described by the values that it was made with. Its fields are its attributes."""

    cls: Class
    values: Mapping[str, Any]

    def __getattr__(self, name: str) -> Any:
        if name in self.values:
            return self.values[name]
        return self.cls.fields[name].default if name in self.cls.fields else getattr(self.cls, name)

    def replace(self, **values: Any) -> Instance:
        """Return an instance with other values for some fields."""
        return Instance(self.cls, {**self.values, **values})


class Module:
    """A module, read from its file.

    Attributes:
        name: name for import.
        file: path of the file.
    """

    def __init__(self, name: str, file: Path) -> None:
        self.name, self.file = name, file

    @cached_property
    def tree(self) -> ast.Module:
        """The syntax tree of the module."""
        return ast.parse(self.file.read_text(encoding="utf-8"))

    @cached_property
    def _nodes(self) -> dict[str, ast.stmt]:
        """The statement that defines each name; the last one wins."""
        return {name: node for node in _statements(self.tree.body) for name in _defined(node)}

    def get(self, name: str) -> Any:
        """Return what the module defines under a name: a class, a function, a value, or :data:`UNKNOWN`."""
        node = self._nodes.get(name)
        if isinstance(node, ast.ClassDef):
            return Class(self, node)
        if isinstance(node, ast.FunctionDef):
            return Function(self, node)
        if isinstance(node, ast.ImportFrom):
            return self._imported(node, name)
        if isinstance(node, ast.Import):
            return importlib.import_module(name) if name in REAL else UNKNOWN
        value = None if node is None else _assigned(node, name)
        return UNKNOWN if value is None else self.evaluate(value)

    def _imported(self, node: ast.ImportFrom, name: str) -> Any:
        if node.level:
            package = self.name.split(".") if self.file.name == "__init__.py" else self.name.split(".")[:-1]
            origin = ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])
        else:
            origin = node.module or ""
        original = next(each.name for each in node.names if (each.asname or each.name) == name)
        if origin in REAL:
            return getattr(importlib.import_module(origin), original, UNKNOWN)
        if origin == "typing" or origin == "collections.abc":
            return _Typing(original)
        own = origin.partition(".")[0] in ("lamella", self.name.partition(".")[0])
        return read_module(origin).get(original) if own else UNKNOWN

    def evaluate(self, node: ast.expr | None) -> Any:
        """Evaluate an expression as far as possible; otherwise :data:`UNKNOWN`."""
        match node:
            case ast.Constant():
                return node.value
            case ast.JoinedStr():
                return "".join(str(self.evaluate(each)) for each in node.values)
            case ast.FormattedValue():
                return self.evaluate(node.value)
            case ast.Name():
                return BUILT_IN[node.id] if node.id in BUILT_IN else self.get(node.id)
            case ast.Attribute():
                whole = self.evaluate(node.value)
                if isinstance(whole, Class) and node.attr in whole.fields:
                    return whole.fields[node.attr].default
                return getattr(whole, node.attr, UNKNOWN)
            case ast.Tuple():
                return tuple(map(self.evaluate, node.elts))
            case ast.List():
                return list(map(self.evaluate, node.elts))
            case ast.Dict():
                return {
                    self.evaluate(key): self.evaluate(value) for key, value in zip(node.keys, node.values, strict=True)
                }
            case ast.UnaryOp(op=ast.USub()):
                return -self.evaluate(node.operand)
            case ast.BinOp(op=ast.BitOr()):
                left, right = self.evaluate(node.left), self.evaluate(node.right)
                return OneOf((*_members(left), *_members(right)))
            case ast.BinOp() if type(node.op) in ARITHMETIC:
                return ARITHMETIC[type(node.op)](self.evaluate(node.left), self.evaluate(node.right))
            case ast.Subscript():
                return self._subscript(node)
            case ast.Call():
                return self._call(node)
        return UNKNOWN

    def _subscript(self, node: ast.Subscript) -> Any:
        base, index = self.evaluate(node.value), node.slice
        parts = tuple(map(self.evaluate, index.elts if isinstance(index, ast.Tuple) else [index]))
        if isinstance(base, dict):
            return base.get(parts[0], UNKNOWN)
        match base:
            case _Typing("Literal"):
                return Literal[parts]
            case _Typing("Annotated"):
                return AnnotatedType(parts[0], parts[1:])
            case _Typing("Optional"):
                return OneOf((*_members(parts[0]), None))
            case _Typing("ClassVar" | "Final"):
                return parts[0]
        return types.GenericAlias(base, parts) if isinstance(base, type) else UNKNOWN

    def _call(self, node: ast.Call) -> Any:
        args = list(map(self.evaluate, node.args))
        values = {each.arg: self.evaluate(each.value) for each in node.keywords if each.arg}
        if ast.unparse(node.func) == "replace" and args and isinstance(args[0], Instance):
            return args[0].replace(**values)
        function = self.evaluate(node.func)
        if isinstance(function, Class):
            return function(*args, **values)
        is_real = function in (tuple, frozenset, list) or getattr(function, "__module__", "") in REAL
        return function(*args, **values) if is_real and UNKNOWN not in (*args, *values.values()) else UNKNOWN


@dataclass(frozen=True)
class AnnotatedType:
    """A type with annotations: ``Annotated`` itself accepts real types only."""

    kind: Any
    notes: tuple[Any, ...]


@dataclass(frozen=True)
class _Typing:
    """A name of :mod:`typing`."""

    name: str

    @property
    def __name__(self) -> str:
        return self.name


@cache
def read_module(name: str) -> Module:
    """Return a module by its name.

    Args:
        name: name for import.

    Raises:
        ModuleNotFoundError: if it is not installed.
    """
    path = locate(name)
    return Module(name, path / "__init__.py" if path.is_dir() else path)


def locate(name: str) -> Path:
    """Return the file of a module or the folder of a package, without importing it.

    Args:
        name: name for import.

    Raises:
        ModuleNotFoundError: if it is not installed.
    """
    path: Sequence[str] = sys.path
    location = ""
    for part in name.split("."):
        spec = PathFinder.find_spec(part, path)
        if spec is None:
            raise ModuleNotFoundError(name)
        path = list(spec.submodule_search_locations or [])
        location = path[0] if path else str(spec.origin)
    return Path(location)


def _members(kind: Any) -> tuple[Any, ...]:
    return kind.kinds if isinstance(kind, OneOf) else (kind,)


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements at the top level of a module, including those for type checkers."""
    for node in body:
        if isinstance(node, ast.If):
            yield from _statements(node.body)
        else:
            yield node


def _defined(node: ast.stmt) -> list[str]:
    match node:
        case ast.ClassDef() | ast.FunctionDef():
            return [node.name]
        case ast.ImportFrom() | ast.Import():
            return [each.asname or each.name for each in node.names]
        case ast.AnnAssign(target=ast.Name(id=name)):
            return [name]
        case ast.Assign():
            return [each.id for target in node.targets for each in ast.walk(target) if isinstance(each, ast.Name)]
    return []


def _assigned(node: ast.stmt, name: str) -> ast.expr | None:
    """Return the expression that a statement assigns to a name, if it does."""
    match node:
        case ast.AnnAssign(target=ast.Name(id=found)) if found == name:
            return node.value
        case ast.Assign():
            for target in node.targets:
                if isinstance(target, ast.Name) and target.id == name:
                    return node.value
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    for each, value in zip(target.elts, node.value.elts, strict=False):
                        if isinstance(each, ast.Name) and each.id == name:
                            return value
    return None
