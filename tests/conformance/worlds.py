"""What all suites share: the commands of the registry, nano models with a tokenizer, and one run of each command.

Everything that a command needs makes itself small: models are nano ones, data the ``example`` of their type, plans and
whatever else a command has written are those of the method's own. ``brief`` in the declaration says the rest. Nobody
changes what is made here, so many tests look at one run.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook

from lamella.commands.diff import Results
from lamella.data import Captioned, Lazy, Text, Writer, load_text
from lamella.evaluate import Memory
from lamella.files import Journal
from lamella.inputs import Opening
from lamella.plan import ModelReference, Plan, PlanSeries
from lamella.progress import Tracker
from lamella.registry import Method, all_commands
from lamella.results import Corpus, Edit, Result, Study, Trained
from lamella.runner import Outcome, run
from lamella.runtime import parallel
from lamella.signature import EMPTY, Fixture, Parameter, is_model, kind_of
from lamella.stack import Model, Stack
from lamella.zoo import ComparedModel, LazyCheckpoint, SavedModel, open_model, open_stack
from lamella.zoo.nano import NANO, NANO_DIFFUSION, nano
from lamella.zoo.vlm import shapes_vlm
from selection import REPRESENTATIVES

ROOT = Path(__file__).parent.parent.parent
TOKENIZER, VOCABULARY = ROOT / "tests" / "models" / "nano-llama", 512
POSITIONS = 64  # of the models: texts are judged, and written by them, in this length
DIFFERENT = ("llama", "gpt_neox", "gemma3_text")  # one after the other, side by side, and between two norms
CAUSAL = [name for name in NANO if name != "vit"]
DENOISING = list(NANO_DIFFUSION)
SEEING = {  # models that read images, for methods that work on nothing smaller, with their sizes
    "masked tokens": ("llava_dream", {"num_hidden_layers": 3}),  # of answers about images
    "images": ("llava", {"num_hidden_layers": 2}),
    "cross": ("patch_bart", {"encoder_layers": 2, "decoder_layers": 2}),  # encodes image and question
}
READING = {name: sizes for name, sizes in SEEING.values()}
KIND = {name: Stack(nano(name)) for name in (*NANO, *DENOISING)}
FAMILY = {name: stack.architecture.name for name, stack in KIND.items()}

IDS = torch.randint(3, 128, (3, 12), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, :5] = 0
MASK[1, :2] = 0


# The commands, and which suite checks what they return: that of its type; a type of a method's own is the last.

COMMANDS: dict[str, Method] = {
    f"{slug} {name}".strip(): entry
    for slug, known in all_commands().items()
    for name, entry in known.items()
    if entry.signature.result.writes  # others list things, or run scripts
}
SUITES = {"plans": PlanSeries, "training": Trained, "edits": Edit, "corpora": Corpus, "studies": Study, "own": Result}


def suite_of(command: str) -> str:
    """The name of the suite; empty where a command returns what is no result. Planners are methods: plans of vocab, a
    command, rename the tokens of the text and remove no sublayer."""
    kind = COMMANDS[command].signature.result
    if COMMANDS[command].is_own and issubclass(kind, PlanSeries):
        return "own"
    return next((name for name, base in SUITES.items() if issubclass(kind, base)), "")


def of_suite(name: str) -> list[str]:
    """The commands that a suite checks."""
    return [command for command in COMMANDS if suite_of(command) == name]


def by_default(*given: Any, wanted: bool = True) -> Any:
    """Parameters with a command and a model's name at their end: by default the model that the command is tried on,
    for methods that have changed and in CI also those of `DIFFERENT`, and all others in `make test-all` alone."""
    *before, name = given
    tried = name in {usual(each) for each in before if each in COMMANDS}
    others = pytest.mark.repeated if wanted and name in DIFFERENT else pytest.mark.exhaustive
    return pytest.param(*given, marks=() if wanted and tried else others)


def repeated(commands: Iterable[str]) -> list[Any]:
    """Parameters of a check that runs a command again: by default on one command for each type of result, with and
    without work that is resumed, and on methods that have changed."""
    chosen: dict[tuple[str, bool], str] = {}
    commands = list(commands)
    for each in sorted(commands, key=lambda each: COMMANDS[each].slug not in REPRESENTATIVES):
        chosen.setdefault((suite_of(each), bool(COMMANDS[each].signature.work)), each)
    return [pytest.param(each, marks=() if each in chosen.values() else pytest.mark.repeated) for each in commands]


def on_families(commands: list[str]) -> list[Any]:
    """Commands with the nano decoders that they work on; by default a further command on its usual one alone."""
    return [
        by_default(each, name, wanted=not COMMANDS[each].name or name == usual(each))
        for each in commands
        for name in CAUSAL
        if COMMANDS[each].takes(KIND[name]) and COMMANDS[COMMANDS[each].slug].takes(KIND[name])
    ]


def usual(command: str) -> str:
    """The model that a command is tried on: the first that it takes."""
    known = next((name for name in (*DIFFERENT, *CAUSAL) if COMMANDS[command].takes(KIND[name])), None)
    return known or next(name for on, (name, _) in SEEING.items() if on in COMMANDS[command].on)


# What they are given


@cache
def checkpoint(name: str, apart: float) -> Path:
    """The folder of a nano model whose weights are so far from those of its siblings, with a tokenizer."""
    folder = Path(tempfile.mkdtemp(prefix="world")) / name
    if name in READING:
        for part in shapes_vlm(name, **READING[name]):
            part.save_pretrained(folder)
        return folder
    positions = "n_positions" if name == "gpt2" else "max_position_embeddings"
    model = nano(name) if name == "vit" else nano(name, **{"vocab_size": VOCABULARY, positions: POSITIONS})
    generator = torch.Generator().manual_seed(4)  # with which each family has layers to restore from its sibling
    with torch.no_grad():
        for each in model.parameters():
            each += apart * each.std(correction=0) * torch.randn(each.shape, generator=generator)
    if hasattr(model.config, "attention_dropout"):
        model.config.attention_dropout = 0.1  # so that training draws numbers, which must come from its seed
    model.save_pretrained(folder)
    for file in TOKENIZER.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


@cache
def opened(name: str) -> Any:
    """A nano model; everyone gets the same one, since nobody may change it."""
    if name in READING:
        return open_model(checkpoint(name, 0.0))
    stack = open_stack(checkpoint(name, 0.0))
    if stack.architecture.causal:
        stack.model.generation_config.eos_token_id = None
    return stack


@cache
def sibling(name: str) -> Stack:
    """Another one, as if it had been trained on from the first."""
    return open_stack(checkpoint(name, 0.5))


@cache
def judge() -> Path:
    """A text to judge changed models on, in place of the standard library's, which takes long to read."""
    return written("judge.txt", load_text("pydoc", "test")[:60_000])


