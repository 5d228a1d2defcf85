"""Every bound that is declared is kept: a value beyond it is refused by name, before a command does anything."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, get_origin

import pytest
from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from worlds import COMMANDS

from lamella.errors import MethodError
from lamella.registry import Method
from lamella.signature import Parameter, choices, entries, limits

STEP = 1e-6  # beyond a bound that may be reached


class Untouched:
    """An input that a command must not look at."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("architecture", "stacks"):
            raise AttributeError(name)
        raise AssertionError(f"the command has looked at {name} of an input")


def beyond(option: Parameter) -> Iterator[Any]:
    """Values that are just out of each bound of an option."""
    kinds = {each for kind in option.kinds for each in (entries(kind) if get_origin(kind) is tuple else (kind,))}
    whole = int in kinds and float not in kinds
    for note in limits(option):
        match note:
            case Ge(ge=bound):
                yield bound - 1 if whole else bound - STEP * max(1.0, abs(bound))
            case Gt(gt=bound):
                yield int(bound) if whole else float(bound)
            case Le(le=bound):
                yield bound + 1 if whole else bound + STEP * max(1.0, abs(bound))
            case Lt(lt=bound):
                yield int(bound) if whole else float(bound)
            case MinLen(min_length=length):
                yield ("1",) * (length - 1)
            case MaxLen(max_length=length):
                yield ("1",) * (length + 1)
    if float in kinds and any(isinstance(note, Ge | Gt | Le | Lt) for note in limits(option)):
        yield math.nan
    if choices(option) and option.is_checked and str not in option.kinds:
        yield "no such choice"


BOUNDED = [
    pytest.param(entry, name, value, id=f"{command}: {name}={value!r}")
    for command, entry in COMMANDS.items()
    for name, option in entry.signature.options.items()
    for value in beyond(option)
]


@pytest.mark.parametrize(("entry", "name", "value"), BOUNDED)
def test_a_value_beyond_a_bound_is_refused_by_name(entry: Method, name: str, value: Any) -> None:
    option = entry.signature.options[name]
    bad = value
    if not any(kind in (int, float, str) for kind in option.kinds) and not isinstance(value, tuple | str):
        bad = (value,) * 2  # an entry of a list
    inputs = [Untouched() for _ in entry.signature.inputs]
    with pytest.raises(MethodError, match=name) as error:
        entry.call(*inputs, **{name: bad})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_default_keeps_its_bounds(command: str) -> None:
    for option in COMMANDS[command].signature.options.values():
        option.check(command, option.default)
