"""The signature of a command, read as its contract: what it must be given, what may be set, what the house fills in.

    def finercut(stack: Stack, calibration: Text, *, level: Level = "sublayer", budget: Budget = Budget(),
                 work: Work = Work()) -> PlanSeries:

Positional parameters are inputs. Keyword-only ones are options; one whose type is a frozen dataclass stands for its
fields, so ``remove=0.2`` is ``budget=Budget(remove=0.2)``, in Python and on the command line. :class:`Work` is the
house's own to fill in. Another spelling of a name stands in the annotation, and help in the docstring.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from lamella.errors import MethodError
from lamella.files import Work

EMPTY = inspect.Parameter.empty


@dataclass(frozen=True)
class Named:
    """Another spelling of a parameter on the command line: ``lam: Annotated[float, Named("lambda")] = 1.0``."""

    name: str


@dataclass(frozen=True)
class Split:
    """Which part of its source an input is read from, where that is not the calibration split: ``Split("test")``."""

    name: str


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
        split: of its source, for an input.
    """

    name: str
    hint: Any
    default: Any = EMPTY
    help: str = ""
    spelling: str = ""
    group: str = ""
    split: str = "calibration"

    @property
    def kinds(self) -> tuple[Any, ...]:
        """The members of a union but None, or the one type that is no union."""
        union = get_origin(self.hint) in (Union, UnionType)
        return tuple(each for each in (get_args(self.hint) if union else (self.hint,)) if each is not NoneType)

    @property
    def named(self) -> bool:
        """Whether it takes several of one type, each with a name of its own: ``dict[str, Text]``."""
        return any(get_origin(each) is dict for each in self.kinds)

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
        groups: the parameters whose fields are options, each with its default.
        work: the name of the parameter that gets the folder of unfinished work; empty where there is none.
        result: the type of what comes back.
    """

    inputs: Mapping[str, Parameter]
    options: Mapping[str, Parameter]
    groups: Mapping[str, Any]
    work: str
    result: Any

    def gathered(self, slug: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """Keyword arguments as the function takes them: fields go into their dataclass, and a string becomes a tuple.

        A string that is given for a tuple is split at its commas, as on the command line.

        Raises:
            MethodError: for a field given beside its whole dataclass, or a string that is not such a tuple.
        """
        parts: dict[str, dict[str, Any]] = {}
        whole: dict[str, Any] = {}
        for name, value in given.items():
            group = self._group_of(name)
            if group and group in given:
                raise MethodError(f"{slug}: {name} is a part of {group}: give one of the two")
            if isinstance(value, str) and name in self.options:
                value = _split(slug, self.options[name], value)
            (parts.setdefault(group, {}) if group else whole)[name] = value
        return whole | {group: replace(self.groups[group], **values) for group, values in parts.items()}

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
                parts = {name: found.pop(name) for name in list(found) if self._group_of(name) == group}
                found.setdefault(group, replace(value, **parts))
        if seed is not None and "seed" in self.options:
            found.setdefault("seed", seed)
        return found

    def _group_of(self, name: str) -> str:
        return self.options[name].group if name in self.options else ""


@cache
def signature(function: Callable[..., Any]) -> Signature:
    """The contract of a command's function."""
    function = inspect.unwrap(function)
    hints = get_type_hints(function, include_extras=True)
    told = explained(inspect.getdoc(function) or "")
    inputs, options, groups, work = {}, {}, {}, ""
    for name, given in inspect.signature(function).parameters.items():
        found = _parameter(name, hints.get(name, Any), given.default, told)
        if given.kind is given.VAR_KEYWORD:
            continue
        if given.kind is not given.KEYWORD_ONLY:
            inputs[name] = found
        elif found.hint is Work:
            work = name
        elif _is_group(found):
            groups[name] = found.default
            for part in _fields(found):
                if part.name in options:
                    raise MethodError(f"{function.__name__}: two of its options are called {part.name}")
                options[part.name] = part
        else:
            options[name] = found
    return Signature(inputs, options, groups, work, hints.get("return"))


def _parameter(name: str, hint: Any, default: Any, told: Mapping[str, str], group: str = "") -> Parameter:
    notes: list[Any] = []
    if get_origin(hint) is Annotated:
        hint, *notes = get_args(hint)
    spelling = next((each.name for each in notes if isinstance(each, Named)), "")
    split = next((each.name for each in notes if isinstance(each, Split)), "calibration")
    return Parameter(name, hint, default, told.get(name, ""), spelling, group, split)


def _is_group(parameter: Parameter) -> bool:
    kind = parameter.hint
    return isinstance(kind, type) and is_dataclass(kind) and isinstance(parameter.default, kind)


def _fields(whole: Parameter) -> list[Parameter]:
    """The fields of a dataclass as parameters, with the values that they have in the default."""
    hints = get_type_hints(whole.hint, include_extras=True)
    told = explained(inspect.getdoc(whole.hint) or "", "Attributes")
    return [
        _parameter(each.name, hints[each.name], getattr(whole.default, each.name), told, whole.name)
        for each in fields(whole.hint)
        if each.init
    ]


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


def _split(slug: str, option: Parameter, text: str) -> Any:
    """The tuple that a string stands for; the string itself where the option takes strings, or no tuple."""
    kinds = [get_args(kind) for kind in option.kinds if get_origin(kind) is tuple]
    if not kinds or str in option.kinds or text in choices(option):
        return text
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    if not all(parts):
        raise MethodError(f"{slug}: {option.name}={text!r} has an empty entry: separate entries by single commas")
    for kind, *rest in kinds:
        convert = kind if kind in (int, float) else str
        try:
            found = tuple(convert(part) for part in parts)
        except ValueError:
            continue
        if Ellipsis in rest or len(found) == 1 + len(rest):
            return found
    kind, *rest = kinds[0]
    wanted = "" if Ellipsis in rest else f"{1 + len(rest)} "
    entries = "numbers" if kind in (int, float) else "names"
    raise MethodError(f"{slug}: {option.name}={text!r}: give {wanted}{entries}, as a tuple or separated by commas")


def choices(parameter: Parameter) -> list[Any]:
    """The values of a literal type, or none where it has no such type."""
    return [value for kind in parameter.kinds if get_origin(kind) is Literal for value in get_args(kind)]
