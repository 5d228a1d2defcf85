"""The ``lamella`` program, and the one place where errors become a line and an exit code."""

from __future__ import annotations

import logging
import sys
import warnings

import typer
from rich.console import Console
from rich.markup import escape

from lamella import __version__
from lamella.cli.config import arguments_of
from lamella.cli.run import Methods, Planners, Verbs
from lamella.errors import LamellaError, NoteWarning

app = typer.Typer(
    name="lamella",
    cls=Verbs,
    help="Selective computation and reuse in trained models: look at a model layer by layer, decide what each layer "
    "should do, carry it out, prove what was gained and lost, export an ordinary checkpoint.\n\n"
    "Start with [bold]lamella compress smollm2 --speedup 1.3 -o small[/bold], then open small/report.html.",
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(
    typer.Typer(
        name="run",
        cls=Methods,
        help="Run any method; lamella run SLUG --help explains its inputs and options. Methods with several steps have "
        "a command for each, after the slug.",
        no_args_is_help=True,
    )
)
app.add_typer(
    typer.Typer(
        name="plan",
        cls=Planners,
        help="Make plans with one method: the same as lamella run SLUG, for planning methods. The folder contains "
        "the series and plan.json, the plan that fits the budget.",
        no_args_is_help=True,
    )
)
errors = Console(stderr=True)
INTERRUPTED = 130  # exit code of a program that was stopped by Ctrl-C


def _print_version(requested: bool) -> None:
    if requested:
        print(f"lamella {__version__}")
        raise typer.Exit


@app.callback()
def options(
    threads: int = typer.Option(0, help="Number of CPU threads; 0 leaves the choice to torch.", show_default=False),
    dtype: str = typer.Option(
        "",
        metavar="TYPE",
        help="Open models in float32, bfloat16 or float16. By default as stored, but in float32 on a CPU if they fit.",
        show_default=False,
    ),
    device: str = typer.Option(
        "", help="Device of the models, such as cpu or cuda:1; defaults to the first GPU.", show_default=False
    ),
    prove_again: bool = typer.Option(
        False,
        "--prove-again",
        help="Repeat the proof of a derived architecture, even if an earlier proof is cached.",
    ),
    debug: bool = typer.Option(False, help="Show the traceback of an error."),
    version: bool = typer.Option(
        False, "--version", help="Show the version and stop.", is_eager=True, callback=_print_version
    ),
) -> None:
    """Options of every command; they go before the command."""
    if threads:
        import torch

        torch.set_num_threads(threads)
    if dtype or device or prove_again:
        from lamella.zoo import prefer

        prefer(dtype or None, device or None, prove_again)


def main() -> None:
    """Run the command line; errors that the user can fix are one line and exit code 2."""
    warnings.showwarning = _show_warning
    for name in (
        "torchao",
        "torch.utils._pytree",
    ):  # they report kernels of other machines when transformers imports them
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        app(arguments_of(sys.argv[1:]))
    except LamellaError as error:
        if "--debug" in sys.argv:
            raise
        errors.print(f"[bold red]lamella:[/bold red] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        _print_interrupted()
        raise SystemExit(INTERRUPTED) from None
    except SystemExit as stop:
        if stop.code == INTERRUPTED:  # typer turns the interrupt of a command into this
            _print_interrupted()
        raise


def _print_interrupted() -> None:
    errors.print("[bold]lamella:[/bold] interrupted; the same command resumes if it keeps a journal", soft_wrap=True)


def _show_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    if issubclass(category, UserWarning) and not issubclass(category, NoteWarning):
        errors.print(f"[yellow]note:[/yellow] {escape(str(message))}", highlight=False, soft_wrap=True)
