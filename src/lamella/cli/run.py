"""The command line of every declared command, made from its signature and docstring.

Positional parameters become arguments and options by which inputs are opened, keyword-only ones options with their
defaults; what the runner fills in has options of its own. Nothing of a command is imported before it runs: help is read
from the source.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import replace
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
    is_said,
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
    "What changed models are measured on: stdlib when left out, pydoc, a file or a datasets name. The same windows in "
    "every command; where images were given, other rows of these."
)
MODEL = ("stack", "model")  # what a command calls the model that it works on


class Made(TyperGroup):
    """A group of declared commands, which are made when one of them is wanted; a listing imports nothing."""

    listing = False
    asked: tuple[str, ...] = ()  # the arguments of the command line, from the name of the command on

    @cached_property
    def methods(self) -> dict[str, Method]:
        """By the name of the command."""
        raise NotImplementedError

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *self.methods]

    def get_command(self, ctx: Any, name: str) -> Any:
        if name not in self.methods:
            found = super().get_command(ctx, name)
            if found is not None and found.help:
                found.help = unwrapped(found.help)
            return found
        entry = self.methods[name]
        return _named(entry, name) if self.listing else command_of(entry, name, raced(entry, self.asked))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        self.asked = tuple(args)
        return super().resolve_command(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self.listing = True
        super().format_help(ctx, formatter)


class Verbs(Made):
    """The commands of the program: those that stand in its source, and the verbs of methods."""

    @cached_property
    def methods(self) -> dict[str, Method]:
        found = [each for known in all_commands().values() for each in known.values() if each.verb]
        return {str(each.verb): each for each in sorted(found, key=lambda each: not each.is_own)}  # Lamella's own first


class Methods(Made):
    """One command for each method, and for each of its further commands behind its slug."""

    @cached_property
    def methods(self) -> dict[str, Method]:
        found = {f"{slug} {name}".strip(): each for slug, all_ in all_commands().items() for name, each in all_.items()}
        return {name: each for name, each in sorted(found.items()) if self.lists(each)}

    def lists(self, entry: Method) -> bool:
        """Whether a command belongs to the group."""
        return not entry.is_own

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        commands(args[0])  # a slug that is unknown is refused with the nearest ones
        self.asked = tuple(args)
        name = " ".join(args[:2]) if " ".join(args[:2]) in self.methods else args[0]
        return name, self.get_command(ctx, name), args[len(name.split()) :]


class Planners(Methods):
    """One command for each planning method: the same as in :class:`Methods`."""

    def lists(self, entry: Method) -> bool:
        return entry.result == "PlanSeries"


def raced(entry: Method, args: tuple[str, ...]) -> list[str]:
    """The planners whose options a command line may have: those that ``--method`` names, and those of its options."""
    if not any(_plans(each) for each in entry.declared.options.values()):
        return []
    words = list(args)
    named = [word.partition("=")[2] or following for word, following in pairwise([*words, ""])
             if word.partition("=")[0] == "--method"]  # fmt: skip
    slugs = [slug.strip() for each in named for slug in each.split(",") if slug.strip() not in ("", "auto", "all")]
    dotted = [word[2:].partition(".")[0] for word in words if word.startswith("--") and "." in word.partition("=")[0]]
    return list(dict.fromkeys([*slugs, *dotted]))


def _plans(option: Parameter) -> bool:
    """Whether the values of an option are planners."""
    return any(getattr(kind, "__name__", "") == "Planner" for kind in option.kinds)


def _named(entry: Method, name: str) -> Any:
    """A command with its name and its line of help alone."""
    app = typer.Typer(add_completion=False)
    app.command(name, help=entry.summary, short_help=entry.summary)(lambda: None)
    return typer.main.get_command(app)


def command_of(entry: Method, name: str, planners: Sequence[str] = ()) -> Any:
    """The command line of a command, made from its signature.

    Args:
        planners: methods whose options it has, too, as ``--SLUG.OPTION``.
    """
    parameters, given = _parameters(entry)
    parameters += [_shows_schema(entry, name), _reads_config(entry)]
    dotted: dict[str, tuple[str, Parameter]] = {}
    for slug in planners:
        for option in filter(is_said, get_method(slug).declared.options.values()):
            each = _option(replace(option, spelling=f"{slug}.{option.option[2:]}"), f"Options of {slug}")
            name_of = f"{slug}_{option.name}".replace("-", "_").replace(".", "_")
            parameters.append(each.replace(name=name_of, default=None))
            dotted[name_of] = slug, option

    def called(**values: Any) -> None:
        options: dict[str, dict[str, Any]] = {}
        for place, (slug, option) in dotted.items():
            if values[place] is not None:
                options.setdefault(slug, {})[option.name] = _value(slug, option, values[place])
        _run(entry, {place: values[each] for each, place in given.items()}, values, options)

    called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {each.name: each.annotation for each in parameters}
    app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
    app.command(name, help=_help(entry))(called)
    return typer.main.get_command(app)


def _parameters(entry: Method) -> tuple[list[inspect.Parameter], dict[str, str]]:
    """The parameters of a command line, and which of them go to the command by which name."""
    contract = entry.declared
    made: dict[str, inspect.Parameter] = {}
    for number, each in enumerate(contract.inputs.values()):
        made[each.name] = _input(each, kind_of(each), first=number == 0)
    for each in contract.inputs.values():
        made |= {s.name: _setting(s) for s in settings_of(each).values() if s.name not in made}
    for each in contract.options.values():
        if is_said(each):
            left_out = bool(each.group) and contract.groups[each.group] is None  # unless one of its options is given
            panel = _words(contract.kinds[each.group]) if each.group else OPTIONS
            made[each.name] = _option(replace(each, default=None) if left_out else each, panel)
    for group in contract.optional:
        if contract.groups[group] is not None:
            off = typer.Option(
                f"--no-{group}", help=f"Leave {group} out.", rich_help_panel=_words(contract.kinds[group])
            )
            made[f"no_{group}"] = _parameter(f"no_{group}", bool, off, False)
    result = contract.result
    if isinstance(result, Class) and result.is_a("PlanSeries"):
        budget = read_module("lamella.evaluate.budget").get("Budget")()
        goals = [each for each in fields_of("budget", budget) if is_said(each) and each.name != "minutes"]
        made |= {each.name: _option(each, "Budget") for each in goals if each.name not in made}
    given = {name: name for name in made}
    house = []
    if getattr(result, "writes", True):
        house.append(_output(required=getattr(result, "needs_folder", False)))
        house.append(_flag("overwrite", "Replace the output if it exists."))
    house.append(_flag("dry_run", "Check everything and say what would run, then stop."))
    house.append(_flag("json", "Print the evidence as one JSON document for machines instead of tables."))
    kinds = [kind_of(each) for each in contract.inputs.values()]
    if any(map(is_model, kinds)):
        house.append(_flag("allow_pickle", "Also open pickle checkpoints, which can run code."))
    if any(map(is_stack, kinds)):
        which = typer.Option("--stack", help=STACK_HELP, rich_help_panel=INPUTS)
        house.append(_parameter("of_stack", str | None, which, None))
    if isinstance(result, Class) and result.is_a("Edit") and "test" not in made:
        house.append(_parameter("test", str, typer.Option("--test", help=TEST_HELP, rich_help_panel=OUTPUT), TEST))
    made |= {each.name: each for each in house}
    return list(made.values()), given


def _shows_schema(entry: Method, name: str) -> inspect.Parameter:
    """An option that prints the JSON schema of the command and stops."""

    def shown(asked: bool) -> None:
        if asked:
            print_json(schema_of(entry, name))
            raise typer.Exit

    help = "Print the JSON schema of what the command takes, and stop."
    info = typer.Option("--schema", help=help, is_eager=True, callback=shown, rich_help_panel=OUTPUT)
    return _parameter("schema", bool, info, False)


def _reads_config(entry: Method) -> inspect.Parameter:
    """An option that takes what is not given from a file, such as the ``run.yaml`` beside a result."""

    def read(context: typer.Context, file: Path | None) -> None:
        if file is not None:
            context.default_map = {**(context.default_map or {}), **defaults_of(file, entry)}

    help = "Take what is not given from a file, such as the run.yaml of an earlier run."
    info = typer.Option("--config", help=help, is_eager=True, callback=read, rich_help_panel=OUTPUT)
    return _parameter("config", Path | None, info, None)


def _input(each: Parameter, kind: Any, first: bool) -> inspect.Parameter:
    many = getattr(kind, "many", False) or each.is_mapping or each.is_repeated
    default = None if each.default is not EMPTY or getattr(kind, "nameless", False) else getattr(kind, "default", EMPTY)
    is_test = is_test_input(each)
    default = None if is_test else default
    metavar = getattr(kind, "metavar", None) or (each.spelling or each.name).upper()
    text = TEST_HELP if is_test else f"{_said(each.help)} {_said(getattr(kind, 'source_help', ''), names=True)}".strip()
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
    """How an input is opened: left to the input unless it is given, since inputs differ in their defaults."""
    found = _option(each, INPUTS)
    _, info = get_args(found.annotation)
    info.show_default = False if each.default is None else str(each.default)
    hint = get_args(found.annotation)[0]
    return _parameter(each.name, hint | None, info, None)


def _model_help(each: Parameter, kind: Any, text: str) -> str:
    """What the house says of a model; a type of a method's own says it itself."""
    general = each.name in MODEL and not hasattr(kind, "source_help")
    return "A zoo name (smollm2), a checkpoint folder or a hub id." if general else text