def put(example: Fixture) -> str:
    """What ``open`` takes of an example: a name, or the path of a file with its content."""
    return example.source if example.content is None else str(written(example.source, example.content))


@cache
def written(name: str, content: str) -> Path:
    """A file; the same one for the same content."""
    file = Path(tempfile.mkdtemp(prefix="world")) / name
    file.write_text(content)
    return file


MEASURING = "commands.compress.result"  # a name in parts, which does not select all commands with this module
TRAINED = {"steps": 3, "save_every": 2}  # of everything that trains


def given(command: str, name: str) -> dict[str, Any]:
    """All that a command needs to run on a nano model: inputs, their settings, and options."""
    entry = COMMANDS[command]
    found: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    for each in entry.signature.inputs.values():
        value = _given(command, each, name)
        if value is not None:
            found[each.name] = value
            settings |= getattr(getattr(kind_of(each), "example", None), "settings", {})
    return found | settings | (TRAINED if suite_of(command) == "training" else {}) | entry.brief


@cache
def writer() -> Path:
    """The folder of a nano model that answers: it has a chat template, and has learnt a language."""
    folder = Path(tempfile.mkdtemp(prefix="world")) / "writer"
    shutil.copytree(TOKENIZER, folder)
    (folder / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}\n{% endfor %}")
    return folder


