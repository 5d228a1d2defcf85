"""Forms in which a model can run: its weights as they are, or quantised; each measured where the model runs."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar, Literal, Protocol

from lamella.evaluate import Ratio, StepTimes, Timing, bench, cost, step_times
from lamella.evaluate.budget import CONTEXT
from lamella.evaluate.fidelity import predicting_stack
from lamella.plan import ModelReference, Plan, materialise
from lamella.plan.quantize import Int8Linear, gguf_bytes, gguf_copy, int8_bytes, int8_copy
from lamella.plan.view import can_stand_alone
from lamella.runtime import apply
from lamella.stack import Position, Stack, open_model

Means = Literal["quantize", "cut"]
Program = Literal["torch", "llama.cpp"]
USEFUL = 1.05  # speed-up from which quantisation is combined with a cut: below it, a cut of the original is faster
UNCHANGED = Ratio(1.0, 1.0, 1.0)
STEPS = 16  # decoding steps in a round of a timing loop
SECONDS = 12.0  # time limit of a timing loop, after its minimum number of rounds


@dataclass(frozen=True)
class Form:
    """A form of a model's weights that torch runs, measured on the model without a cut.

    Attributes:
        name: ``int8``, or empty for the weights as they are.
        stack: the model in this form.
        times: step times of the model in this form.
        speedup: its decode speed-up over the weights as they are.
    """

    name: str
    stack: Stack
    times: StepTimes
    speedup: Ratio = UNCHANGED

    program: ClassVar[Program] = "torch"

    def predicted(self, plan: Plan) -> float:
        """Return the predicted decode speed-up of a plan in this form over the unchanged model.

        Args:
            plan: the plan.
        """
        return self.speedup.median * self.times.speedup(plan)

    def remaining(self, target: float) -> float:
        """Return the speed-up that a cut must add to the form's own to reach a target; at least 1.

        Args:
            target: the decode speed-up over the unchanged model.
        """
        return max(1.0, target / self.speedup.median)

    def weights(self, removed: Iterable[Position] = ()) -> int:
        """Return the bytes of the weights without some sublayers.

        Args:
            removed: the removed sublayers.
        """
        return weight_bytes(self.stack.model) - sum(each.nbytes for each in _parameters(self.stack, removed))

    def cache(self, plan: Plan | None = None) -> int:
        """Return the bytes of the cache of 2,048 tokens.

        Args:
            plan: the plan; None for the whole model.
        """
        return CONTEXT * cost(self.stack, plan).kv_bytes_per_token

    def view(self, stack: Stack, plan: Plan | None = None) -> Any:
        """Return a view of a model under a plan, in this form; a dynamic plan runs with the weights as they are.

        Args:
            stack: the model.
            plan: the plan; None for the whole model.
        """
        view = stack.model if plan is None else apply(stack, plan)
        return int8_copy(view) if self.name and not hasattr(view, "lamella_policy") else view

    def bytes(self, stack: Stack, plan: Plan | None = None) -> int:
        """Return the bytes of the weights of a model under a plan, in this form.

        Args:
            stack: the model.
            plan: the plan; None for the whole model.
        """
        view = stack.model if plan is None else apply(stack, plan)
        return int8_bytes(view, _removed(view)) if self.name else weight_bytes(view)


@dataclass(frozen=True)
class FileForm(Form):
    """A form of a model's weights that llama.cpp runs: a kind of GGUF file.

    Its fidelity is measured in torch, with the weights that the file gives back.

    Attributes:
        kind: kind of the file.
    """

    kind: str = "q8_0"

    program: ClassVar[Program] = "llama.cpp"

    def weights(self, removed: Iterable[Position] = ()) -> int:
        """Return the bytes of the weights without some sublayers."""
        return gguf_bytes(self.stack.model, self.kind, _parameters(self.stack, removed))

    def cache(self, plan: Plan | None = None) -> int:
        """Return the bytes of the cache of 2,048 tokens, which has 16 bits."""
        return super().cache(plan) * 2 // next(self.stack.model.parameters()).element_size()

    def view(self, stack: Stack, plan: Plan | None = None) -> Any:
        """Return a copy of a model under a plan, with the weights that its file gives back."""
        return gguf_copy(_alone(stack, plan), self.kind)

    def bytes(self, stack: Stack, plan: Plan | None = None) -> int:
        """Return the bytes of the weights of a model under a plan, in its file."""
        model = _alone(stack, plan)
        return gguf_bytes(model, self.kind, _removed(model))


Variant = tuple[Form, Stack, Plan | None]  # a model, under a plan if it is not whole, in a form


class Runtime(Protocol):
    """A program that runs the result, and what it is measured with."""

    name: ClassVar[Program]
    batches: ClassVar[tuple[int, ...]]

    def describe(self) -> dict[str, Any]:
        """Return the program as JSON values."""

    def forms(self, stack: Stack, quantised: bool, cut: bool) -> Sequence[Form]:
        """Measure a model in the forms that the program runs: its weights as they are, then quantised ones."""

    def shown(self, stack: Stack, further: str | None) -> Sequence[Form]:
        """Return the forms that a report compares, and a further one, without measurements."""

    def bench(
        self, variants: Mapping[str, Variant], batches: Sequence[int] = (1,), rounds: int = 5, seconds: float = SECONDS
    ) -> dict[str, list[Timing]]:
        """Time variants relative to the first, in turns."""


class Torch:
    """Runs routes in torch, eagerly."""

    name: ClassVar[Program] = "torch"
    batches: ClassVar[tuple[int, ...]] = (1, 8)

    def describe(self) -> dict[str, Any]:
        """Return the program as JSON values."""
        return {"name": self.name}

    def forms(self, stack: Stack, quantised: bool, cut: bool) -> list[Form]:
        """Measure a model as it is, and in int8 if its linear layers can be quantised.

        Args:
            stack: the model.
            quantised: whether to measure int8.
            cut: whether step times are needed; they are measured anyway.
        """
        int8 = int8_form(stack) if quantised else None
        return [plain_form(stack), *([] if int8 is None else [int8])]

    def shown(self, stack: Stack, further: str | None) -> list[Form]:
        """Return the forms that a report compares: as it is, int8 where possible, and a further one.

        Args:
            stack: the model.
            further: kind of a GGUF file, whose fidelity is shown without a speed; or None.
        """
        times, quantised = step_times(stack), int8_copy(stack.model)
        forms = [Form("", stack, times)]
        if is_int8(quantised):
            forms.append(Form("int8", Stack(quantised, name=stack.name, stack=stack.stack), times))
        return [*forms, *([FileForm(further, stack, times, kind=further)] if further else [])]

    def bench(
        self, variants: Mapping[str, Variant], batches: Sequence[int] = (1,), rounds: int = 5, seconds: float = SECONDS
    ) -> dict[str, list[Timing]]:
        """Time variants relative to the first, in turns.

        Args:
            variants: variants by name, the reference first.
            batches: batch sizes.
            rounds: maximum number of rounds.
            seconds: time limit for each batch size.
        """
        views = {name: form.view(stack, plan) for name, (form, stack, plan) in variants.items()}
        return bench(views, batches, tokens=STEPS, rounds=rounds, seconds=seconds)


def plain_form(stack: Stack) -> Form:
    """Return the form of the weights as they are.

    Args:
        stack: the model.
    """
    return Form("", stack, step_times(stack))


def int8_form(stack: Stack) -> Form | None:
    """Measure a model with int8 weights; None if it has no linear layers that can be quantised.

    Args:
        stack: the model.
    """
    quantised = int8_copy(stack.model)
    if not is_int8(quantised):
        return None
    timings = bench({"original": stack.model, "int8": quantised}, tokens=STEPS)
    whole = Stack(quantised, name=stack.name, stack=stack.stack)
    return Form("int8", whole, step_times(whole), timings["int8"][0].decode_speedup)


def means(allow: Sequence[Means], named: bool, program: Program = "torch") -> tuple[Means, ...]:
    """Return the means that a compression may use.

    Args:
        allow: those that were requested; if empty, both, or only a cut if planners or plans were named.
        named: whether planners or plans were named.
        program: the program that runs the result; for torch, quantisation needs a package.
    """
    if allow:
        return tuple(allow)
    is_missing = program == "torch" and find_spec("torchao") is None
    return ("cut",) if named or is_missing else ("quantize", "cut")


def without(stack: Stack, gone: Collection[Position]) -> Plan:
    """Return the plan that removes some sublayers.

    Args:
        stack: the model.
        gone: the removed sublayers.
    """
    reference = ModelReference.of(stack)
    return Plan(model=reference, drop=reference.sites({stack.stack: gone}))


def is_int8(model: Any) -> bool:
    """Return whether some linear layers of a model have int8 weights.

    Args:
        model: a model or a view.
    """
    return any(isinstance(module, Int8Linear) for module in model.modules())


def weight_bytes(model: Any) -> int:
    """Return the bytes of a model's weights, without those that the plan of a view removes.

    Args:
        model: a model or a view.
    """
    removed = set(_removed(model))
    return sum(each.nbytes for each in model.parameters() if each not in removed)


def _alone(stack: Stack, plan: Plan | None) -> Any:
    """Return the model under a plan, without a trace of removed layers if whole ones are removed."""
    if plan is None:
        return stack.model
    return materialise(stack, plan).model if can_stand_alone(stack, plan) else apply(stack, plan)


def _removed(model: Any) -> list[Any]:
    """Return the parameters of the sublayers that the plan of a view removes."""
    stack = predicting_stack(open_model(model))
    return _parameters(stack, stack.dropped)


def _parameters(stack: Stack, positions: Iterable[Position]) -> list[Any]:
    """Return the parameters of some sublayers."""
    return [
        each
        for layer, name in positions
        for child in stack.architecture[name].modules
        for each in stack.layers[layer].get_submodule(child).parameters()
    ]
