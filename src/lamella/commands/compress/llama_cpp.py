"""llama.cpp as the program that runs the result: routes as GGUF files, timed in a process of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Final

import torch

from lamella.commands.compress.forms import SECONDS, STEPS, FileForm, Form, Program, Variant, without
from lamella.errors import ExportError, LamellaError
from lamella.evaluate import StepTimes, Timing
from lamella.evaluate.speed import alternate, random_tokens
from lamella.plan import ModelReference, Plan
from lamella.plan.export import export
from lamella.plan.quantize import is_available, write_gguf
from lamella.stack import Stack
from lamella.zoo import open_config

REFERENCE: Final = "bf16"  # the file of the original: with 16 bits, as unquantised models are run in llama.cpp
KINDS = ("q8_0", "q4_k_m")
PROMPT = 32  # tokens before the first decoding step; few, since reading them takes most of a round
CHILD = "lamella.commands.compress.llama_cpp_child"


class LlamaCpp:
    """Runs routes in llama.cpp: every one is written as a GGUF file in a temporary folder.

    Args:
        tokenizer: the tokenizer of the models.
    """

    name: ClassVar[Program] = "llama.cpp"
    batches: ClassVar[tuple[int, ...]] = (1,)

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._folder = tempfile.TemporaryDirectory(prefix="lamella-gguf-")
        self._files: dict[tuple[int, str, str], tuple[Path, Stack]] = {}  # with the model, so that its id is not reused
        self._checkpoint: tuple[int, str] | None = None  # of which model and plan the exported checkpoint is

    def describe(self) -> dict[str, Any]:
        """Return the program as JSON values: its version, threads, and the file that speed-ups are relative to."""
        used = f"xllamacpp {version('xllamacpp')}"
        return {"name": self.name, "version": used, "threads": torch.get_num_threads(), "reference": REFERENCE}

    def forms(self, stack: Stack, quantised: bool, cut: bool) -> list[FileForm]:
        """Measure a model in every form in which llama.cpp runs it.

        Step times come from a second model with half of the layers: what a layer takes is the difference, and what is
        outside the layers the rest.

        Args:
            stack: the model.
            quantised: whether to measure quantised forms.
            cut: whether to measure step times.

        Raises:
            ExportError: for a model, or a cut of it, that llama.cpp does not compute.
        """
        forms = self.shown(stack) if quantised else self.shown(stack)[:1]
        kept = max(len(stack) // 2, 1)
        half = without(stack, [each for each in stack.positions if each.layer >= kept])
        variants: dict[str, Variant] = {each.kind: (each, stack, None) for each in forms}
        if cut:
            variants |= {f"{each.kind}, half": (each, stack, half) for each in forms}
        timings = {name: timing for name, (timing,) in self.bench(variants).items()}

        def measured(form: FileForm) -> FileForm:
            whole = timings[form.kind].decode_speedup
            times = form.times
            if cut:
                short = timings[f"{form.kind}, half"].decode_speedup
                times = _step_times(form, 1 / whole.median, 1 / short.median, len(stack) - kept)
            return replace(form, times=times, speedup=whole)

        return [measured(form) for form in forms]

    def shown(self, stack: Stack, further: str | None = None) -> list[FileForm]:
        """Return the forms that a report compares, without measurements.

        Args:
            stack: the model.
            further: a further form, which is not requested from llama.cpp.
        """
        unknown = StepTimes(0.0, 0.0, 1.0)
        quantised = [FileForm(kind, stack, unknown, kind=kind) for kind in KINDS if is_available(kind)]
        return [FileForm("", stack, unknown, kind=REFERENCE), *quantised]

    def bench(
        self,
        variants: Mapping[str, Variant],
        batches: Sequence[int] = (1,),
        rounds: int = 5,
        seconds: float = SECONDS,
    ) -> dict[str, list[Timing]]:
        """Time variants relative to the first, in turns; opening the files is not timed.

        Args:
            variants: variants by name, the reference first.
            batches: batch sizes; decoding is timed at batch 1 only.
            rounds: maximum number of rounds.
            seconds: time limit.
        """
        files = {name: self._file(*each) for name, each in variants.items()}
        _, stack, _ = next(iter(variants.values()))
        prompt = random_tokens([stack.model], 1, PROMPT)[0].tolist()
        with opened(files, PROMPT + STEPS) as ask:
            found = alternate(partial(ask, {"prompt": prompt, "tokens": STEPS}), rounds=rounds, seconds=seconds)
        return {name: [timing] for name, timing in found.items()}

    def _file(self, form: Form, stack: Stack, plan: Plan | None) -> Path:
        """Return the GGUF file of a variant, which is written once."""
        assert isinstance(form, FileForm)
        plan = plan or Plan(model=ModelReference.of(stack))
        key = id(stack), plan.model_dump_json(), form.kind
        if key not in self._files:
            file = Path(self._folder.name) / f"{len(self._files)}.gguf"
            checkpoint = self._exported(stack, plan)
            try:
                write_gguf(checkpoint, open_config(checkpoint), self._tokenizer, file, form.kind, name=stack.name)
            except ExportError as error:
                found = str(error).replace(str(checkpoint), stack.name)
                raise ExportError(f"{found}; --allow quantize cuts nothing" if plan.removed else found) from None
            self._files[key] = file, stack
        return self._files[key][0]

    def _exported(self, stack: Stack, plan: Plan) -> Path:
        """Return the checkpoint of a model under a plan, which is kept until another one is needed."""
        checkpoint, key = Path(self._folder.name) / "checkpoint", (id(stack), plan.model_dump_json())
        if self._checkpoint != key:
            shutil.rmtree(checkpoint, ignore_errors=True)
            export(stack, plan, checkpoint, form="plain", tokenizer=self._tokenizer)
            self._checkpoint = key
        return checkpoint


def _step_times(form: FileForm, whole: float, half: float, removed: int) -> StepTimes:
    """Return the parts of a decoding step from those of a model and of the same without some layers.

    A decoding step reads all weights, so the time of a layer is divided between its sublayers by their bytes.

    Args:
        form: the form of both.
        whole: time of a step of the whole model, in any unit.
        half: that without the layers, in the same unit.
        removed: number of these layers.
    """
    layers = len(form.stack)
    layer = min(max((whole - half) / removed, 0.0), whole / layers)
    attn, mlp = (
        form.weights() - form.weights([each for each in form.stack.positions if each.sublayer == name])
        for name in ("attn", "mlp")
    )
    share = attn / (attn + mlp)
    return StepTimes(layer * share, layer * (1 - share), whole - layers * layer)


@contextmanager
def opened(files: Mapping[str, Path], context: int) -> Iterator[Callable[[dict[str, Any]], dict[str, Any]]]:
    """Open GGUF files in a process of llama.cpp, and yield a function that sends it a request.

    Args:
        files: files by name.
        context: the longest text in tokens.

    Raises:
        LamellaError: if the process ends; the message has its last line.
    """
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            [sys.executable, "-m", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as child,
    ):
        assert child.stdin is not None and child.stdout is not None
        requests, answers = child.stdin, child.stdout

        def ask(request: dict[str, Any]) -> dict[str, Any]:
            with suppress(BrokenPipeError):  # of a process that has ended, which its answer shows
                print(json.dumps(request), file=requests, flush=True)
            line = answers.readline()
            if not line:
                errors.seek(0)
                last = (errors.read().strip().splitlines() or ["no message"])[-1]
                raise LamellaError(f"llama.cpp could not run {', '.join(files)}: {last}")
            found: dict[str, Any] = json.loads(line)
            return found

        try:
            names = {name: str(file) for name, file in files.items()}
            ask({"files": names, "threads": torch.get_num_threads(), "context": context})
            yield ask
        finally:
            child.kill()
