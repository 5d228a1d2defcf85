"""The signature of a command, read as its contract: its inputs, its options, and what the runner fills in.

    def finercut(stack: Stack, calibration: Text, *, level: Level = "sublayer", refine: Annotated[int, Ge(0)] = 2,
                 budget: Budget = Budget(), work: Work = Work()) -> PlanSeries:

Positional parameters are inputs. Keyword-only parameters are options; one whose type is a frozen dataclass stands for
its fields, so ``share=0.2`` is ``budget=Budget(share=0.2)``, in Python and on the command line. If the dataclass has
``prefixed = True``, the options carry the name of the parameter: ``heal_minutes=2`` is ``heal=Heal(minutes=2)``. Such a
group may be optional (``Quantize | None``): it exists as soon as one of its fields is given. :class:`Work` is filled in
by the runner. Bounds of an option (:mod:`annotated_types`: ``Ge``, ``Gt``, ``Le``, ``Lt``, ``MinLen``) and another
spelling of its name are part of the annotation, and help is part of the docstring. Types and bounds validate the
values, are shown in help, and generate tests.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache, cached_property
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen

from lamella.errors import MethodError, listed
from lamella.files import Work
from lamella.source import AnnotatedType, Class, Function, Instance, OneOf

EMPTY = inspect.Parameter.empty
MODELS = ("Stack", "Model", "SavedModel", "LazyCheckpoint")
SCALARS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
BOUNDS = {
    Ge: (">=", "ge"),
    Gt: (">", "gt"),
    Le: ("<=", "le"),
    Lt: ("<", "lt"),
}  # as text, and the attribute that holds the bound


@dataclass(frozen=True)
class Named:
    """Another spelling of a parameter on the command line: ``lam: Annotated[float, Named("lambda")] = 1.0``."""

    name: str


@dataclass(frozen=True)
class Split:
    """The split that an input is read from, if it is not the calibration split: ``Split("test")``."""

    name: str


@dataclass(frozen=True)
class Argument:
    """Marks an input that is a positional argument on the command line; the first input always is."""


@dataclass(frozen=True)
class Default:
    """The name that an omitted input is opened from, if it is not that of its type: ``Default("general")``."""

    name: str


class Settings:
    """Defaults of loader settings that differ from those of the input type: ``Settings(sequences=8)``."""

    def __init__(self, **values: Any) -> None:
        self.values = values


@dataclass(frozen=True)
class Fixture:
    """A minimal example of an input type, which the type has as its attribute ``example``.

    It is shown in the documentation, and the conformance tests run methods on it. For a type with built-in sources it
    is the name of one; for other types it is a file with its content: ``Fixture("words.txt", "one two three")``. Types
    that commands write, such as plans, series and adapters, have none.

    Attributes:
        source: argument of ``open``: a built-in name, or the name of the file.
        content: content of the file; None for a built-in name.
        settings: arguments of ``open`` that keep the input small.
    """

    source: str
    content: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Parameter:
    """A parameter of a command.

    Attributes:
        name: name in Python.
        hint: its type, without command-line spelling and other markers.
        default: the default, or ``inspect.Parameter.empty`` if it has none.
        help: description from the docstring.
        spelling: name on the command line, if it differs.
        group: the parameter that it is a field of.
        part: its name in that group.
        split: the split of its source, for an input.
        notes: further bounds that apply to the whole value.
        settings: defaults of loader settings.
        source: the name that an omitted input is opened from; empty for that of its type.
        is_argument: whether an input is positional on the command line.
    """

    name: str
    hint: Any
    default: Any = EMPTY
    help: str = ""
    spelling: str = ""
    group: str = ""
    part: str = ""
    split: str = "calibration"
    notes: tuple[Any, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict, compare=False)
    source: str = ""
    is_argument: bool = False

    @property
    def kinds(self) -> tuple[Any, ...]:
        """The members of a union except None, or the single type."""
        return tuple(each for each in map(_bare, _members(self.hint)) if each is not NoneType and each is not None)

    @cached_property
    def bounds(self) -> str:
        """The bounds as text, such as ``>= 0 and < 1``; empty if there are none."""
        notes = limits(self)
        signs = [(*BOUNDS[type(each)], each) for each in notes if type(each) in BOUNDS]
        found = [f"{sign} {getattr(each, field):g}" for sign, field, each in signs]
        lengths = [f"at least {each.min_length} long" for each in notes if isinstance(each, MinLen)]
        lengths += [f"at most {each.max_length} long" for each in notes if isinstance(each, MaxLen)]
        return " and ".join(dict.fromkeys([*found, *lengths]))

    @property
    def expected(self) -> str:
        """The accepted values as text."""
        known = [str(value) for value in choices(self)]
        kinds = [SCALARS[kind] for kind in self.kinds if kind in SCALARS]
        kinds += [_listed(kind) for kind in self.kinds if get_origin(kind) is tuple]
        what = " or ".join([*([f"one of {', '.join(known)}"] if known else []), *kinds]) or "another value"
        return f"{what} {self.bounds}".strip()

    def check(self, who: str, value: Any) -> None:
        """Validate a value against the declared type and bounds.

        Values that only Python can give, such as functions and opened models, are not checked here.

        Args:
            who: the command, for the message.
            value: the value.

        Raises:
            MethodError: one line with the value and what is expected.
        """
        if not self.is_checked:
            return
        from pydantic import ValidationError

        try:
            self._adapter.validate_python(value)
        except ValidationError:
            shown = listed(value if isinstance(value, list | tuple) else [value])
            raise MethodError(f"{who}: {self.name} {shown}: give {self.expected}") from None

    @property
    def is_checked(self) -> bool:
        """Whether the type determines the accepted values: numbers, strings, choices, and tuples of them."""
        return all(kind in SCALARS or get_origin(kind) in (Literal, tuple) for kind in self.kinds)

    @cached_property
    def _adapter(self) -> Any:
        """The pydantic validator."""
        from pydantic import ConfigDict, TypeAdapter  # imported here, since help does not need it

        hint: Any = Annotated[self.hint, *self.notes] if self.notes else self.hint
        return TypeAdapter(hint, config=ConfigDict(strict=True, allow_inf_nan=False))

    @property
    def is_mapping(self) -> bool:
        """Whether it takes several values of one type, each with a name: ``dict[str, Text]``."""
        return any(get_origin(each) is dict for each in self.kinds)

    @property
    def is_repeated(self) -> bool:
        """Whether it is an input that takes any number of values: ``tuple[ComparedModel, ...]``."""
        return any(get_origin(each) is tuple and kinds_of(self) for each in self.kinds)

    @property
    def option(self) -> str:
        """The option on the command line."""
        return "--" + (self.spelling or self.name).replace("_", "-")


@dataclass(frozen=True)
class Signature:
    """What a command takes and returns.

    Attributes:
        inputs: required and optional inputs, by name.
        options: options by name, including the fields of groups.
        groups: the parameters whose fields are options, each with its default: an instance, or None for an optional
            group, which does not exist until one of its fields is given.
        kinds: the dataclass of each group.
        optional: the groups that may be None.
        work: name of the parameter that receives the work folder; empty if there is none.
        result: the result type.
    """

    inputs: Mapping[str, Parameter]
    options: Mapping[str, Parameter]
    groups: Mapping[str, Any]
    work: str
    result: Any
    kinds: Mapping[str, Any] = field(default_factory=dict)
    optional: frozenset[str] = frozenset()

    def collect(self, slug: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return keyword arguments as the function takes them: fields are collected into their dataclasses.

        A list may be given for a tuple, and a string, which is split at its commas as on the command line.

        Args:
            slug: the command, for messages.
            given: keyword arguments, in which fields of groups are separate.

        Raises:
            MethodError: if a field is given together with its whole dataclass, a string cannot be split into the tuple,
                or a value has another type or is out of its bounds.
        """
        parts: dict[str, dict[str, Any]] = {}
        whole: dict[str, Any] = {}
        for name, value in given.items():
            group = self._group_of(name)
            if group and group in given:
                raise MethodError(f"{slug}: {name} is a field of {group}: give one of the two")
            if name in self.options:
                value = _as_tuple(slug, self.options[name], value)
                self.options[name].check(slug, value)
            if group:
                parts.setdefault(group, {})[self.options[name].part] = value
            else:
                whole[name] = value
        for group in self.groups.keys() & whole.keys():
            for option in (each for each in self.options.values() if each.group == group):
                if whole[group] is not None:
                    option.check(slug, getattr(whole[group], option.part))
        return whole | {group: self._made(group, values) for group, values in parts.items()}

    def _made(self, group: str, values: Mapping[str, Any]) -> Any:
        """Return a group with some values; the others are those of its default."""
        default = self.groups[group]
        return self.kinds[group](**values) if default is None else replace(default, **values)

    def fill(self, given: Mapping[str, Any], *values: Any, seed: int | None = None) -> dict[str, Any]:
        """Add the values that the runner fills in, by type, if the command takes them; explicit values win.

        Args:
            given: keyword arguments.
            *values: values such as a budget and a work folder.
            seed: the random seed, which is recognised by its name.
        """
        found = dict(given)
        for value in values:
            if isinstance(value, Work) and self.work:
                found.setdefault(self.work, value)
            for group in (name for name, default in self.groups.items() if type(default) is type(value)):
                names = [name for name in found if self._group_of(name) == group]
                parts = {self.options[name].part: found.pop(name) for name in names}
                found.setdefault(group, replace(value, **parts))
        if seed is not None and "seed" in self.options:
            found.setdefault("seed", seed)
        return found

    def _group_of(self, name: str) -> str:
        return self.options[name].group if name in self.options else ""


