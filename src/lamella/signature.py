"""The signature of a command, read as its contract: what it must be given, what may be set, what the house fills in.

    def finercut(stack: Stack, calibration: Text, *, level: Level = "sublayer", refine: Annotated[int, Ge(0)] = 2,
                 budget: Budget = Budget(), work: Work = Work()) -> PlanSeries:

Positional parameters are inputs. Keyword-only ones are options; one whose type is a frozen dataclass stands for its
fields, so ``share=0.2`` is ``budget=Budget(share=0.2)``, in Python and on the command line. Where the dataclass has
``prefixed = True``, the options carry the name of the parameter: ``heal_minutes=2`` is ``heal=Heal(minutes=2)``. Such a
group may be optional (``Quantize | None``): it exists as soon as one of its fields is given. :class:`Work` is filled in
by the runner. Bounds of an option (:mod:`annotated_types`: ``Ge``, ``Gt``, ``Le``, ``Lt``, ``MinLen``) and another
spelling of its name stand in the annotation, and help in the docstring. The type and the bounds are what the values are
checked by, what help shows and what tests are generated from.
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
from lamella.source import Class, Function, Instance, Noted, OneOf

EMPTY = inspect.Parameter.empty
MODELS = ("Stack", "Model", "SavedModel", "LazyCheckpoint")
SCALARS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
BOUNDS = {Ge: (">=", "ge"), Gt: (">", "gt"), Le: ("<=", "le"), Lt: ("<", "lt")}  # as they are written, and the field


@dataclass(frozen=True)
class Named:
    """Another spelling of a parameter on the command line: ``lam: Annotated[float, Named("lambda")] = 1.0``."""

    name: str


@dataclass(frozen=True)
class Split:
    """Which part of its source an input is read from, where that is not the calibration split: ``Split("test")``."""

    name: str


@dataclass(frozen=True)
class Argument:
    """Marks an input that is a positional argument on the command line, as the first one always is."""


class Settings:
    """Defaults of how an input is opened that differ from those of its type: ``Settings(sequences=8)``."""

    def __init__(self, **values: Any) -> None:
        self.values = values


@dataclass(frozen=True)
class Fixture:
    """The smallest thing that an input of some type can be opened from; it stands in the type as ``example``.

    The documentation shows it, and the conformance suite runs methods on it. A type that can be opened from a
    built-in name has that name; any other a file with its content: ``Fixture("words.txt", "one two three")``. Types
    that are made of a model have none: plans, series, adapters and whatever else a command writes.

    Attributes:
        given: what ``open`` takes: a built-in name, or the name of the file.
        content: of the file; None for a built-in name.
        settings: of ``open``, that keep it small.
    """

    given: str
    content: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Parameter:
    """One thing that a command takes.

    Attributes:
        name: in Python.
        hint: its type, without the further spelling.
        default: where it has one, else ``inspect.Parameter.empty``.
        help: what the docstring says of it.
        spelling: on the command line, where it is not the name.
        group: the parameter that it is a field of.
        part: its name in that group.
        split: of its source, for an input.
        notes: further bounds, of the whole of its type.
        settings: defaults of how an input is opened.
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
    is_argument: bool = False

    @property
    def kinds(self) -> tuple[Any, ...]:
        """The members of a union but None, or the one type that is no union."""
        return tuple(each for each in map(_bare, _members(self.hint)) if each is not NoneType and each is not None)

    @cached_property
    def bounds(self) -> str:
        """The bounds of its values as they are written: ``>= 0 and < 1``; empty where it has none."""
        notes = limits(self)
        signs = [(*BOUNDS[type(each)], each) for each in notes if type(each) in BOUNDS]
        found = [f"{sign} {getattr(each, field):g}" for sign, field, each in signs]
        lengths = [f"at least {each.min_length} long" for each in notes if isinstance(each, MinLen)]
        lengths += [f"at most {each.max_length} long" for each in notes if isinstance(each, MaxLen)]
        return " and ".join(dict.fromkeys([*found, *lengths]))

    @property
    def wanted(self) -> str:
        """The values that it takes, in words."""
        known = [str(value) for value in choices(self)]
        kinds = [SCALARS[kind] for kind in self.kinds if kind in SCALARS]
        kinds += [_listed(kind) for kind in self.kinds if get_origin(kind) is tuple]
        what = " or ".join([*([f"one of {', '.join(known)}"] if known else []), *kinds]) or "another value"
        return f"{what} {self.bounds}".strip()

    def check(self, who: str, value: Any) -> None:
        """Check a value by the type and the bounds that are declared.

        What only Python can give, such as functions and opened models, is left to the command.

        Raises:
            MethodError: one line that says what was given and what is wanted.
        """
        if not self.is_checked:
            return
        from pydantic import ValidationError

        try:
            self._adapter.validate_python(value)
        except ValidationError:
            given = listed(value if isinstance(value, list | tuple) else [value])
            raise MethodError(f"{who}: {self.name} {given}: give {self.wanted}") from None

    @property
    def is_checked(self) -> bool:
        """Whether the type says what values there are: numbers, texts, choices and lists of them."""
        return all(kind in SCALARS or get_origin(kind) in (Literal, tuple) for kind in self.kinds)

    @cached_property
    def _adapter(self) -> Any:
        """What validates values."""
        from pydantic import ConfigDict, TypeAdapter  # here, since help needs none of it

        hint: Any = Annotated[self.hint, *self.notes] if self.notes else self.hint
        return TypeAdapter(hint, config=ConfigDict(strict=True, allow_inf_nan=False))

    @property
    def named(self) -> bool:
        """Whether it takes several of one type, each with a name of its own: ``dict[str, Text]``."""
        return any(get_origin(each) is dict for each in self.kinds)

    @property
    def many(self) -> bool:
        """Whether it is an input that takes any number of values: ``tuple[ComparedModel, ...]``."""
        return any(get_origin(each) is tuple and kinds_of(self) for each in self.kinds)

    @property
    def option(self) -> str:
        """As it is written on the command line."""
        return "--" + (self.spelling or self.name).replace("_", "-")