def _given(command: str, parameter: Parameter, name: str) -> Any:
    """One input: a model, a plan, the example of its type, or what the method itself has written."""
    entry, kind = COMMANDS[command], kind_of(parameter)
    if kind is Writer:
        return writer()
    if kind is ComparedModel:
        return (ComparedModel(str(written("plan.json", _plan(entry, name).dump()))),)
    if kind is Results:
        return Results.open(made("random" if parameter.name == "first" else "shortgpt").out)
    if kind is LazyCheckpoint:
        return LazyCheckpoint(checkpoint(name, 0.0))
    if kind is SavedModel:
        return SavedModel(opened(name))
    if is_model(kind):
        first = next(iter(entry.signature.inputs)) == parameter.name
        return opened(name) if first else None if parameter.default is None else sibling(name)
    if entry.is_own and parameter.default is None:  # what may be left out is tried in the tests of the command
        return None
    if kind is Plan:
        return _plan(entry, name)
    if parameter.split == "test" and kind is Text:
        return str(judge())
    if hasattr(kind, "example"):
        return {parameter.name: put(kind.example)} if parameter.is_mapping else put(kind.example)
    if hasattr(kind, "default") or (parameter.default is not EMPTY and not entry.name):
        return None
    if not entry.name:
        raise AssertionError(f"{command} needs {parameter.name}, and {kind.__name__} has no `example = Fixture(...)`")
    return series(entry.slug, name) if kind is PlanSeries else made(entry.slug, name).out


def _plan(entry: Method, name: str) -> Plan:
    """Of the method itself where it makes plans or trains with one, else one that leaves a layer out."""
    if suite_of(entry.slug) == "plans":
        return series(entry.slug, name)[1]
    if suite_of(entry.slug) in ("training", "edits", "own") and entry.name:
        return made(entry.slug, name).outcome.result.plan
    return Plan(model=ModelReference.of(opened(name)), drop=["layers.2"])


# What they do


@dataclass(frozen=True)
class Made:
    """One run of a command.

    Attributes:
        inputs: what it was given, opened.
        options: with which.
        outcome: what came back.
        out: the folder of results; None for the plans of other models than the first.
        changed: which of the inputs it changed, by what differs.
        warned: what it warned of.
        beats, calls: see :class:`Beats`.
    """

    inputs: Mapping[str, Any]
    options: Mapping[str, Any]
    outcome: Outcome
    out: Path | None
    changed: list[str]
    warned: list[str]
    beats: int
    calls: int


def made(command: str, name: str = "") -> Made:
    """A run of a command on a nano model, the same for everyone who asks."""
    return _made(command, name or usual(command))


@cache
def _made(command: str, name: str) -> Made:
    is_written = name == usual(command) or suite_of(command) != "plans"
    return carried_out(command, name, Path(tempfile.mkdtemp(prefix="world")) / "out" if is_written else None)


def series(command: str, name: str = "") -> PlanSeries:
    """What a planner has made; read back where it was written."""
    done = made(command, name)
    return done.outcome.result if done.out is None else PlanSeries.read(done.out / "series.json")


def carried_out(
    command: str, name: str = "", out: Path | None = None, *, stop: int | None = None, **options: Any
) -> Made:
    """Run a command on a nano model as the command line does, with every input opened by the runner's own hand.

    Args:
        stop: interrupt it at this beat.
        options: beside those of its ``brief``.
    """
    entry = COMMANDS[command]
    all_given = given(command, name or usual(command)) | options
    opening = Opening(entry, all_given)
    inputs = {each.name: opening(each) for each in entry.signature.inputs.values()}
    known = {*entry.options, *entry.signature.groups}
    chosen = {each: value for each, value in all_given.items() if each in known}
    before = {each: state(value) for each, value in inputs.items()}
    torch.rand(1)  # what is drawn elsewhere must not matter
    with (
        warnings.catch_warnings(record=True) as caught,
        pytest.MonkeyPatch.context() as patched,
        torch.enable_grad(),
        beating(stop) as beats,
    ):
        warnings.simplefilter("always")
        patched.setattr("lamella.inputs.TEST", str(judge()))  # a small one
        patched.setattr(f"lamella.{MEASURING}.peak_memory", lambda folder: Memory(2, 1))  # not in a process of its own
        outcome = run(entry.slug, command=entry.name, out=out, **inputs, **chosen)
    changed = [f"{each}: {what}" for each, value in inputs.items() for what in difference(before[each], state(value))]
    warned = [str(each.message) for each in caught]
    return Made(inputs, chosen, outcome, out, changed, warned, beats.all, beats.calls)


@dataclass
class Beats:
    """What goes on in a run: calls of modules, lines of journals, units of progress. At ``stop``, it is interrupted."""

    stop: int | None
    all: int = 0
    calls: int = 0

    def __call__(self) -> None:
        self.all += 1
        if self.all == self.stop:
            raise KeyboardInterrupt

    def call(self, module: Any, args: Any) -> None:
        self.calls += 1
        self()

    def after(self, function: Callable[..., None]) -> Callable[..., None]:
        def called(*args: Any, **options: Any) -> None:
            function(*args, **options)
            self()

        return called


