"""What the commands share: printing for people or for machines, and reading options."""

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
SEED_HELP = "Seed of everything that is drawn."
STACK_HELP = "Which stack, of a model with several; if left out, the only one that the method works on."
SeedOption = Annotated[int, typer.Option(help=SEED_HELP)]


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


def table(title: str, columns: Sequence[Any], rows: Sequence[Sequence[Any]], console: Console = out) -> None:
    """Print a table; numbers go to the right, and nothing in it is markup."""
    content = Table(title, columns, rows)
    grid = Grid(title=Text(title), title_justify="left", title_style="bold", header_style="bold")
    for header, numeric in zip(content.headers, content.numeric, strict=True):
        grid.add_column(Text(header), justify="right" if numeric else "left")
    for row in content.cells:
        grid.add_row(*map(Text, row))
    console.print(grid)


def print_summary(summary: Summary, notes: Sequence[str]) -> None:
    """Print what a run found."""
    for each in summary.tables:
        table(each.title, each.columns, each.rows)
    for line in (summary.verdict, *summary.lines, *(f"note: {note}" for note in notes)):
        out.print(line, soft_wrap=True, highlight=False, markup=False)


def is_said(option: Parameter) -> bool:
    """Whether a command line can say the values of an option."""
    return bool(choices(option)) or any(kind in PLAIN or get_origin(kind) is tuple for kind in option.kinds)


def parsed(slug: str, option: Parameter, text: str, said: str) -> Any:
    """The value of an option.

    Args:
        said: how it was written, for the message.

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
                raise MethodError(f"{said}: an entry is empty; write them with single commas")
            found = tuple(_entry(entries(kind)[0], part, said) for part in parts) if text.strip() else ()
            if Ellipsis in get_args(kind) or len(found) == len(get_args(kind)):
                return found
    except (ValueError, KeyError):
        pass
    plain = [kind.__name__ for kind in option.kinds if kind in PLAIN[:-1]]
    lists = [_list_of(entries(kind)) for kind in option.kinds if get_origin(kind) is tuple]
    if known and not plain and not lists:
        raise MethodError(f"{said}: choose one of {', '.join(map(str, known))}")
    expected = " or ".join([*known, *sorted(plain), *lists])
    if expected:
        raise MethodError(f"{said}: {slug} takes {expected} there")
    raise MethodError(f"{slug}: option '{option.name}' is for the Python API, not for the command line")


def _list_of(kinds: tuple[Any, ...]) -> str:
    what = "numbers" if kinds[0] in (int, float) else "words"
    return f"{what} with commas" if Ellipsis in kinds else f"{len(kinds)} {what} with commas"


def _entry(kind: Any, text: str, said: str) -> Any:
    """One entry of a list, of a plain type or out of some words."""
    if get_origin(kind) is not Literal:
        return kind(text)
    if text not in get_args(kind):
        raise MethodError(f"{said}: choose among {', '.join(get_args(kind))}")
    return text
