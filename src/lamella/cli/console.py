"""What the commands share: printing for people or for machines, and reading options."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer
from rich.console import Console
from rich.table import Table

from lamella import progress
from lamella.errors import MethodError
from lamella.processes import is_first
from lamella.registry import Method

out = Console(quiet=not is_first())
errors = Console(stderr=True)

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="A zoo name (smollm2), a checkpoint folder or a hub id.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document for machines instead of a table.")]
SeedOption = Annotated[int, typer.Option(help="Seed of everything that is drawn.")]
SetOption = Annotated[
    list[str],
    typer.Option(
        "--set", metavar="NAME=VALUE", help="An option of the method; repeat it. `lamella methods SLUG` lists them."
    ),
]
PickleOption = Annotated[bool, typer.Option("--allow-pickle", help="Also open pickle checkpoints, which can run code.")]


@contextmanager
def working() -> Iterator[None]:
    """Show progress on stderr, and keep the libraries' own bars and notices quiet."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with progress.shown(errors) if is_first() else nullcontext():
        yield


def print_json(value: Any) -> None:
    if is_first():
        print(json.dumps(value, indent=2, default=str))


def table(title: str, columns: list[str], rows: list[list[Any]], console: Console = out) -> None:
    """Print a table; numbers go to the right."""
    grid = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for index, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[index], int | float) for row in rows)
        grid.add_column(column, justify="right" if numeric else "left")
    for row in rows:
        grid.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row))
    console.print(grid)


def read_options(entry: Method, given: list[str]) -> dict[str, Any]:
    """``NAME=VALUE`` pairs as values of the types that the method declares.

    Raises:
        MethodError: for an unknown name, or a value of another type.
    """
    hints = get_type_hints(entry.call)
    values: dict[str, Any] = {}
    for pair in given:
        name, equals, text = pair.partition("=")
        name = name.replace("-", "_")
        if not equals:
            raise MethodError(f"--set {pair}: write NAME=VALUE, such as --set remove=0.2")
        if name not in entry.options:
            raise MethodError(
                f"{entry.slug} has no option '{name}'; its options are: {', '.join(entry.options) or 'none'}"
            )
        values[name] = _value(entry.slug, name, text, hints[name])
    return values


def _value(slug: str, name: str, text: str, hint: Any) -> Any:
    kinds = _kinds(hint)
    choices = [choice for kind in kinds for choice in get_args(kind) if get_origin(kind) is Literal]
    if text in choices:
        return text
    try:
        if bool in kinds:
            return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
        for kind in (int, float, str, Path):
            if kind in kinds:
                return kind(text)
        for kind in kinds:
            if get_origin(kind) is tuple:
                return tuple(get_args(kind)[0](part) for part in text.split(","))
    except (ValueError, KeyError):
        pass
    plain = [kind.__name__ for kind in kinds if kind in (bool, int, float, str)]
    lists = ["numbers with commas"] if any(get_origin(kind) is tuple for kind in kinds) else []
    expected = " or ".join([*choices, *sorted(plain), *lists])
    if expected:
        raise MethodError(f"--set {name}={text}: {slug} takes {expected} there")
    raise MethodError(f"{slug}: option '{name}' is for the Python API, not for the command line")


def _kinds(hint: Any) -> list[Any]:
    """The members of a union, or the one kind that is none."""
    if get_origin(hint) in (Union, UnionType):
        return [kind for member in get_args(hint) for kind in _kinds(member)]
    return [hint]