@contextmanager
def beating(stop: int | None) -> Iterator[Beats]:
    """Count the beats of what runs inside."""
    beats = Beats(stop)
    hook = register_module_forward_pre_hook(beats.call)
    try:
        with pytest.MonkeyPatch.context() as patched:
            for owner, function in ((Journal, "add"), (Tracker, "__call__")):
                patched.setattr(owner, function, beats.after(getattr(owner, function)))
            yield beats
    finally:
        hook.remove()


# What must stay as it was


def state(value: Any) -> dict[str, Any]:
    """The numbers in an input by their place, copied; of a model also its config, attributes and hooks."""
    if isinstance(value, Model):
        model = value.model
        found: dict[str, Any] = {each: tensor.detach().clone() for each, tensor in model.state_dict().items()}
        found |= {f"place of {each}": tensor.data_ptr() for each, tensor in model.state_dict().items()}
        found |= {f"attributes of {each}": sorted(module.__dict__) for each, module in model.named_modules()}
        hooks = [module for module in model.modules() if module._forward_hooks or module._forward_pre_hooks]
        grads = [each.grad is None and each.requires_grad for each in model.parameters()]
        modes = [module.training for module in model.modules()]
        return found | {
            "config": copy.deepcopy(model.config.to_dict()), "hooks": len(hooks), "gradients": grads, "modes": modes
        }  # fmt: skip
    return dict(_numbers(value, ""))


def _numbers(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Tensor):
        yield place, value.detach().clone()
    elif isinstance(value, np.ndarray):
        yield place, torch.from_numpy(value.copy())
    elif isinstance(value, Plan | PlanSeries):
        yield place, value.dump()
    elif isinstance(value, str | int | float):
        yield place, value
    elif isinstance(value, Mapping):
        for name, each in value.items():
            yield from _numbers(each, f"{place}.{name}")
    elif isinstance(value, Captioned):
        yield from _numbers([value.image, value.text, value.label], place)
    elif isinstance(value, list | tuple | Lazy):
        for number, each in enumerate(value):
            yield from _numbers(each, f"{place}.{number}")
    elif isinstance(value, torch.nn.Module):
        yield from _numbers(value.state_dict(), place)
    elif hasattr(type(value), "components"):  # a pipeline of diffusers
        yield from _numbers(value.components, place)
    elif is_dataclass(value):
        for each in fields(value):
            if each.name not in ("said", "metadata"):  # descriptions may be completed when the input is read
                yield from _numbers(getattr(value, each.name), f"{place}.{each.name}")
    elif isinstance(getattr(value, "__dict__", {}).get("items"), list | Lazy):
        yield from _numbers(value.items, place)


def difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """The places where two states differ."""
    return [
        place
        for place in {**before, **after}
        if place not in before or place not in after or not _same(before[place], after[place])
    ]


def _same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) else bool(one == other)


def weights(stack: Stack) -> dict[str, Tensor]:
    """The parameters of a model, by name."""
    return dict(stack.model.named_parameters())


def logits(model: Any) -> Tensor:
    """What a model or a view says at every token of a ragged batch, as if it had written the second half itself."""
    ids, told = IDS, {}
    if model.config.is_encoder_decoder:  # it has read the same, padded on the right, and knows fewer words
        ids = 9 + IDS % 50
        told = {"input_ids": ids.flip(1), "attention_mask": MASK.flip(1), "decoder_input_ids": ids}
        told["decoder_attention_mask"] = MASK
    given = told or {"input_ids": ids, "attention_mask": MASK}
    said: Tensor = parallel(model, given, torch.full((3,), 6)).logits[MASK.bool()]
    return said


TIMED = ("compression", "benchmark", "overview", "draft")  # results that hold speeds, or depend on them


def measured(evidence: Any) -> Any:
    """What evidence says but for where it was made, and how long that took; of speeds, nothing that depends on them."""
    timed = ("seconds",)
    if evidence.kind in TIMED:
        timed += ("speedup", "variation", "timings", "bytes", "reached", "pareto", "notes", "lookup")

    def timeless(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: timeless(each) for name, each in value.items() if not any(word in name for word in timed)}
        return [timeless(each) for each in value] if isinstance(value, list | tuple) else value

    told = evidence.model_dump(mode="json", by_alias=True)
    return timeless({name: each for name, each in told.items() if name not in ("provenance", "environment")})
