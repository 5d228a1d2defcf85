"""Shared parts of the commands: output for people or for machines, and parsing of options."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from lamella import progress
from lamella.errors import MethodError
from lamella.processes import is_first
from lamella.result import Summary, Table
from lamella.signature import Parameter, choices, entries

out = Console(quiet=not is_first())
errors = Console(stderr=True)

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="A zoo name (smollm2), a checkpoint folder or a hub id.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document for machines instead of a table.")]
PLAIN = (bool, int, float, str, Path)
SEED_HELP = "Random seed."
STACK_HELP = "Name of the stack, for a model with several; defaults to the only one that the method works on."
SeedOption = Annotated[int, typer.Option(help=SEED_HELP)]


@contextmanager
def working() -> Iterator[None]:
    """Show progress on stderr, and silence the bars and messages of other libraries."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with progress.shown(errors) if is_first() else nullcontext():
        yield


def print_json(value: Any) -> None:
    """Print a value as JSON."""
    if is_first():
        print(json.dumps(value, indent=2, default=str), flush=True)


def table(title: str, columns: Sequence[Any], rows: Sequence[Sequence[Any]], console: Console = out) -> None:
    """Print a table with numbers aligned to the right; nothing in it is interpreted as markup.

    Args:
        title: one line.
        columns: the headers.
        rows: one cell for each column.
        console: where it is printed.
    """
    content = Table(title, columns, rows)
    grid = Grid(title=Text(title), title_justify="left", title_style="bold", header_style="bold")
    for header, numeric in zip(content.headers, content.numeric, strict=True):
        grid.add_column(Text(header), justify="right" if numeric else "left")
    for row in content.cells:
        grid.add_row(*map(Text, row))
    console.print(grid)


def print_summary(summary: Summary, notes: Sequence[str]) -> None:
    """Print the summary of a run.

    Args:
        summary: the summary.
        notes: further remarks.
    """
    for each in summary.tables:
        table(each.title, each.columns, each.rows)
    for line in (summary.verdict, *summary.lines, *(f"note: {note}" for note in notes)):
        out.print(line, soft_wrap=True, highlight=False, markup=False)


def is_writable(option: Parameter) -> bool:
    """Return whether the values of an option can be written on a command line."""
    return bool(choices(option)) or any(kind in PLAIN or get_origin(kind) is tuple for kind in option.kinds)


def parsed(slug: str, option: Parameter, text: str, written: str) -> Any:
    """Parse the value of an option.

    Args:
        slug: the command, for messages.
        option: the option.
        text: the value.
        written: the argument as written, for messages.

    Raises:
        MethodError: for a value of another type.
    """
    known = choices(option)
    if text in known:
        return text
    parts = [part.strip() for part in text.split(",")]
    try:
        if bool in option.kinds:
            return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
        for kind in PLAIN[1:]:
            if kind in option.kinds:
                return kind(text)
        for kind in (each for each in option.kinds if get_origin(each) is tuple):
            if text.strip() and not all(parts):
                raise MethodError(f"{written}: an entry is empty; separate entries by single commas")
            found = tuple(_entry(entries(kind)[0], part, written) for part in parts) if text.strip() else ()
            if Ellipsis in get_args(kind) or len(found) == len(get_args(kind)):
                return found
    except (ValueError, KeyError):
        pass
    plain = [kind.__name__ for kind in option.kinds if kind in PLAIN[:-1]]
    lists = [_list_of(entries(kind)) for kind in option.kinds if get_origin(kind) is tuple]
    if known and not plain and not lists:
        raise MethodError(f"{written}: choose one of {', '.join(map(str, known))}")
    expected = " or ".join([*known, *sorted(plain), *lists])
    if expected:
        raise MethodError(f"{written}: {slug} expects {expected}")
    raise MethodError(f"{slug}: option '{option.name}' is for the Python API, not for the command line")


def _list_of(kinds: tuple[Any, ...]) -> str:
    what = "numbers" if kinds[0] in (int, float) else "words"
    return f"{what} separated by commas" if Ellipsis in kinds else f"{len(kinds)} {what} separated by commas"


def _entry(kind: Any, text: str, written: str) -> Any:
    """Parse one entry of a list, of a plain type or one of some choices."""
    if get_origin(kind) is not Literal:
        return kind(text)
    if text not in get_args(kind):
        raise MethodError(f"{written}: choose among {', '.join(get_args(kind))}")
    return text