def _said(text: str, names: bool = False) -> str:
    """What a docstring says of a parameter, as help: a sentence, in which nothing is markup.

    It begins with a capital, unless with a word that is typed as it stands there.

    Args:
        names: the text may begin with names that are not marked as such: ``pydoc, stdlib ...``.
    """
    typed = text.startswith("``") or (names and re.match(r"\w+[,:]", text))
    text = escape(re.sub(r":\w+:`~?([^`]+)`", r"\1", text).replace("``", ""))
    return (text if typed else f"{text[:1].upper()}{text[1:]}") + ("" if text.endswith((".", "?")) or not text else ".")


def _option(each: Parameter, panel: str) -> inspect.Parameter:
    """A flag, a number, or a word that the method's types give a value."""
    hint: Any = next((kind for kind in (bool, int, float) if each.kinds == (kind,)), str)
    help = SEED_HELP if each.name == "seed" and not each.help else _said(each.help)
    help = f"{help} Values {each.bounds}." if each.bounds else help
    names = [each.option] if hint is not bool or not each.default else [f"{each.option}/--no-{each.option[2:]}"]
    default = ",".join(map(str, each.default)) if isinstance(each.default, tuple) else each.default
    said = typer.Option(*names, help=help, rich_help_panel=panel)
    return _parameter(each.name, hint | None if default is None else hint, said, default)