@cache
def signature(function: Callable[..., Any] | Function) -> Signature:
    """Return the contract of a command's function, or of one that is read from its source and not imported.

    The two are equal except for types and defaults, which for a function that is not imported are those of
    :mod:`lamella.source`.

    Args:
        function: the function.
    """
    positional, options, result = _read(function) if isinstance(function, Function) else _inspected(function)
    found: dict[str, Parameter] = {}
    groups, kinds, work = {}, {}, ""
    for each in options:
        kind = _group(each)
        if getattr(each.hint, "__name__", "") == Work.__name__:
            work = each.name
        elif kind is not None:
            groups[each.name], kinds[each.name] = each.default, kind
            for part in _fields(each, kind):
                if part.name in found:
                    raise MethodError(f"{function.__name__}: two options are named {part.name}")
                found[part.name] = part
        else:
            found[each.name] = each
    optional = frozenset(
        each.name for each in options if each.name in groups and None in map(_none, _members(each.hint))
    )
    return Signature({each.name: each for each in positional}, found, groups, work, result, kinds, optional)


def _inspected(function: Callable[..., Any]) -> tuple[list[Parameter], list[Parameter], Any]:
    """Return the positional parameters, the keyword-only parameters and the result type of a function."""
    function = inspect.unwrap(function)
    hints = get_type_hints(function, include_extras=True)
    docs = parse_docs(inspect.getdoc(function) or "")
    positional: list[Parameter] = []
    options: list[Parameter] = []
    for name, given in inspect.signature(function).parameters.items():
        if given.kind is not given.VAR_KEYWORD:
            found = _parameter(name, hints.get(name, Any), given.default, docs)
            (options if given.kind is given.KEYWORD_ONLY else positional).append(found)
    return positional, options, hints.get("return")


