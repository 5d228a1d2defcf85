"""The one runner for every method: open what it needs, call it, evaluate, write, draw."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lamella.data import ImageText, Processing, Reader, open_processing
from lamella.errors import CheckpointError, ExportError, LamellaError, MethodError, NoteWarning
from lamella.evaluate import FidelityTest
from lamella.files import Work, check_free, discard
from lamella.jobs.checks import check_inputs, check_source
from lamella.jobs.held_out import SEED, judging_windows
from lamella.plan import ModelReference, Plan, PlanSeries
from lamella.processes import is_first
from lamella.provenance import environment
from lamella.registry import Method, check_given_once, check_takes, get_method, room
from lamella.results import Edit, Evidence, Result, Summary, Trained
from lamella.results.page import card, render
from lamella.runtime import apply
from lamella.signature import EMPTY, Parameter, is_model, kind_of, kinds_of, settings_of, signature
from lamella.stack import Model, Stack
from lamella.zoo import open_for, open_model, open_tokenizer

READ: dict[Any, Callable[[Path], Any]] = {Plan: Plan.read, PlanSeries: PlanSeries.read}
TEST = "stdlib"  # the text that judges: of another kind than what is calibrated on


@dataclass(frozen=True)
class Outcome:
    """What a run has brought.

    Attributes:
        result: what the method returned.
        evidence: what was written, or would have been.
        summary: the same in words and tables.
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
    """Run a method, or a command of one, on anything that can be opened.

    Args:
        slug: the method.
        inputs: what it must be given, in its order; files, names and folders are opened. They can be given by name too.
        command: one of its further commands.
        out: the folder to write: what the result is made of, with ``evidence.json``, ``report.html`` and a card. Beside
            it, ``.OUT.work`` lets an interrupted run go on. None writes nothing.
        test: the text on which a changed model is judged; see :func:`lamella.load_text`. ``stdlib`` when left out. Of a
            method that is given images with text, such rows; the test split of the first ones when left out. Of a
            method that has an input of this name it is that.
        overwrite: replace ``out``.
        allow_pickle: also open pickle checkpoints, which can run code of their author.
        of_stack: which stack, of a model with several; when left out, the only one that the method works on.
        given: inputs by name, options of the method, and settings of its inputs such as ``sequences``.

    Returns:
        The result with its evidence, and what to say of it.

    Raises:
        LamellaError: one line for whatever cannot be used.
    """
    entry = get_method(slug, command)
    check_given_once(slug, entry.signature, inputs, given)
    given = dict(zip(entry.signature.inputs, inputs, strict=False)) | given
    if "test" in entry.signature.inputs:  # then it is the method's own
        given, test = given | {"test": test}, None
    _check(entry, given, inputs)
    out = None if out is None else Path(out)
    if out is not None:
        _check_out(out, given.values(), overwrite)
    check_inputs(entry.signature, given, allow_pickle)
    if test is not None:
        check_source(test)
    opening = Opening(entry, given, allow_pickle=allow_pickle, stack=of_stack)
    opened = [opening(each) for each in entry.signature.inputs.values()]
    judged, unjudged = _judged(entry, opening, opened, test)
    options = {name: value for name, value in given.items() if name in entry.options or name in entry.signature.groups}
    work = Work(None if out is None else out.parent / f".{out.name}.work")
    result, told = _called(entry, opened, entry.signature.completed(options, work))
    if not isinstance(result, Result):
        raise MethodError(f"{slug} returns a {type(result).__name__}, which is no result: call it in Python")
    evidence = _evidence(result, opening, opened, [*told, *unjudged], judged, test)
    summary = getattr(room(slug, "page"), "summary", result.summary)(evidence)
    if out is not None and is_first():
        documents = {
            "evidence.json": evidence.dump(),
            "report.html": _page(slug, evidence, summary),
            "README.md": card(evidence, summary, entry.title) + "\n" + result.loading,
        }
        result.save(out, documents | result.files, overwrite=overwrite, tokenizer=opening.known_reader)
        discard(work.folder, out)  # type: ignore[arg-type]
    return Outcome(result, evidence, summary)