def _output(required: bool) -> inspect.Parameter:
    option = typer.Option(
        "-o", "--output", help="Folder to write: evidence.json, report.html and what was made.", rich_help_panel=OUTPUT
    )
    return _parameter("output", Path if required else Path | None, option, EMPTY if required else None)


def _words(kind: Any) -> str:
    """A class as words: what its options are about."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", kind.__name__).capitalize()


def _flag(name: str, help: str) -> inspect.Parameter:
    return _parameter(name, bool, typer.Option(f"--{name.replace('_', '-')}", help=help, rich_help_panel=OUTPUT), False)


def _parameter(name: str, hint: Any, info: Any, default: Any) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=default, annotation=Annotated[hint, info])


def _help(entry: Method) -> str:
    """The docstring down to its sections, which become the help of the options."""
    text = entry.doc.split("\nArgs:")[0].split("\nReturns:")[0].strip()
    return unwrapped(escape(re.sub(r":\w+:`~?([^`]+)`", r"\1", text).replace("``", "")))


def unwrapped(text: str) -> str:
    """A docstring whose paragraphs are lines, broken where the terminal ends; commands stay lines of their own."""
    paragraphs = [re.sub(r"\n(?!lamella )", " ", each) for each in re.split(r"\n\s*\n", inspect.cleandoc(text))]
    return "\n\n".join(re.sub(r"Example:\s+lamella ", "Example:\nlamella ", each) for each in paragraphs)


def _value(slug: str, option: Parameter, value: Any) -> Any:
    return parsed(slug, option, value, f"{option.option} {value}") if isinstance(value, str) else value


def _asked(contract: Signature, slug: str, given: dict[str, Any], options: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What a command line asks for, as the command takes it."""
    asked: dict[str, Any] = {}
    for name, value in given.items():
        if value is None or value == []:
            continue
        if name in contract.options:
            option = contract.options[name]
            asked[name] = _value(slug, option, value)
            if _plans(option) and options:
                from lamella.planners import Race

                asked[name] = Race.of(asked[name], options)
        elif name in contract.inputs and contract.inputs[name].is_mapping:
            asked[name] = _by_name(contract.inputs[name].option, value)
        else:
            asked[name] = value
    for group in contract.optional:
        fields = [each.name for each in contract.options.values() if each.group == group]
        if asked.pop(f"no_{group}", False):
            foreign = next(
                (each for each in fields if each in asked and asked[each] != contract.options[each].default), None
            )
            if foreign is not None:
                raise MethodError(
                    f"--no-{group} leaves out what {contract.options[foreign].option} sets: give one of them"
                )
            asked = {name: value for name, value in asked.items() if name not in fields} | {group: None}
        elif contract.groups[group] is None and all(asked.get(each, EMPTY) in (EMPTY, None) for each in fields):
            asked = {name: value for name, value in asked.items() if name not in fields}
    return asked


def _run(entry: Method, given: dict[str, Any], values: dict[str, Any], options: dict[str, dict[str, Any]]) -> None:
    from lamella.runner import checked, run

    output: Path | None = values.get("output")
    asked = _asked(entry.declared, entry.slug, given, options)
    asked = {"test": None if values.get("test") in (TEST, []) else values.get("test")} | asked
    how: dict[str, Any] = {"out": output, "overwrite": values.get("overwrite", False)}
    how |= {"allow_pickle": values.get("allow_pickle", False), "of_stack": values.get("of_stack")}
    if values["dry_run"]:
        table(*checked(entry.slug, command=entry.name, **how, **asked))
        return
    with working():
        done = run(entry.slug, command=entry.name, **how, **asked)
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
            raise MethodError(f"{option} {pair}: write NAME=FILE, and repeat it for several")
        if name in found:
            raise MethodError(f"{option} {pair}: '{name}' is given twice: give each of them a name of its own")
        found[name] = value
    return found
