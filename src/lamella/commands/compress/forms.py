"""Forms in which a model can run: its weights as they are, or quantised; each measured where the model runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

from lamella.evaluate import Ratio, StepTimes, bench, cost, step_times
from lamella.evaluate.budget import CONTEXT
from lamella.evaluate.fidelity import predicting_stack
from lamella.plan import Plan
from lamella.plan.quantize import Int8Linear, int8_copy
from lamella.runtime import apply
from lamella.stack import Position, Stack, open_model

Means = Literal["quantize", "cut"]
USEFUL = 1.05  # speed-up from which quantisation is combined with a cut: below it, a cut of the original is faster
UNCHANGED = Ratio(1.0, 1.0, 1.0)
STEPS = 16  # decoding steps in a round of a timing loop
SECONDS = 12.0  # time limit of a timing loop, after its minimum number of rounds


@dataclass(frozen=True)
class Form:
    """A form of a model's weights, measured on the model without a cut.

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

    def view(self, stack: Stack, plan: Plan) -> Any:
        """Return a view of a model under a plan, in this form; a dynamic plan runs with the weights as they are.

        Args:
            stack: the model.
            plan: the plan.
        """
        view = apply(stack, plan)
        return int8_copy(view) if self.name and not hasattr(view, "lamella_policy") else view


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
    whole = Stack(quantised, name=stack.name)
    return Form("int8", whole, step_times(whole), timings["int8"][0].decode_speedup)


def means(allow: Sequence[Means], named: bool) -> tuple[Means, ...]:
    """Return the means that a compression may use.

    Args:
        allow: those that were requested; if empty, both, or only a cut if planners or plans were named.
        named: whether planners or plans were named.
    """
    if allow:
        return tuple(allow)
    return ("cut",) if named or find_spec("torchao") is None else ("quantize", "cut")


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
    stack = predicting_stack(open_model(model))
    removed = set(_parameters(stack, stack.dropped))
    return sum(each.nbytes for each in model.parameters() if each not in removed)


def _parameters(stack: Stack, positions: Iterable[Position]) -> list[Any]:
    """Return the parameters of some sublayers."""
    return [
        each
        for layer, name in positions
        for child in stack.architecture[name].modules
        for each in stack.layers[layer].get_submodule(child).parameters()
    ]
