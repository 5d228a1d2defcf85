"""The runner of all commands: open the inputs, call the command, evaluate, write, and render."""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lamella import processes
from lamella.data import ImageText, Text
from lamella.errors import ExportError, LamellaError, MethodError, NoteWarning
from lamella.evaluate import Budget, FidelityTest
from lamella.files import Work, check_free, discard
from lamella.inputs import Opening, check_inputs, check_source
from lamella.needs import Needs, TimeLimit, current_recorder, free_memory, gigabytes, recording
from lamella.plan import ModelReference, Plan, PlanSeries
from lamella.planners import GOALS as NAMES
from lamella.planners import PLANS, Planner, Race, goal_of, pick, planned_on
from lamella.progress import notify
from lamella.provenance import environment
from lamella.registry import PERMISSIONS, Method, check_passed_once, get_method, submodule
from lamella.results import Edit, Evidence, Result, Summary, Trained
from lamella.results.page import card, render
from lamella.runtime import apply
from lamella.signature import fields_of, is_model, kind_of, settings_of
from lamella.stack import Stack
from lamella.zoo import size_in_memory

LARGE = 0.25  # fraction of the free memory from which on the weights of a model are large
SAVING = (
    "gradient_checkpointing",
    "batch",
    "sequences",
    "length",
    "rows",
)  # options with which a run needs less memory
GOALS = {each.name: each for each in fields_of("budget", Budget()) if each.name in NAMES}  # also on the command line


@dataclass(frozen=True)
class Outcome:
    """The outcome of a run.

    Attributes:
        result: what the command returned.
        evidence: the record that was written, or would have been.
        summary: the findings in words and tables.
    """

    result: Result
    evidence: Evidence
    summary: Summary


def run(
    slug: str,
    *inputs: Any,
    command: str = "",
    out: str | Path | None = None,
    test: str | None = None,
    overwrite: bool = False,
    allow_pickle: bool = False,
    of_stack: str | None = None,
    **given: Any,
) -> Outcome:
    """Run a method, or a further command of one, on inputs that are opened by name.

    Args:
        slug: the method.
        inputs: its inputs in their order; files, names and folders are opened. They can also be given by name.
        command: name of one of its further commands.
        out: the folder to write: the files of the result, ``evidence.json``, ``report.html`` and a card. An interrupted
            run resumes from ``.OUT.work`` next to it. None writes nothing.
        test: the text on which a changed model is evaluated; see :func:`lamella.load_text`. Defaults to ``stdlib``. For
            a method that is given images with text, rows of these; by default the test split of the first ones. For a
            method with an input of this name, that input.
        overwrite: replace ``out``.
        allow_pickle: also open pickle checkpoints, which can execute code of their author.
        of_stack: name of the stack, for a model with several; defaults to the only one that the method works on.
        given: inputs by name, options of the method, and loader settings of its inputs such as ``sequences``.

    Returns:
        The result with its evidence and summary.

    Raises:
        LamellaError: one line for anything that cannot be used.
    """
    out = None if out is None else Path(out)
    request = given | {"test": test, "of_stack": of_stack}
    entry, given, budget, test = _checked(slug, command, inputs, given, out, test, overwrite, allow_pickle)
    request |= dict(zip(entry.signature.inputs, inputs, strict=False))
    how = {"out": out, "test": test, "overwrite": overwrite, "allow_pickle": allow_pickle, "of_stack": of_stack}
    _check_memory(entry, given, how)
    opening = Opening(entry, given, allow_pickle=allow_pickle, stack=of_stack)
    opened = [opening(each) for each in entry.signature.inputs.values()]
    judged, notes = _evaluated(entry, opening, opened, test)
    work = Work(None if out is None else out.parent / f".{out.name}.work")
    result, warned = _call(entry, opened, entry.signature.fill(_options(entry, given), work))
    if not isinstance(result, Result):
        raise MethodError(f"{slug} returns a {type(result).__name__}, which is not a Result: call it in Python")
    if isinstance(result, PlanSeries) and isinstance(opening.model, Stack):
        result.chosen = pick(result, budget, opening.model)
    evidence = _evidence(result, opening, opened, [*warned, *notes], judged, test)
    summarise = getattr(submodule(slug, "page"), "summary", result.summary)
    if out is not None and processes.is_first():

        def documents() -> dict[str, str]:
            evidence.update(result)
            summary = summarise(evidence)
            return {
                "evidence.json": evidence.dump(),
                "report.html": _page(slug, evidence, summary),
                "README.md": _card(slug, evidence, summary, entry.title) + result.loading,
                **({} if (run_file := _run_file(entry, request)) is None else {"run.yaml": run_file}),
                **result.files,
            }

        result.save(out, documents, overwrite=overwrite, tokenizer=opening.known_processor)
        discard(work.folder, out)  # type: ignore[arg-type]
    return Outcome(result, evidence, summarise(evidence))