class Opening:
    """Opens the inputs of one command.

    Attributes:
        model: the model, once it is open; one stack of it where the command takes that.
    """

    def __init__(self, entry: Method, given: Mapping[str, Any], **how: Any) -> None:
        self.entry, self.given, self.how = entry, given, how
        default = entry.options["seed"].default if "seed" in entry.options else 0
        self.seed: int = given.get("seed", default)
        self.model: Model | None = None
        self.known_tokenizer: Any = None
        self.known_processing: Processing | None = None
        self._name: Any = None

    def __call__(self, parameter: Parameter) -> Any:
        """The input of that name.

        Raises:
            MethodError: when it is missing.
        """
        wanted = parameter.default is EMPTY
        value = self.given.get(parameter.name)
        kind = self._kind(parameter, value)
        if value is None and wanted:
            value = getattr(kind, "default", None)
        if value is None and not (wanted and getattr(kind, "nameless", False)):
            if not wanted:
                return parameter.default
            raise MethodError(f"{self.entry.slug} needs {parameter.name}: {parameter.help or 'give one'}")
        known = signature(kind.open).options if hasattr(kind, "open") and not is_model(kind) else {}
        settings = {name: self.given[name] for name in known if name in self.given}
        if parameter.named and value is not None:
            return {name: self._opened(kind, each, parameter, settings) for name, each in value.items()}
        return self._opened(kind, value, parameter, settings)

    def _kind(self, parameter: Parameter, value: Any) -> Any:
        """The type that an input is opened as: of several, one that fits the model and what was given."""
        fitting = (each for each in kinds_of(parameter) if hasattr(each, "fits") and each.fits(self.model, value))
        return next(fitting, kind_of(parameter))

    def _opened(self, kind: Any, value: Any, parameter: Parameter, settings: dict[str, Any]) -> Any:
        if is_model(kind):
            return self._model(kind, value)
        if kind is None or not (value is None or isinstance(value, str | Path | list)):
            return value  # open already
        if kind in READ or issubclass(kind, Result):
            return (READ.get(kind) or kind.read)(Path(value))  # type: ignore[arg-type]
        if "reader" in signature(kind.open).inputs:
            opener = None if self.model is None else self.tokenizer
            reads = None if self.model is None else self.processing
            split: Any = parameter.split
            settings = settings | {"reader": Reader(opener, self.seed, split, reads)}
        return kind.open(value, **settings)

    def _model(self, kind: Any, value: Any) -> Model:
        how = dict(self.how)
        stack = how.pop("stack", None)
        model = open_model(value, **how) if kind is Model else open_for(self.entry, value, stack=stack, **how)
        if self.model is None:
            if isinstance(model, Stack):
                check_takes(self.entry.slug, self.entry.on, model)
            self.model, self._name = model, value
        return model

    def tokenizer(self) -> Any:
        """That of the model.

        Raises:
            CheckpointError: when it has none, or none that works.
        """
        if self.known_tokenizer is None:
            assert self.model is not None
            place = self.model.path or self._name
            if not isinstance(place, str | Path):
                raise CheckpointError(f"{self.model.name} is a model in memory, whose tokenizer is not known")
            tokenizer = open_tokenizer(place)
            if not tokenizer("Is there a vocabulary?")["input_ids"]:  # transformers makes an empty one of no files
                raise CheckpointError(f"{self.model.name} has no tokenizer: put its files beside the weights")
            self.known_tokenizer = tokenizer
        return self.known_tokenizer

    @property
    def known_reader(self) -> Any:
        """What was opened of what the model reads with: its processor, which holds the tokenizer, or that alone."""
        return self.known_tokenizer if self.known_processing is None else self.known_processing.processor

    def processing(self) -> Processing:
        """What the model reads images and text with."""
        if self.known_processing is None:
            assert self.model is not None
            self.known_processing = open_processing(self.model, self._name)
        return self.known_processing


