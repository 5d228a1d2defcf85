"""What the commands share: printing for people or for machines, and reading options."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer
from rich.console import Console
from rich.table import Table

from lamella import progress
from lamella.errors import MethodError
from lamella.registry import Method

out = Console()
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
    with progress.shown(errors):
        yield


def print_json(value: Any) -> None:
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
    hints = get_type_hints(entry.function)
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
    choices = [choice for choice in get_args(hint) if isinstance(choice, str)]
    kinds = {hint, *get_args(hint)} if get_origin(hint) is not None or get_args(hint) else {hint}
    try:
        if choices:
            if text not in choices:
                raise ValueError
            return text
        if bool in kinds:
            return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
        for kind in (int, float):
            if kind in kinds:
                return kind(text)
        if str in kinds:
            return text
    except (ValueError, KeyError):
        expected = (
            " or ".join(choices) if choices else "/".join(sorted(k.__name__ for k in kinds if isinstance(k, type)))
        )
        raise MethodError(f"--set {name}={text}: {slug} takes {expected} there") from None
    raise MethodError(f"{slug}: option '{name}' is for the Python API, not for the command line")