@dataclass(frozen=True)
class Signature:
    """What a command takes and returns.

    Attributes:
        inputs: what it must be given, by name.
        options: what may be set, by name, fields of dataclasses among them.
        groups: the parameters whose fields are options, each with its default: an instance, or None for an optional
            group that does not exist until one of its fields is given.
        kinds: the dataclass of each group.
        optional: the groups that may be None.
        work: the name of the parameter that gets the folder of unfinished work; empty where there is none.
        result: the type of what comes back.
    """

    inputs: Mapping[str, Parameter]
    options: Mapping[str, Parameter]
    groups: Mapping[str, Any]
    work: str
    result: Any
    kinds: Mapping[str, Any] = field(default_factory=dict)
    optional: frozenset[str] = frozenset()

    def gathered(self, slug: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """Keyword arguments as the function takes them: fields go into their dataclass, and a string becomes a tuple.

        A string that is given for a tuple is split at its commas, as on the command line.

        Raises:
            MethodError: for a field given beside its whole dataclass, a string that is not such a tuple, or a value of
                another type or out of its bounds.
        """
        parts: dict[str, dict[str, Any]] = {}
        whole: dict[str, Any] = {}
        for name, value in given.items():
            group = self._group_of(name)
            if group and group in given:
                raise MethodError(f"{slug}: {name} is a part of {group}: give one of the two")
            if name in self.options:
                value = _split(slug, self.options[name], value) if isinstance(value, str) else value
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
        """A group with some values; the others are those of its default."""
        default = self.groups[group]
        return self.kinds[group](**values) if default is None else replace(default, **values)

    def completed(self, given: Mapping[str, Any], *house: Any, seed: int | None = None) -> dict[str, Any]:
        """Keyword arguments with what the house fills in, by type, where the command takes it; what is given wins.

        Args:
            house: such as a budget and a folder of work.
            seed: known by its name.
        """
        found = dict(given)
        for value in house:
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
    """The contract of a command's function, or of one that is read from its source and not imported.

    The two are equal but for their types and defaults, which of a function that is not imported are those of
    :mod:`lamella.source`.
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
                    raise MethodError(f"{function.__name__}: two of its options are called {part.name}")
                found[part.name] = part
        else:
            found[each.name] = each
    optional = frozenset(
        each.name for each in options if each.name in groups and None in map(_none, _members(each.hint))
    )
    return Signature({each.name: each for each in positional}, found, groups, work, result, kinds, optional)


def _inspected(function: Callable[..., Any]) -> tuple[list[Parameter], list[Parameter], Any]:
    """The positional and the keyword-only parameters of a function, and its result."""
    function = inspect.unwrap(function)
    hints = get_type_hints(function, include_extras=True)
    docs = explained(inspect.getdoc(function) or "")
    positional: list[Parameter] = []
    options: list[Parameter] = []
    for name, given in inspect.signature(function).parameters.items():
        if given.kind is not given.VAR_KEYWORD:
            found = _parameter(name, hints.get(name, Any), given.default, docs)
            (options if given.kind is given.KEYWORD_ONLY else positional).append(found)
    return positional, options, hints.get("return")


def _read(function: Function) -> tuple[list[Parameter], list[Parameter], Any]:
    """The same of a function that is not imported."""
    node, docs = function.node, explained(function.__doc__)
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
    if isinstance(hint, Noted):
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
        notes=tuple(each for each in notes if not isinstance(each, Named | Split | Settings | Argument)),
        settings=next((each.values for each in notes if isinstance(each, Settings)), {}),
        is_argument=any(isinstance(each, Argument) for each in notes),
    )


def _group(parameter: Parameter) -> Any:
    """The dataclass whose fields an option stands for; None for an option that stands for itself."""
    default = parameter.default
    for kind in parameter.kinds:
        is_instance = isinstance(default, Instance) and isinstance(kind, Class)
        is_instance |= isinstance(kind, type) and is_dataclass(kind) and isinstance(default, kind)
        if is_instance or (default is None and getattr(kind, "prefixed", False) is True):
            return kind
    return None


def _fields(whole: Parameter, kind: Any) -> list[Parameter]:
    """The fields of a group as parameters, with the values that they have in the default."""
    default = kind() if whole.default is None else whole.default
    if isinstance(kind, Class):
        hints = {name: each.module.evaluate(each.node.annotation) for name, each in kind.fields.items()}
        docs = explained(kind.__doc__, "Attributes")
    else:
        every = get_type_hints(kind, include_extras=True)
        hints = {each.name: every[each.name] for each in fields(kind) if each.init}
        docs = explained(inspect.getdoc(kind) or "", "Attributes")
    prefix = f"{whole.name}_" if getattr(kind, "prefixed", False) is True else ""
    found = [_parameter(name, hint, getattr(default, name), docs) for name, hint in hints.items()]
    return [replace(each, name=prefix + each.name, part=each.name, group=whole.name) for each in found]


def fields_of(name: str, default: Any) -> list[Parameter]:
    """The fields of a group that every command has, as parameters.

    Args:
        name: of the group.
        default: an instance, or what the source says of one.
    """
    kind = default.cls if isinstance(default, Instance) else type(default)
    return _fields(Parameter(name, kind, default), kind)


def _none(kind: Any) -> Any:
    """None for the type of None, which is written either way."""
    return None if kind is NoneType else kind


def explained(docstring: str, section: str = "Args") -> dict[str, str]:
    """What a docstring says of each parameter; several that are explained together share their text."""
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
    """Whether an input of this type is a model: opened, one stack of it, with its plan, or not opened yet."""
    module = kind.module.name if isinstance(kind, Class) else getattr(kind, "__module__", "")
    return module.startswith(("lamella.stack", "lamella.zoo")) and kind.__name__ in MODELS


def is_stack(kind: Any) -> bool:
    """Whether an input of this type is one stack of a model."""
    return is_model(kind) and kind.__name__ == "Stack"


def kinds_of(parameter: Parameter) -> list[Any]:
    """The types that an input can be opened as."""
    kinds = [_item(kind) for kind in parameter.kinds]
    classes = [kind for kind in kinds if isinstance(kind, type | Class)]
    return [kind for kind in classes if is_model(kind) or hasattr(kind, "open") or hasattr(kind, "read")]


def _item(kind: Any) -> Any:
    """The type of one value of an input that takes several."""
    if get_origin(kind) is dict:
        return get_args(kind)[1]
    return get_args(kind)[0] if get_origin(kind) is tuple and Ellipsis in get_args(kind) else kind


def kind_of(parameter: Parameter) -> Any:
    """The first type that an input is opened as; None where it is taken as it is."""
    return next(iter(kinds_of(parameter)), None)


def judges(parameter: Parameter) -> bool:
    """Whether an input is the test, of text or of images with text, that every command measures on by default."""
    return parameter.split == "test" and {"Text", "ImageText"} <= {kind.__name__ for kind in kinds_of(parameter)}


def settings_of(parameter: Parameter) -> Mapping[str, Parameter]:
    """What can be set of how an input is opened, whichever of its types it is."""
    kinds = [kind for kind in kinds_of(parameter) if hasattr(kind, "open") and not is_model(kind)]
    found = {name: each for kind in reversed(kinds) for name, each in signature(kind.open).options.items()}
    defaults = parameter.settings
    return {name: replace(each, default=defaults.get(name, each.default)) for name, each in found.items()}


def _split(slug: str, option: Parameter, text: str) -> Any:
    """The tuple that a string stands for; the string itself where the option takes strings, or no tuple."""
    kinds = [entries(kind) for kind in option.kinds if get_origin(kind) is tuple]
    if not kinds or str in option.kinds or text in choices(option):
        return text
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
    raise MethodError(f"{slug}: {option.name} {text}: give {option.wanted}, as a tuple or separated by commas")


def _listed(kind: Any) -> str:
    """The entries of a tuple in words: ``numbers``, ``2 numbers`` or ``some of even, release``."""
    first, *rest = entries(kind)
    if get_origin(first) is Literal:
        return f"some of {', '.join(map(str, get_args(first)))}"
    what = "numbers" if first in (int, float) else "names"
    return what if Ellipsis in rest else f"{1 + len(rest)} {what}"


def entries(kind: Any) -> tuple[Any, ...]:
    """The types of a tuple's entries, without their bounds, as they stand in its type: ``(int, ...)``."""
    return tuple(map(_bare, get_args(kind)))


def _members(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the one type that is no union."""
    if isinstance(hint, OneOf):
        return hint.kinds
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _bare(hint: Any) -> Any:
    """A type without its notes."""
    if isinstance(hint, Noted):
        return _bare(hint.kind)
    return _bare(get_args(hint)[0]) if get_origin(hint) is Annotated else hint


def notes_of(hint: Any) -> Iterator[Any]:
    """The notes of a type and of the types in it."""
    if isinstance(hint, Noted):
        yield from (*hint.notes, *notes_of(hint.kind))
    elif get_origin(hint) is Annotated:
        kind, *notes = get_args(hint)
        yield from (*notes, *notes_of(kind))
    elif get_origin(hint) is tuple or len(_members(hint)) > 1:
        for each in get_args(hint) if get_origin(hint) is tuple else _members(hint):
            yield from notes_of(each)


def limits(parameter: Parameter) -> list[Any]:
    """The bounds of a parameter's values, or of their entries, as :mod:`annotated_types` has them."""
    return [*notes_of(parameter.hint), *parameter.notes]


def choices(parameter: Parameter) -> list[Any]:
    """The values of a literal type, or none where it has no such type."""
    return [value for kind in parameter.kinds if get_origin(kind) is Literal for value in get_args(kind)]
