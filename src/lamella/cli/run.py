"""The command line of every declared command, generated from its signature and docstring.

Positional parameters become arguments, or options from which inputs are opened; keyword-only parameters become options
with their defaults; values that the runner fills in have options of their own. A command is imported only when it runs:
help is read from its source.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.markup import escape
from typer.core import TyperGroup

from lamella.cli.config import defaults_of
from lamella.cli.console import (
    SEED_HELP,
    STACK_HELP,
    is_writable,
    out,
    parsed,
    print_json,
    print_summary,
    table,
    working,
)
from lamella.cli.schema import schema_of
from lamella.errors import MethodError
from lamella.registry import Method, all_commands, commands, get_method
from lamella.signature import (
    EMPTY,
    Parameter,
    Signature,
    fields_of,
    is_model,
    is_stack,
    is_test_input,
    kind_of,
    settings_of,
)
from lamella.source import Class, read_module

INPUTS, OPTIONS, OUTPUT = "Inputs", "Options", "Output"
TEST = "stdlib"  # the text of the default test, of another kind than the default calibration text
TEST_HELP = (
    "What changed models are evaluated on: stdlib (the default), pydoc, a text file, a .jsonl file with a prompt, chat "
    "or text in each line, or a datasets name. The same sequences in all commands; for images with text, other rows of "
    "the same source."
)
MODEL = ("stack", "model")  # names of the parameter for the model


class DeclaredGroup(TyperGroup):
    """A group of declared commands, which are generated when one of them is used; listing them imports nothing."""

    listing = False
    args: tuple[str, ...] = ()  # the arguments of the command line, from the name of the command on

    @cached_property
    def methods(self) -> dict[str, Method]:
        """The commands by name."""
        raise NotImplementedError

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of the commands."""
        return [*super().list_commands(ctx), *self.methods]

    def get_command(self, ctx: Any, name: str) -> Any:
        """Return a command by name."""
        if name not in self.methods:
            found = super().get_command(ctx, name)
            if found is not None and found.help:
                found.help = unwrapped(found.help)
            return found
        entry = self.methods[name]
        return _named(entry, name) if self.listing else command_of(entry, name, raced(entry, self.args))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Remember the arguments, from the name of the command on, and find the command."""
        self.args = tuple(args)
        return super().resolve_command(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """List the commands without generating them."""
        self.listing = True
        super().format_help(ctx, formatter)


class Verbs(DeclaredGroup):
    """The commands of the program: those written by hand, and the verbs of commands and methods."""

    @cached_property
    def methods(self) -> dict[str, Method]:
        """The commands by name."""
        found = [each for known in all_commands().values() for each in known.values() if each.verb]
        return {
            str(each.verb): each for each in sorted(found, key=lambda each: not each.is_own)
        }  # Lamella's own commands first


class Methods(DeclaredGroup):
    """One command for each method, and for each of its further commands after its slug."""

    @cached_property
    def methods(self) -> dict[str, Method]:
        """The commands by name."""
        found = {f"{slug} {name}".strip(): each for slug, all_ in all_commands().items() for name, each in all_.items()}
        return {name: each for name, each in sorted(found.items()) if self.lists(each)}

    def lists(self, entry: Method) -> bool:
        """Return whether a command belongs to the group."""
        return not entry.is_own

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find a method, or a further command of it, by one or two words."""
        commands(args[0])  # refuses an unknown slug, and suggests similar ones
        self.args = tuple(args)
        name = " ".join(args[:2]) if " ".join(args[:2]) in self.methods else args[0]
        return name, self.get_command(ctx, name), args[len(name.split()) :]


class Planners(Methods):
    """One command for each planning method: the same as in :class:`Methods`."""

    def lists(self, entry: Method) -> bool:
        """Return whether a command belongs to the group."""
        return entry.result == "PlanSeries"


def raced(entry: Method, args: tuple[str, ...]) -> list[str]:
    """Return the planners whose options a command line may have: those named by ``--method`` or by options.

    Args:
        entry: the command.
        args: the command line.
    """
    if not any(_plans(each) for each in entry.declared.options.values()):
        return []
    words = list(args)
    named = [word.partition("=")[2] or following for word, following in pairwise([*words, ""])
             if word.partition("=")[0] == "--method"]  # fmt: skip
    slugs = [slug.strip() for each in named for slug in each.split(",") if slug.strip() not in ("", "auto", "all")]
    dotted = [word[2:].partition(".")[0] for word in words if word.startswith("--") and "." in word.partition("=")[0]]
    return list(dict.fromkeys([*slugs, *dotted]))