def _read(function: Function) -> tuple[list[Parameter], list[Parameter], Any]:
    """Return the same for a function that is not imported."""
    node, docs = function.node, parse_docs(function.__doc__)
    arguments = [each for each in node.args.posonlyargs + node.args.args if each.arg not in ("self", "cls")]
    defaults = [None] * (len(arguments) - len(node.args.defaults)) + list(node.args.defaults)

    def parameters(given: list[ast.arg], values: Sequence[ast.expr | None]) -> list[Parameter]:
        evaluate = function.evaluate
        return [
            _parameter(each.arg, evaluate(each.annotation), EMPTY if value is None else evaluate(value), docs)
            for each, value in zip(given, values, strict=True)
        ]

    options = parameters(node.args.kwonlyargs, node.args.kw_defaults)
    return parameters(arguments, defaults), options, function.evaluate(node.returns)


def _parameter(name: str, hint: Any, default: Any, docs: Mapping[str, str]) -> Parameter:
    notes: Sequence[Any] = ()
    if isinstance(hint, AnnotatedType):
        hint, notes = hint.kind, hint.notes
    elif get_origin(hint) is Annotated:
        hint, *notes = get_args(hint)
    return Parameter(
        name,
        hint,
        default,
        docs.get(name, ""),
        spelling=next((each.name for each in notes if isinstance(each, Named)), ""),
        split=next((each.name for each in notes if isinstance(each, Split)), "calibration"),
        notes=tuple(each for each in notes if not isinstance(each, Named | Split | Settings | Default | Argument)),
        settings=next((each.values for each in notes if isinstance(each, Settings)), {}),
        source=next((each.name for each in notes if isinstance(each, Default)), ""),
        is_argument=any(isinstance(each, Argument) for each in notes),
    )