def _check(entry: Method, given: Mapping[str, Any], inputs: tuple[Any, ...]) -> None:
    """Check the names of what is given, and the values of options and of settings of inputs."""
    if len(inputs) > len(entry.signature.inputs):
        raise MethodError(f"{entry.slug} takes {len(entry.signature.inputs)} inputs, not {len(inputs)}")
    known = {*entry.signature.inputs, *entry.options, *entry.signature.groups}
    known |= {name for each in entry.signature.inputs.values() for name in settings_of(each)}
    unknown = sorted(set(given) - known)
    if unknown:
        raise MethodError(f"{entry.slug} has no option '{unknown[0]}'; it has: {', '.join(sorted(known))}")
    entry.signature.gathered(entry.slug, {name: value for name, value in given.items() if name in entry.options})
    for parameter in entry.signature.inputs.values():
        for name, setting in settings_of(parameter).items():
            if name in given and name not in entry.options:
                setting.check(entry.slug, given[name])


def _check_out(out: Path, inputs: Any, overwrite: bool) -> None:
    for each in inputs:
        if isinstance(each, str | Path) and Path(each).exists() and Path(each).resolve() == out.resolve():
            raise ExportError(f"{out} is what is read, which is never written to: choose another folder")
    check_free(out, overwrite)


def _called(entry: Method, inputs: list[Any], options: dict[str, Any]) -> tuple[Any, list[str]]:
    """What the method returns, and what it warned of, which is passed on."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        value = entry(*inputs, **options)
    told = []
    for each in caught:
        is_note = each.category is UserWarning
        told += [str(each.message)] if is_note else []
        category = NoteWarning if is_note else each.category
        warnings.warn_explicit(str(each.message), category, each.filename, each.lineno)
    return value, told


def _judged(entry: Method, opening: Opening, opened: list[Any], test: str | None) -> tuple[Stack | None, list[str]]:
    """The decoder that is compared with the original once it is changed, if any, and a note where it cannot be.

    A method that reads no text needs no tokenizer, and unless a test is asked for, the model needs none either.

    Raises:
        MethodError: for a test where no decoder changes.
        LamellaError: for a test that cannot be read, since the tokenizer is missing.
    """
    model, images = opening.model, any(isinstance(each, ImageText) for each in opened)
    stack = model if isinstance(model, Stack) else None
    if model is not None and images:
        *_, stack = model.stacks.values()  # which answers
    if stack is None or not stack.architecture.causal or not _changes(entry):
        if test is not None:
            raise MethodError(
                f"{entry.slug} changes no decoder, so there is nothing to judge on a text: leave test out"
            )
        return None, []
    try:
        if not images:
            opening.tokenizer()
    except LamellaError as error:
        if test is not None:
            raise
        return None, [f"It was not compared with the original on a text: {error}."]
    return stack, []


def _changes(entry: Method) -> bool:
    """Whether a command returns a changed model."""
    return isinstance(entry.signature.result, type) and issubclass(entry.signature.result, Edit)


def _evidence(
    result: Result, opening: Opening, opened: list[Any], warned: list[str], stack: Stack | None, test: str | None
) -> Evidence:
    """The record of a run; a changed model is evaluated against the original, on text that nothing was chosen on.

    Args:
        stack: what is evaluated; see :func:`_judged`.
    """
    model, body, data = opening.model, result.body(), {}
    if isinstance(result, Edit) and stack is not None:
        judge, data["test"] = _judge(opening, stack, opened, test)
        fidelity = FidelityTest(stack, judge)
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


def _judge(opening: Opening, stack: Stack, opened: list[Any], test: str | None) -> tuple[Tensor | ImageText, Any]:
    """What a changed model is judged on, with what evidence says of it: of the kind that the method was given."""
    shown = next((each for each in opened if isinstance(each, ImageText)), None)
    if shown is not None:
        reader = Reader(opening.tokenizer, SEED, "test", opening.processing)
        rows = shown.part("test", SEED) if test is None else ImageText.open(test, reader)
        return rows, rows.describe()
    return judging_windows(opening.tokenizer(), test or TEST, stack)


def _page(slug: str, evidence: Evidence, summary: Summary) -> str:
    """The method's own page, or the house's around the figures that the method draws."""
    own = room(slug, "page")
    if hasattr(own, "page"):
        page: str = own.page(evidence)
        return page
    return render(evidence, summary, own.figures(evidence) if hasattr(own, "figures") else ())