def _plans(option: Parameter) -> bool:
    """Return whether the values of an option are planners."""
    return any(getattr(kind, "__name__", "") == "Planner" for kind in option.kinds)


def _named(entry: Method, name: str) -> Any:
    """Return a command with its name and its line of help only."""
    app = typer.Typer(add_completion=False)
    app.command(name, help=entry.summary, short_help=entry.summary)(lambda: None)
    return typer.main.get_command(app)


def command_of(entry: Method, name: str, planners: Sequence[str] = ()) -> Any:
    """Generate the command line of a command from its signature.

    Args:
        entry: the command.
        name: the command as typed.
        planners: methods whose options are added as ``--SLUG.OPTION``.
    """
    parameters, given = _parameters(entry)
    parameters += [_shows_schema(entry, name), _reads_config(entry)]
    dotted: dict[str, tuple[str, Parameter]] = {}
    for slug in planners:
        for option in filter(is_writable, get_method(slug).declared.options.values()):
            each = _option(replace(option, spelling=f"{slug}.{option.option[2:]}"), f"Options of {slug}")
            name_of = f"{slug}_{option.name}".replace("-", "_").replace(".", "_")
            parameters.append(each.replace(name=name_of, default=None))
            dotted[name_of] = slug, option

    def invoke(**values: Any) -> None:
        options: dict[str, dict[str, Any]] = {}
        for name, (slug, option) in dotted.items():
            if values[name] is not None:
                options.setdefault(slug, {})[option.name] = _value(slug, option, values[name])
        _run(entry, {target: values[each] for each, target in given.items()}, values, options)

    invoke.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    invoke.__annotations__ = {each.name: each.annotation for each in parameters}
    app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
    app.command(name, help=_help(entry))(invoke)
    return typer.main.get_command(app)


def _parameters(entry: Method) -> tuple[list[inspect.Parameter], dict[str, str]]:
    """Return the parameters of a command line, and the names under which some of them are passed to the command."""
    contract = entry.declared
    made: dict[str, inspect.Parameter] = {}
    for number, each in enumerate(contract.inputs.values()):
        made[each.name] = _input(each, kind_of(each), first=number == 0)
    for each in contract.inputs.values():
        made |= {s.name: _setting(s) for s in settings_of(each).values() if s.name not in made}
    for each in contract.options.values():
        if is_writable(each):
            is_off = bool(each.group) and contract.groups[each.group] is None  # unless one of its options is given
            panel = _words(contract.kinds[each.group]) if each.group else OPTIONS
            made[each.name] = _option(replace(each, default=None) if is_off else each, panel)
    for group in contract.optional:
        if contract.groups[group] is not None:
            off = typer.Option(f"--no-{group}", help=f"Disable {group}.", rich_help_panel=_words(contract.kinds[group]))
            made[f"no_{group}"] = _parameter(f"no_{group}", bool, off, False)
    result = contract.result
    if isinstance(result, Class) and result.is_a("PlanSeries"):
        budget = read_module("lamella.evaluate.budget").get("Budget")()
        goals = [each for each in fields_of("budget", budget) if is_writable(each) and each.name != "minutes"]
        made |= {each.name: _option(each, "Budget") for each in goals if each.name not in made}
    given = {name: name for name in made}
    own = []
    if getattr(result, "writes", True):
        own.append(_output(required=getattr(result, "needs_folder", False)))
        own.append(_flag("overwrite", "Replace the output if it exists."))
    own.append(_flag("dry_run", "Check everything, show what would run, and exit."))
    own.append(_flag("estimate", "Show what memory and time the run would need, and exit."))
    own.append(_flag("json", "Print the evidence as JSON instead of tables."))
    kinds = [kind_of(each) for each in contract.inputs.values()]
    if any(is_model(each) or getattr(each, "pickled", False) for each in kinds):
        own.append(_flag("allow_pickle", "Also open pickle checkpoints, which can execute code."))
    if any(map(is_stack, kinds)):
        which = typer.Option("--stack", help=STACK_HELP, rich_help_panel=INPUTS)
        own.append(_parameter("of_stack", str | None, which, None))
    if isinstance(result, Class) and result.is_a("Edit") and "test" not in made:
        own.append(_parameter("test", str, typer.Option("--test", help=TEST_HELP, rich_help_panel=OUTPUT), TEST))
    made |= {each.name: each for each in own}
    return list(made.values()), given