def _group(parameter: Parameter) -> Any:
    """Return the dataclass whose fields an option stands for; None for a plain option."""
    default = parameter.default
    for kind in parameter.kinds:
        is_instance = isinstance(default, Instance) and isinstance(kind, Class)
        is_instance |= isinstance(kind, type) and is_dataclass(kind) and isinstance(default, kind)
        if is_instance or (default is None and getattr(kind, "prefixed", False) is True):
            return kind
    return None


def _fields(whole: Parameter, kind: Any) -> list[Parameter]:
    """Return the fields of a group as parameters, with the values of its default."""
    default = kind() if whole.default is None else whole.default
    if isinstance(kind, Class):
        hints = {name: each.module.evaluate(each.node.annotation) for name, each in kind.fields.items()}
        docs = parse_docs(kind.__doc__, "Attributes")
    else:
        every = get_type_hints(kind, include_extras=True)
        hints = {each.name: every[each.name] for each in fields(kind) if each.init}
        docs = parse_docs(inspect.getdoc(kind) or "", "Attributes")
    prefix = f"{whole.name}_" if getattr(kind, "prefixed", False) is True else ""
    found = [_parameter(name, hint, getattr(default, name), docs) for name, hint in hints.items()]
    return [replace(each, name=prefix + each.name, part=each.name, group=whole.name) for each in found]


def fields_of(name: str, default: Any) -> list[Parameter]:
    """Return the fields of a group that every command has, as parameters.

    Args:
        name: name of the group.
        default: an instance, or its description from the source.
    """
    kind = default.cls if isinstance(default, Instance) else type(default)
    return _fields(Parameter(name, kind, default), kind)


def _none(kind: Any) -> Any:
    """Return None for the type of None, since both spellings occur."""
    return None if kind is NoneType else kind


def parse_docs(docstring: str, section: str = "Args") -> dict[str, str]:
    """Return the description of each parameter in a docstring; parameters that share an entry share their text.

    Args:
        docstring: the docstring.
        section: the section of the docstring.
    """
    found: dict[str, str] = {}
    names: list[str] = []
    inside = False
    for line in docstring.splitlines():
        if not line.startswith(" "):
            inside = line.strip() == f"{section}:" if line.strip() else inside
            continue
        if not inside:
            continue
        start = re.match(r" {4}([a-z_]\w*(?:, \w+)*): (.*)", line, re.IGNORECASE)
        if start:
            names = start[1].split(", ")
            found |= dict.fromkeys(names, start[2].strip())
        else:
            found |= {name: f"{found[name]} {line.strip()}".strip() for name in names}
    return found


def is_model(kind: Any) -> bool:
    """Return whether an input of this type is a model: opened, a stack of it, with its plan, or not yet opened."""
    module = kind.module.name if isinstance(kind, Class) else getattr(kind, "__module__", "")
    return module.startswith(("lamella.stack", "lamella.zoo")) and kind.__name__ in MODELS


def is_stack(kind: Any) -> bool:
    """Return whether an input of this type is one stack of a model."""
    return is_model(kind) and kind.__name__ == "Stack"


def kinds_of(parameter: Parameter) -> list[Any]:
    """Return the types that an input can be opened as."""
    kinds = [_item(kind) for kind in parameter.kinds]
    classes = [kind for kind in kinds if isinstance(kind, type | Class)]
    return [kind for kind in classes if is_model(kind) or hasattr(kind, "open") or hasattr(kind, "read")]