def checked(
    slug: str,
    *inputs: Any,
    command: str = "",
    out: str | Path | None = None,
    test: str | None = None,
    overwrite: bool = False,
    allow_pickle: bool = False,
    of_stack: str | None = None,
    **given: Any,
) -> tuple[str, list[str], list[list[str]]]:
    """Run all checks that are possible before anything is opened, and describe what the run would do; see :func:`run`.

    Args:
        slug: the method.
        inputs: its inputs in their order.
        command: name of one of its further commands.
        out: the folder to write.
        test: the text on which a changed model is evaluated.
        overwrite: replace ``out``.
        allow_pickle: also open pickle checkpoints.
        of_stack: name of the stack.
        given: inputs, options and loader settings by name.

    Returns:
        Title, headers and rows of a table: inputs, options that differ from their defaults, and the output.
    """
    out = None if out is None else Path(out)
    entry, named, _, test = _checked(slug, command, inputs, given, out, test, overwrite, allow_pickle)
    rows = [["input", name, str(named.get(name, "default"))] for name in entry.signature.inputs]
    rows += [["stack", "of_stack", of_stack]] if of_stack else []
    for name, value in {**given, **named}.items():
        option = entry.options.get(name)
        if name not in entry.signature.inputs and (option is None or option.default != value):
            rows.append(["option", name, str(value)])
    rows.append(["output", "out", "nothing is written" if out is None else str(out)])
    return f"lamella {slug} {command}".strip() + " would run", ["what", "name", "value"], rows


def needs_of(
    slug: str,
    *inputs: Any,
    command: str = "",
    out: str | Path | None = None,
    test: str | None = None,
    overwrite: bool = False,
    allow_pickle: bool = False,
    of_stack: str | None = None,
    **given: Any,
) -> Needs:
    """Return the memory and the time that a run would need; nothing is computed or written. See :func:`run`.

    Args:
        slug: the method.
        inputs: its inputs in their order.
        command: name of one of its further commands.
        out: the folder to write.
        test: the text on which a changed model is evaluated.
        overwrite: replace ``out``.
        allow_pickle: also open pickle checkpoints.
        of_stack: name of the stack.
        given: inputs, options and loader settings by name.
    """
    folder = None if out is None else Path(out)
    entry, given, _, test = _checked(slug, command, inputs, given, folder, test, overwrite, allow_pickle)
    with TemporaryDirectory() as work, recording() as needs:
        opening = Opening(entry, given, allow_pickle=allow_pickle, stack=of_stack)
        opened = [opening(each) for each in entry.signature.inputs.values()]
        judged, _ = _evaluated(entry, opening, opened, test)
        options = entry.signature.fill(_options(entry, given), Work(Path(work) / "work"))
        try:
            result, _ = _call(entry, opened, options)
            _evidence(result, opening, opened, [], judged, test)
        except TimeLimit:
            raise
        except Exception as error:
            recorder = current_recorder()
            if recorder is not None and recorder.multiplications:
                recorder.cut()  # a placeholder cannot be what the command expects here
            elif isinstance(error, LamellaError):
                raise
            else:
                raise MethodError(
                    f"{slug} {command}".strip() + " cannot run without values: it has no estimate"
                ) from error
    return needs