def _shows_schema(entry: Method, name: str) -> inspect.Parameter:
    """Return an option that prints the JSON schema of the command and exits."""

    def show(requested: bool) -> None:
        if requested:
            print_json(schema_of(entry, name))
            raise typer.Exit

    help = "Print the JSON schema of the command's inputs and options, and exit."
    info = typer.Option("--schema", help=help, is_eager=True, callback=show, rich_help_panel=OUTPUT)
    return _parameter("schema", bool, info, False)


def _reads_config(entry: Method) -> inspect.Parameter:
    """Return an option that reads missing values from a file, such as the ``run.yaml`` of a result."""

    def read(context: typer.Context, file: Path | None) -> None:
        if file is not None:
            context.default_map = {**(context.default_map or {}), **defaults_of(file, entry)}

    help = "Read missing values from a file, such as the run.yaml of an earlier run."
    info = typer.Option("--config", help=help, is_eager=True, callback=read, rich_help_panel=OUTPUT)
    return _parameter("config", Path | None, info, None)


def _input(each: Parameter, kind: Any, first: bool) -> inspect.Parameter:
    many = getattr(kind, "many", False) or each.is_mapping or each.is_repeated
    default: Any = each.source or getattr(kind, "default", EMPTY)
    if each.default is not EMPTY or getattr(kind, "nameless", False):
        default = None
    is_test = is_test_input(each)
    default = None if is_test else default
    metavar = getattr(kind, "metavar", None) or (each.spelling or each.name).upper()
    text = (
        TEST_HELP
        if is_test
        else f"{_sentence(each.help)} {_sentence(getattr(kind, 'source_help', ''), names=True)}".strip()
    )
    hint: Any = list[str] if many else str
    if default is None:
        hint, default = (hint, []) if many else (str | None, None)
    elif many and default is not EMPTY:
        default = [default]
    if first or each.is_argument:
        metavar = "MODEL" if each.name in MODEL else metavar
        argument = typer.Argument(metavar=metavar, help=_model_help(each, kind, text))
        return _parameter(each.name, hint, argument, default)
    option = typer.Option(each.option, metavar=metavar, help=text, rich_help_panel=INPUTS)
    return _parameter(each.name, hint, option, default)


def _setting(each: Parameter) -> inspect.Parameter:
    """Return a loader setting: without a default, since the defaults of inputs differ."""
    found = _option(each, INPUTS)
    _, info = get_args(found.annotation)
    info.show_default = False if each.default is None else str(each.default)
    hint = get_args(found.annotation)[0]
    return _parameter(each.name, hint | None, info, None)


def _model_help(each: Parameter, kind: Any, text: str) -> str:
    """Return the help of a model input; a type defined by a method has its own."""
    general = each.name in MODEL and not hasattr(kind, "source_help")
    return "A zoo name (smollm2), a checkpoint folder or a hub id." if general else text


def _sentence(text: str, names: bool = False) -> str:
    """Return the description of a parameter from a docstring as help: a sentence without markup.

    It begins with a capital letter, unless it begins with a literal.

    Args:
        text: the description.
        names: whether the text may begin with names that are not marked as literals: ``pydoc, stdlib ...``.
    """
    literal = text.startswith("``") or (names and re.match(r"\w+[,:]", text))
    text = escape(re.sub(r":\w+:`~?([^`]+)`", r"\1", text).replace("``", ""))
    return (text if literal else f"{text[:1].upper()}{text[1:]}") + (
        "" if text.endswith((".", "?")) or not text else "."
    )


def _option(each: Parameter, panel: str) -> inspect.Parameter:
    """Return a flag, a number, or a string that is parsed by the type of the option."""
    hint: Any = next((kind for kind in (bool, int, float) if each.kinds == (kind,)), str)
    help = SEED_HELP if each.name == "seed" and not each.help else _sentence(each.help)
    help = f"{help} Values {each.bounds}." if each.bounds else help
    names = [each.option] if hint is not bool or not each.default else [f"{each.option}/--no-{each.option[2:]}"]
    default = ",".join(map(str, each.default)) if isinstance(each.default, tuple) else each.default
    info = typer.Option(*names, help=help, rich_help_panel=panel)
    return _parameter(each.name, hint | None if default is None else hint, info, default)


def _output(required: bool) -> inspect.Parameter:
    option = typer.Option(
        "-o",
        "--output",
        help="Output folder: evidence.json, report.html and the files of the result.",
        rich_help_panel=OUTPUT,
    )
    return _parameter("output", Path if required else Path | None, option, EMPTY if required else None)