def _item(kind: Any) -> Any:
    """Return the type of one value of an input that takes several."""
    if get_origin(kind) is dict:
        return get_args(kind)[1]
    return get_args(kind)[0] if get_origin(kind) is tuple and Ellipsis in get_args(kind) else kind


def kind_of(parameter: Parameter) -> Any:
    """Return the first type that an input can be opened as; None if it is passed on unchanged."""
    return next(iter(kinds_of(parameter)), None)


def is_test_input(parameter: Parameter) -> bool:
    """Return whether an input is the test, of text or of images with text, that all commands evaluate on by default."""
    return parameter.split == "test" and {"Text", "ImageText"} <= {kind.__name__ for kind in kinds_of(parameter)}


def settings_of(parameter: Parameter) -> Mapping[str, Parameter]:
    """Return the loader settings of an input, for all of its types."""
    kinds = [kind for kind in kinds_of(parameter) if hasattr(kind, "open") and not is_model(kind)]
    found = {name: each for kind in reversed(kinds) for name, each in signature(kind.open).options.items()}
    defaults = parameter.settings
    return {name: replace(each, default=defaults.get(name, each.default)) for name, each in found.items()}


def _as_tuple(slug: str, option: Parameter, value: Any) -> Any:
    """Return a list as a tuple, or the tuple that a string stands for, if the option takes tuples.

    A string stays as it is if the option also takes strings.
    """
    if not any(get_origin(kind) is tuple for kind in option.kinds):
        return value
    if isinstance(value, str) and str not in option.kinds and value not in choices(option):
        return _split(slug, option, value)
    return tuple(value) if isinstance(value, list) else value


def _split(slug: str, option: Parameter, text: str) -> Any:
    """Return the tuple that a string with commas stands for."""
    kinds = [entries(kind) for kind in option.kinds if get_origin(kind) is tuple]
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    if not all(parts):
        raise MethodError(f"{slug}: {option.name} {text} has an empty entry: separate entries by single commas")
    for kind, *rest in kinds:
        convert = kind if kind in (int, float) else str
        try:
            found = tuple(convert(part) for part in parts)
        except ValueError:
            continue
        if Ellipsis in rest or len(found) == 1 + len(rest):
            return found
    raise MethodError(f"{slug}: {option.name} {text}: give {option.expected}, as a tuple or separated by commas")


def _listed(kind: Any) -> str:
    """Describe the entries of a tuple: ``numbers``, ``2 numbers`` or ``some of even, release``."""
    first, *rest = entries(kind)
    if get_origin(first) is Literal:
        return f"some of {', '.join(map(str, get_args(first)))}"
    what = "numbers" if first in (int, float) else "names"
    return what if Ellipsis in rest else f"{1 + len(rest)} {what}"


def entries(kind: Any) -> tuple[Any, ...]:
    """Return the types of a tuple's entries without their bounds, as in its annotation: ``(int, ...)``."""
    return tuple(map(_bare, get_args(kind)))


def _members(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the single type."""
    if isinstance(hint, OneOf):
        return hint.kinds
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _bare(hint: Any) -> Any:
    """Return a type without its annotations."""
    if isinstance(hint, AnnotatedType):
        return _bare(hint.kind)
    return _bare(get_args(hint)[0]) if get_origin(hint) is Annotated else hint


def notes_of(hint: Any) -> Iterator[Any]:
    """Yield the annotations of a type and of the types within it."""
    if isinstance(hint, AnnotatedType):
        yield from (*hint.notes, *notes_of(hint.kind))
    elif get_origin(hint) is Annotated:
        kind, *notes = get_args(hint)
        yield from (*notes, *notes_of(kind))
    elif get_origin(hint) is tuple or len(_members(hint)) > 1:
        for each in get_args(hint) if get_origin(hint) is tuple else _members(hint):
            yield from notes_of(each)


def limits(parameter: Parameter) -> list[Any]:
    """Return the bounds of a parameter's values, or of their entries, as :mod:`annotated_types` objects."""
    return [*notes_of(parameter.hint), *parameter.notes]


def choices(parameter: Parameter) -> list[Any]:
    """Return the values of a literal type; empty if there is none."""
    return [value for kind in parameter.kinds if get_origin(kind) is Literal for value in get_args(kind)]