def _check_memory(entry: Method, given: Mapping[str, Any], how: Mapping[str, Any]) -> None:
    """Refuse a run on a large model that needs more memory than is free.

    Raises:
        MethodError: if it does; the message names options with which it needs less.
    """
    if processes.count() > 1:  # an estimate is that of one process, which holds everything
        return
    models = [given.get(each.name) for each in entry.signature.inputs.values() if is_model(kind_of(each))]
    names = [each for each in models if isinstance(each, str | Path)]
    if not any(size_in_memory(each) > LARGE * free_memory() for each in names):
        return
    try:
        needs = needs_of(entry.slug, command=entry.name, **how, **given)
    except Exception:  # the run itself reports what is wrong
        return
    if needs.fits:
        notify(f"{entry.slug}: {needs.summary().verdict}")
    if not needs.fits:
        known = {*entry.options, *(name for each in entry.signature.inputs.values() for name in settings_of(each))}
        less = [f"--{name.replace('_', '-')}" for name in SAVING if name in known]
        raise MethodError(
            f"{entry.slug} needs about {gigabytes(needs.peak)} GB of memory beside the libraries, and "
            f"{gigabytes(needs.free)} GB are free: use --dtype bfloat16"
            + (f", or try {', '.join(less)}" if less else "")
        )


