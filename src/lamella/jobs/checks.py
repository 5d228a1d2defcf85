"""Checks of what a command is given, by name, before anything is opened: a mistake is found in the first second."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lamella.data import ImageText, Text
from lamella.errors import LamellaError, MethodError
from lamella.plan import Plan, PlanSeries
from lamella.signature import Parameter, Signature, is_model, kinds_of
from lamella.stack import Stack
from lamella.zoo.checks import check_model

FILES = (  # of these a name is a path, and no name of the zoo's or the hub's
    *(".csv", ".gguf", ".gz", ".json", ".jsonl", ".md", ".npy", ".npz", ".parquet", ".ply", ".safetensors", ".txt"),
    *(".gif", ".jpeg", ".jpg", ".mp4", ".png", ".webp"),
)


def check_inputs(contract: Signature, given: Mapping[str, Any], allow_pickle: bool = False) -> None:
    """Check all inputs of a command that are names; what is open already is left alone.

    Raises:
        LamellaError: one line for the first that cannot be used.
    """
    for parameter in contract.inputs.values():
        value = given.get(parameter.name)
        for each in value.values() if parameter.named and isinstance(value, Mapping) else [value]:
            check_input(kinds_of(parameter), each, parameter, allow_pickle)


def check_source(name: Any) -> None:
    """Check the name of a text, or of images with text."""
    check_input((Text, ImageText), name)


def check_changed(name: str | Path | None) -> None:
    """Check the name of what is compared with a model, or runs: a plan, a folder, a model; None is left alone."""
    if name is not None:
        check_input((Plan,) if str(name).endswith(".json") else (Stack,), name)


def check_input(
    kinds: Sequence[Any], value: Any, parameter: Parameter | None = None, allow_pickle: bool = False
) -> None:
    """Check that a name can be opened as one of some types; the first type's refusal is raised where none takes it."""
    refusals: list[LamellaError] = []
    for kind in kinds:
        try:
            _check(kind, value, parameter, allow_pickle)
        except LamellaError as error:
            refusals.append(error)
        else:
            return
    if refusals:
        raise refusals[0]


def _check(kind: Any, value: Any, parameter: Parameter | None, allow_pickle: bool) -> None:
    names = value if isinstance(value, list) and getattr(kind, "many", False) else [value]
    for name in (each for each in names if isinstance(each, str | Path)):
        if is_model(kind):
            check_model(name, allow_pickle)
        elif kind in (Plan, PlanSeries):
            kind.read(name)
        elif hasattr(kind, "check"):
            kind.check(name)
        else:
            _check_path(name, parameter)


def _check_path(name: str | Path, parameter: Parameter | None) -> None:
    """Check that what can only be a file or a folder is there, and no empty file."""
    path = Path(name).expanduser()
    what = f"{parameter.name}: " if parameter is not None else ""
    is_path = isinstance(name, Path) or path.is_absolute() or str(name).startswith(".") or path.suffix.lower() in FILES
    if is_path and not path.exists():
        raise MethodError(f"{what}no file {name}, so that it cannot be read: give one that is there")
    if path.is_file() and path.stat().st_size == 0:
        raise MethodError(f"{what}{name} is empty")
