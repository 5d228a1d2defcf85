"""The inputs of a command: checked by name before anything is opened, then opened as their types require."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lamella import processes
from lamella.data import ImageText, InputContext, Processing, Prompts, Text, open_processing
from lamella.errors import CheckpointError, LamellaError, MethodError
from lamella.plan import Plan, PlanSeries
from lamella.registry import Method, check_takes
from lamella.result import Result
from lamella.signature import (
    EMPTY,
    Parameter,
    Signature,
    is_model,
    is_test_input,
    kind_of,
    kinds_of,
    settings_of,
    signature,
)
from lamella.stack import Model, Stack
from lamella.zoo import LazyCheckpoint, SavedModel, View, open_for, open_model, open_saved, open_tokenizer
from lamella.zoo.checks import check_model, check_pickle
from lamella.zoo.opening import names_plan

READ: dict[Any, Callable[[Path], Any]] = {Plan: Plan.read, PlanSeries: PlanSeries.read}
TEST = "stdlib"  # the text of the default test, of another kind than the default calibration text
SEQUENCES, LENGTH = 8, 256  # of its windows
ROWS = 64  # of images with text in the default test, and of a file of prompts
LONGEST = 2048  # maximum tokens of a prompt of the test with what follows it
SEED = 0  # of the test windows, which depend on the test only, so that results of different commands compare
FILES = (  # names with these suffixes are paths, and not names of the zoo or the hub
    *(".csv", ".gguf", ".gz", ".json", ".jsonl", ".md", ".npy", ".npz", ".parquet", ".ply", ".pth", ".safetensors"),
    *(".gif", ".jpeg", ".jpg", ".mp4", ".png", ".txt", ".webp"),
)


def check_inputs(contract: Signature, given: Mapping[str, Any], allow_pickle: bool = False) -> None:
    """Check all inputs of a command that are names; inputs that are open already are skipped.

    Args:
        contract: the signature of the command.
        given: its arguments by name.
        allow_pickle: whether pickle checkpoints are accepted.

    Raises:
        LamellaError: one line for the first input that cannot be used.
    """
    for parameter in contract.inputs.values():
        value = given.get(parameter.name)
        for each in value.values() if parameter.is_mapping and isinstance(value, Mapping) else [value]:
            check_input(kinds_of(parameter), each, parameter, allow_pickle)


def check_source(name: Any) -> None:
    """Check the name of a text, or of images with text."""
    check_input((Text, ImageText), name)


def check_changed(name: str | Path | None) -> None:
    """Check the name of something that is compared with a model or applied to it: a plan, a folder or a model.

    Args:
        name: the name; None is accepted.
    """
    if name is not None:
        check_input((Plan,) if names_plan(name) else (Stack,), name)


def check_input(
    kinds: Sequence[Any], value: Any, parameter: Parameter | None = None, allow_pickle: bool = False
) -> None:
    """Check that a name can be opened as one of some types; if none accepts it, the error of the first type is raised.

    Args:
        kinds: the types.
        value: the name, or an object that is open already.
        parameter: the parameter of the input, for messages.
        allow_pickle: whether pickle checkpoints are accepted.
    """
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
    is_many = getattr(kind, "many", False) or (parameter is not None and parameter.is_repeated)
    names = value if isinstance(value, list | tuple) and is_many else [value]
    for name in (each for each in names if isinstance(each, str | Path)):
        if is_model(kind):
            check_model(name, allow_pickle)
        elif kind in (Plan, PlanSeries):
            kind.read(name)
        elif hasattr(kind, "check"):
            kind.check(name)
        else:
            _check_path(name, parameter)
            if getattr(kind, "pickled", False):
                check_pickle(Path(name).expanduser(), allow_pickle)


def _check_path(name: str | Path, parameter: Parameter | None) -> None:
    """Check that something that can only be a file or a folder exists, and is no empty file."""
    path = Path(name).expanduser()
    what = f"{parameter.name}: " if parameter is not None else ""
    is_path = isinstance(name, Path) or path.is_absolute() or str(name).startswith(".") or path.suffix.lower() in FILES
    if is_path and not path.exists():
        raise MethodError(f"{what}there is no file {name}: give an existing file")
    if path.is_file() and path.stat().st_size == 0:
        raise MethodError(f"{what}{name} is empty")


class Opening:
    """Opens the inputs of one command.

    Args:
        entry: the command.
        given: its arguments by name.
        how: keyword arguments for opening models.

    Attributes:
        model: the model once it is open; a stack of it if the command takes one.
        opened: opened inputs, by name.
    """

    def __init__(self, entry: Method, given: Mapping[str, Any], **how: Any) -> None:
        self.entry, self.given, self.how = entry, given, how
        if given.get("shard"):
            self.how["device"] = "cpu"  # each process takes its shard from there
        if entry.unloaded and processes.count() > 1:
            self.how["weights"] = False
        default = entry.options["seed"].default if "seed" in entry.options else 0
        self.seed: int = given.get("seed", default)
        self.model: Model | None = None
        self.opened: dict[str, Any] = {}
        self.known_tokenizer: Any = None
        self.known_processing: Processing | None = None
        self._name: Any = None

    def __call__(self, parameter: Parameter) -> Any:
        """Return the input of a parameter.

        Raises:
            MethodError: if it is missing.
        """
        found = self.opened[parameter.name] = self._of(parameter)
        return found

    def _of(self, parameter: Parameter) -> Any:
        value, default = self.given.get(parameter.name), parameter.default
        if value is None and is_test_input(parameter):
            return self.judge(**self._settings(Text, parameter))
        required = default is EMPTY
        kind = self._kind(parameter, value)
        if value is None and required:
            value = parameter.source or getattr(kind, "default", None)
        if value is None and not (required and getattr(kind, "nameless", False)):
            if not required:
                return default
            raise MethodError(f"{self.entry.slug} needs {parameter.name}: {parameter.help or 'give one'}")
        settings = self._settings(kind, parameter)
        if parameter.is_mapping and value is not None:
            return {name: self._opened(kind, each, parameter, settings) for name, each in value.items()}
        if parameter.is_repeated:
            values = value if isinstance(value, list | tuple) else [value]
            return tuple(self._opened(self._kind(parameter, each), each, parameter, settings) for each in values)
        return self._opened(kind, value, parameter, settings)

    def _kind(self, parameter: Parameter, value: Any) -> Any:
        """Return the type that an input is opened as: of several, one that fits the model and the value."""
        fitting = (each for each in kinds_of(parameter) if hasattr(each, "fits") and each.fits(self.model, value))
        return next(fitting, kind_of(parameter))

    def _settings(self, kind: Any, parameter: Parameter) -> dict[str, Any]:
        """Return the loader settings of an input: those of its parameter, overridden by those of the call.

        Settings apply to the inputs that a command works on, and to its test only if no other input has such a setting:
        tests are the same in every command.
        """
        known = signature(kind.open).options if hasattr(kind, "open") and not is_model(kind) else {}
        others = [each for each in self.entry.signature.inputs.values() if each is not parameter]
        taken = {name for each in others for name in settings_of(each)} if is_test_input(parameter) else set()
        found = {name: value for name, value in parameter.settings.items() if name in known}
        return found | {name: self.given[name] for name in known if name in self.given and name not in taken}

    def _opened(self, kind: Any, value: Any, parameter: Parameter, settings: dict[str, Any]) -> Any:
        if is_model(kind):
            return self._model(kind, value)
        if kind is None or not (value is None or isinstance(value, str | Path | list)):
            is_model_of_view = kind is not None and issubclass(kind, View) and not isinstance(value, kind)
            return kind.open(value, **settings) if is_model_of_view else value  # otherwise it is open already
        if getattr(kind, "pickled", False):
            return kind.read(Path(value), allow_pickle=self.how.get("allow_pickle", False))  # type: ignore[arg-type]
        if kind in READ or issubclass(kind, Result):
            return (READ.get(kind) or kind.read)(Path(value))  # type: ignore[arg-type]
        if is_test_input(parameter):
            return self.judge(value, **settings)
        if "context" in signature(kind.open).inputs:
            settings = settings | {"context": self.context(parameter.split)}
        return kind.open(value, **settings)

    def _model(self, kind: Any, value: Any) -> Any:
        how = dict(self.how)
        stack = how.pop("stack", None)
        if kind is LazyCheckpoint:
            return value if isinstance(value, LazyCheckpoint) else LazyCheckpoint.open(value, **how)
        if kind is SavedModel:
            written = value if isinstance(value, SavedModel) else open_saved(value, **how)
            self.model, self._name = self.model or written.running, value
            return written
        model = open_model(value, **how) if kind is Model else open_for(self.entry, value, stack=stack, **how)
        if self.model is None:
            if isinstance(model, Stack):
                check_takes(self.entry.slug, self.entry.on, model)
            self.model, self._name = model, value
        return model

    def context(self, split: Any) -> InputContext:
        """Return the context in which inputs are loaded.

        Args:
            split: the split that is read.
        """
        opener = None if self.model is None else self.tokenizer
        processing = None if self.model is None else self.processing
        return InputContext(opener, self.seed, split, processing)

    def judge(self, value: Any = None, *, sequences: int = SEQUENCES, length: int = LENGTH, **more: Any) -> Any:
        """Open the test that changed models are evaluated on: windows of a text, prompts, or rows of images with text.

        They depend on their source and size only, so that results of different commands compare. If a command was given
        images with text, other rows of these are the test, unless images are named.

        Args:
            value: the name of the source; :data:`TEST` if None.
            sequences: number of windows of a text.
            length: tokens in each window, limited by the context length of the model.
            more: settings of prompts, or of rows of images with text.
        """
        context = replace(self.context("test"), seed=SEED)
        shown = next((each for each in self.opened.values() if isinstance(each, ImageText)), None)
        if ImageText.fits(self.model, value):
            return ImageText.open(value, context, **{"rows": ROWS} | more)
        if shown is not None:
            return shown.part("test", SEED, ROWS)
        assert self.model is not None
        *_, last = self.model.stacks.values()
        longest = int(getattr(last.config, "max_position_embeddings", None) or sys.maxsize)
        if Prompts.fits(self.model, value):
            settings = {"prompts": ROWS, "max_length": LONGEST} | more
            settings["max_length"] = min(settings["max_length"], longest)
            return Prompts.open(value, context, **settings)
        return Text.open(value or TEST, context, sequences=sequences, length=min(length, longest))

    def tokenizer(self) -> Any:
        """Return the tokenizer of the model.

        Raises:
            CheckpointError: if it has none, or none that works.
        """
        if self.known_tokenizer is None:
            assert self.model is not None
            source = self.model.path or self._name
            if not isinstance(source, str | Path):
                raise CheckpointError(f"{self.model.name} is a model in memory, whose tokenizer is unknown")
            tokenizer = open_tokenizer(source)
            if not tokenizer("Is there a vocabulary?")[
                "input_ids"
            ]:  # without files, transformers makes an empty tokenizer
                raise CheckpointError(f"{self.model.name} has no tokenizer: put its files beside the weights")
            self.known_tokenizer = tokenizer
        return self.known_tokenizer

    @property
    def known_processor(self) -> Any:
        """The processor or tokenizer of the model, as far as it was opened.

        For a model of images and text it is the processor, even if only text was loaded.
        """
        stacks = {} if self.model is None else self.model.stacks
        if self.known_tokenizer is not None and any(each.architecture.images for each in stacks.values()):
            return self.processing().processor
        return self.known_tokenizer if self.known_processing is None else self.known_processing.processor

    def processing(self) -> Processing:
        """Return the processor of the model, for images and text."""
        if self.known_processing is None:
            assert self.model is not None
            self.known_processing = open_processing(self.model, self._name)
        return self.known_processing