def _words(kind: Any) -> str:
    """Return a class name as words: the title of the panel of its options."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", kind.__name__).capitalize()


def _flag(name: str, help: str) -> inspect.Parameter:
    return _parameter(name, bool, typer.Option(f"--{name.replace('_', '-')}", help=help, rich_help_panel=OUTPUT), False)


def _parameter(name: str, hint: Any, info: Any, default: Any) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=default, annotation=Annotated[hint, info])


def _help(entry: Method) -> str:
    """Return the docstring up to its sections, which become the help of the options."""
    text = entry.doc.split("\nArgs:")[0].split("\nReturns:")[0].strip()
    return unwrapped(escape(re.sub(r":\w+:`~?([^`]+)`", r"\1", text).replace("``", "")))


def unwrapped(text: str) -> str:
    """Join the lines of each paragraph of a docstring for wrapping by the terminal; commands stay separate lines.

    Args:
        text: the docstring.
    """
    paragraphs = [re.sub(r"\n(?!lamella )", " ", each) for each in re.split(r"\n\s*\n", inspect.cleandoc(text))]
    return "\n\n".join(re.sub(r"Example:\s+lamella ", "Example:\nlamella ", each) for each in paragraphs)


def _value(slug: str, option: Parameter, value: Any) -> Any:
    return parsed(slug, option, value, f"{option.option} {value}") if isinstance(value, str) else value


def _arguments(
    contract: Signature, slug: str, given: dict[str, Any], options: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Return the arguments of a command line as the command takes them."""
    arguments: dict[str, Any] = {}
    for name, value in given.items():
        if value is None or value == []:
            continue
        if name in contract.options:
            option = contract.options[name]
            arguments[name] = _value(slug, option, value)
            if _plans(option) and options:
                from lamella.planners import Race

                arguments[name] = Race.of(arguments[name], options)
        elif name in contract.inputs and contract.inputs[name].is_mapping:
            arguments[name] = _by_name(contract.inputs[name].option, value)
        else:
            arguments[name] = value
    for group in contract.optional:
        fields = [each.name for each in contract.options.values() if each.group == group]
        if arguments.pop(f"no_{group}", False):
            foreign = next(
                (each for each in fields if each in arguments and arguments[each] != contract.options[each].default),
                None,
            )
            if foreign is not None:
                raise MethodError(
                    f"--no-{group} and {contract.options[foreign].option} exclude each other: give one of them"
                )
            arguments = {name: value for name, value in arguments.items() if name not in fields} | {group: None}
        elif contract.groups[group] is None and all(arguments.get(each, EMPTY) in (EMPTY, None) for each in fields):
            arguments = {name: value for name, value in arguments.items() if name not in fields}
    return arguments


def _run(entry: Method, given: dict[str, Any], values: dict[str, Any], options: dict[str, dict[str, Any]]) -> None:
    from lamella.runner import checked, needs_of, run

    output: Path | None = values.get("output")
    arguments = _arguments(entry.declared, entry.slug, given, options)
    arguments = {"test": None if values.get("test") in (TEST, []) else values.get("test")} | arguments
    how: dict[str, Any] = {"out": output, "overwrite": values.get("overwrite", False)}
    how |= {"allow_pickle": values.get("allow_pickle", False), "of_stack": values.get("of_stack")}
    if values["dry_run"]:
        table(*checked(entry.slug, command=entry.name, **how, **arguments))
        return
    if values["estimate"]:
        with working():
            needs = needs_of(entry.slug, command=entry.name, **how, **arguments)
        print_json(asdict(needs)) if values["json"] else print_summary(needs.summary(), ())
        raise typer.Exit(int(not needs.fits))
    with working():
        done = run(entry.slug, command=entry.name, **how, **arguments)
    if values["json"]:
        print_json(done.evidence.model_dump(mode="json", by_alias=True))
    else:
        print_summary(done.summary, done.evidence.notes)
        if output is not None:
            out.print(f"written: {output}\nreport: {output / 'report.html'}", soft_wrap=True)
    if done.result.code:
        raise typer.Exit(done.result.code)


def _by_name(option: str, pairs: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        if not name or not value:
            raise MethodError(f"{option} {pair}: write NAME=FILE, and repeat the option for several")
        if name in found:
            raise MethodError(f"{option} {pair}: '{name}' is given twice: use different names")
        found[name] = value
    return found