def _options(entry: Method, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a command that are not inputs or their settings."""
    own = {*entry.options, *entry.signature.groups, entry.signature.work}
    return {name: value for name, value in given.items() if name in own}


def _checked(
    slug: str,
    command: str,
    inputs: tuple[Any, ...],
    given: dict[str, Any],
    out: Path | None,
    test: str | None,
    overwrite: bool,
    allow_pickle: bool,
) -> tuple[Method, dict[str, Any], Budget, str | None]:
    """Return the command, its arguments by name, the goal of its plans and its test, all checked before opening."""
    entry = get_method(slug, command)
    check_passed_once(slug, entry.signature, inputs, given)
    given = dict(zip(entry.signature.inputs, inputs, strict=False)) | given
    if "test" in entry.signature.inputs and test is not None:  # an input of the command itself
        given, test = given | {"test": test}, None
    budget, given = _goals(entry, given)
    _check(entry, given, inputs)
    if out is not None:
        _check_out(out, given.values(), overwrite)
    check_inputs(entry.signature, given, allow_pickle)
    if test is not None:
        check_source(test)
    return entry, given, budget, test


def _run_file(entry: Method, request: Mapping[str, Any]) -> str | None:
    """Return the content of ``run.yaml``, which repeats the run; None if an argument is an object without a name."""
    import yaml

    planners: dict[str, Any] = {}
    named: dict[str, Any] = {}
    for name, value in request.items():
        if isinstance(value, Race):
            planners |= {each.slug: dict(each.options) for each in value.planners if each.options}
            named[name] = "all" if value.is_open else ",".join(each.slug for each in value.planners)
        elif value is None and name in entry.signature.optional:
            named[f"no_{name}"] = True
        elif value is not None and name not in PERMISSIONS:
            named[name] = _plain(value)
    if any(value is Ellipsis for value in named.values()):
        return None
    before = [] if entry.is_own else ["run"]
    document = {"command": " ".join([*before, entry.slug, *([entry.name] if entry.name else [])]), **named}
    text: str = yaml.safe_dump(document | ({"planners": planners} if planners else {}), sort_keys=False)
    return text


def _plain(value: Any) -> Any:
    """Return a value as YAML represents it; Ellipsis if it cannot."""
    if isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return [f"{name}={_plain(each)}" for name, each in value.items()]
    if isinstance(value, list | tuple):
        found = [_plain(each) for each in value]
        return Ellipsis if Ellipsis in found else found
    return Ellipsis


def call(slug: str, *inputs: Any, **given: Any) -> Any:
    """Run a command and return its result only; see :func:`run`.

    Args:
        slug: the method.
        inputs: its inputs in their order.
        given: inputs and options by name.
    """
    return run(slug, *inputs, **given).result


def compress(model: Any, **given: Any) -> Any:
    """Compress a model: the result of ``run("compress", model, ...)``, whose ``save`` writes it.

    >>> small = lamella.compress("smollm2", speedup=1.3, heal_minutes=8)       # doctest: +SKIP
    >>> small.save("small")                                                    # doctest: +SKIP

    Args:
        model: anything that :func:`lamella.open` takes.
        given: inputs and options of :func:`lamella.commands.compress.command.compress`.
    """
    return call("compress", model, **given)


def make_plan(slug: str, model: Any, calibration: Any = None, **options: Any) -> PlanSeries:
    """Run one planning method.

    Args:
        slug: a method that returns a series of plans; see :func:`lamella.registry.methods`.
        model: anything that :func:`lamella.open` takes. Of several stacks, the only one that the method works on.
        calibration: token ids [sequences, time], or images with text, for methods that need them.
        options: the method's own options.

    Raises:
        MethodError: for an unknown method or option, or a method that returns no plans.
    """
    entry = Planner(slug).method
    series: PlanSeries = call(slug, model, **planned_on(entry, calibration), **options)
    return series


def _goals(entry: Method, given: Mapping[str, Any]) -> tuple[Budget, dict[str, Any]]:
    """Return the budget that picks a plan of the resulting series, and the arguments of the command itself.

    If the command takes a budget, it also receives the goals, and stops there.
    """
    if entry.result != PLANS:
        return Budget(), dict(given)
    if isinstance(whole := given.get("budget"), Budget):
        return whole, dict(given)
    theirs = {name for name, option in entry.options.items() if option.group != "budget"}  # options of its own
    goals = {name: value for name, value in given.items() if name in GOALS.keys() - theirs and value is not None}
    for name, value in goals.items():
        GOALS[name].check(entry.slug, value)
    own = {name: value for name, value in given.items() if name not in GOALS or name in entry.options}
    budget = Budget(**goals)
    goal_of(budget)  # before any work
    return budget, own


def argument_names(entry: Method) -> set[str]:
    """Return the names of all arguments of a command, except those of the runner itself.

    Args:
        entry: the command.
    """
    contract = entry.signature
    own = {*contract.inputs, *entry.options, *contract.groups, *([contract.work] if contract.work else [])}
    return own | {name for each in contract.inputs.values() for name in settings_of(each)}


def _check(entry: Method, given: Mapping[str, Any], inputs: tuple[Any, ...]) -> None:
    """Check the names of all arguments, and the values of options and loader settings.

    Conditions on several of them are checked by ``check_options`` of the command's module, if it has one: it is called
    with the arguments that it has a parameter for.
    """
    if len(inputs) > len(entry.signature.inputs):
        raise MethodError(f"{entry.slug} takes {len(entry.signature.inputs)} inputs, not {len(inputs)}")
    known = argument_names(entry)
    unknown = sorted(set(given) - known)
    if unknown:
        raise MethodError(f"{entry.slug} has no option '{unknown[0]}'; it has: {', '.join(sorted(known))}")
    options = {name: value for name, value in given.items() if name in entry.options or name in entry.signature.groups}
    collected = entry.signature.collect(entry.slug, options)
    for parameter in entry.signature.inputs.values():
        for name, setting in settings_of(parameter).items():
            if name in given and name not in entry.options:
                setting.check(entry.slug, given[name])
    own = getattr(importlib.import_module(entry.module), "check_options", None)
    if own is not None:
        parameters = inspect.signature(own).parameters
        own(**{name: value for name, value in {**given, **collected}.items() if name in parameters})


def _check_out(out: Path, inputs: Any, overwrite: bool) -> None:
    for each in inputs:
        if isinstance(each, str | Path) and Path(each).exists() and Path(each).resolve() == out.resolve():
            raise ExportError(f"{out} is an input of the run and is never overwritten: choose another folder")
    check_free(out, overwrite)


def _call(entry: Method, inputs: list[Any], options: dict[str, Any]) -> tuple[Any, list[str]]:
    """Call the method, and return its result and the warnings that it gave, which are also passed on."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        value = entry(*inputs, **options)
    messages = []
    for each in caught:
        is_note = each.category is UserWarning
        messages += [str(each.message)] if is_note else []
        category = NoteWarning if is_note else each.category
        warnings.warn_explicit(str(each.message), category, each.filename, each.lineno)
    return value, messages


def _evaluated(entry: Method, opening: Opening, opened: list[Any], test: str | None) -> tuple[Stack | None, list[str]]:
    """Return the decoder that is evaluated against the original once it is changed, if any, and a note if it cannot be.

    A method that takes no text needs no tokenizer, and unless a test is given, the model needs none either.

    Raises:
        MethodError: for a test although no decoder changes.
        LamellaError: for a test that cannot be tokenized, since the tokenizer is missing.
    """
    model, images = opening.model, any(isinstance(each, ImageText) for each in opened)
    stack = model if isinstance(model, Stack) else None
    if model is not None and images:
        *_, stack = model.stacks.values()  # the decoder
    if stack is None or not stack.architecture.causal or not _changes(entry):
        if test is not None:
            raise MethodError(
                f"{entry.slug} changes no decoder, so there is nothing to evaluate on a text: leave test out"
            )
        return None, []
    try:
        if not images:
            opening.tokenizer()
    except LamellaError as error:
        if test is not None:
            raise
        return None, [f"The model was not compared with the original on a text: {error}."]
    return stack, []


def _changes(entry: Method) -> bool:
    """Return whether a command returns a changed model."""
    return isinstance(entry.signature.result, type) and issubclass(entry.signature.result, Edit)


def _evidence(
    result: Result, opening: Opening, opened: list[Any], warned: list[str], stack: Stack | None, test: str | None
) -> Evidence:
    """Return the record of a run; a changed model is evaluated against the original, on text used for nothing else.

    ``stack`` is evaluated; see :func:`_evaluated`.
    """
    model, body, data = opening.model, result.body(), dict(result.data)
    if isinstance(result, Edit) and stack is not None and stack.device.type == "meta":
        stack = result.reference  # the process that holds all weights in the end has opened the original with them
    if isinstance(result, Edit) and stack is not None:
        judge = opening.judge(test)
        data["test"] = judge.describe()
        original = result.reference or stack
        fidelity = FidelityTest(original, judge.tokens if isinstance(judge, Text) else judge)
        body["fidelity"] = fidelity.of(result.view).as_dict()
        if isinstance(result, Trained):
            given = next((each for each in opened if isinstance(each, Plan)), Plan(model=ModelReference.of(stack)))
            body["before"] = fidelity.of(apply(stack, given)).as_dict()
    return result.evidence(
        kind=result.kind,
        provenance=result.provenance,
        environment=environment(),
        model=None if model is None else model.describe(),
        data=data,
        findings=result.findings,
        notes=[*result.notes, *(each for each in warned if each not in result.notes)],
        **body,
    )


def _page(slug: str, evidence: Evidence, summary: Summary) -> str:
    """Render the method's own page, or the default page with the figures of the method."""
    own = submodule(slug, "page")
    if hasattr(own, "page"):
        page: str = own.page(evidence)
        return page
    return render(evidence, summary, own.figures(evidence) if hasattr(own, "figures") else ())


def _card(slug: str, evidence: Evidence, summary: Summary, title: str) -> str:
    """Render the command's own model card, or the default one."""
    own = submodule(slug, "page")
    return f"{own.card(evidence) if hasattr(own, 'card') else card(evidence, summary, title)}\n"
