"""Options that belong together, as the fields of one dataclass: a command takes the group, its help the options."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import wraps
from typing import Any, get_type_hints


def with_fields(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose dataclass parameters are as many options as they have fields."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: kind for name, kind in hints.items() if is_dataclass(kind)}
    parameters = []
    for name, given in inspect.signature(command).parameters.items():
        if name not in groups:
            parameters.append(given.replace(kind=given.KEYWORD_ONLY, annotation=hints[name]))
            continue
        kinds = get_type_hints(groups[name], include_extras=True)
        parameters += [
            inspect.Parameter(each.name, given.KEYWORD_ONLY, default=_default(each), annotation=kinds[each.name])
            for each in fields(groups[name])
        ]

    @wraps(command)
    def gathered(**given: Any) -> None:
        for name, kind in groups.items():
            given[name] = kind(**{each.name: given.pop(each.name) for each in fields(kind)})
        command(**given)

    gathered.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    gathered.__annotations__ = {each.name: each.annotation for each in parameters}
    return gathered


def _default(option: Field[Any]) -> Any:
    return option.default if option.default_factory is MISSING else option.default_factory()
