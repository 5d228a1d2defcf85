"""Model arithmetic: combine a language learned by the base model with the abilities of its instruct sibling.

    theta = theta_0 + lambda Delta + lambda' (theta_I - theta_0)

on dense weights: norms, embeddings and head are part of the difference too, and come from theta_I alone. lambda' = 1
adds Delta to theta_I. Both differences change the last layers, so a lambda' below 1 is often better; the best value
depends on the task (the paper tunes it), so :func:`equip` scans it on text of the user.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lamella.errors import MethodError
from lamella.methods.layra.languages import Language, measure
from lamella.plan import ModelReference, Plan
from lamella.registry import command
from lamella.results import Edit
from lamella.stack import Stack, share
from lamella.train import Adapter
from lamella.train.adapters import check_fits

NONE: dict[str, Language] = {}
SCAN = tuple(step / 10 for step in range(13))  # lambda' from 0 to 1.2
UNRELATED = 1.0  # highest |theta_I - theta_0| / |theta_0|: it is about 1.4 for two independently trained models


@dataclass(kw_only=True)
class Equipped(Edit):
    """A model with a new language and the abilities of its instruct sibling.

    Attributes:
        weight, instruct_weight: lambda and lambda'.
        distance: |theta_I - theta_0| / |theta_0|.
        scan: bits per byte of every test language, by lambda'; empty if lambda' was given.
    """

    weight: float
    instruct_weight: float
    distance: float
    scan: dict[float, dict[str, float]]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.findings = {
            "weight": self.weight,
            "instruct_weight": self.instruct_weight,
            "distance": self.distance,
            "scan": [{"instruct_weight": value, **bits} for value, bits in self.scan.items()],
        }
        self.notes = self._notes()

    def _notes(self) -> list[str]:
        found = [f"Relative distance of the instruct model from the base model: {self.distance:.3f} of its norm."]
        if self.scan:
            edge = self.instruct_weight in (min(self.scan), max(self.scan))
            place = "at the edge of the scan, so there is no trade-off" if edge else "inside the scanned range"
            found.append(f"lambda' = {self.instruct_weight:g} is best for this text, {place}.")
        return found


@command("layra", "equip")
def equip(
    stack: Stack,
    instruct: Stack,
    adapter: Adapter,
    judged: dict[str, Language] = NONE,
    *,
    weight: float = 1.0,
    instruct_weight: float | None = None,
) -> Equipped:
    """Add the abilities of an instruct sibling to a model with a new language, without data in that language.

    Args:
        stack: theta_0, the base model.
        instruct: theta_I, its sibling: the same revision of the base, instruction-tuned.
        adapter: Delta, the adapter of the language.
        judged: text for choosing lambda', such as answers in the new language; it must differ from the test text.
        weight: lambda; the paper's 1.
        instruct_weight: lambda'; defaults to the best of 0 to 1.2 for the mean over ``judged``, or 1 without such text.

    Raises:
        MethodError: for models that differ in a name or shape, or do not share a base.
        TrainingError: for an adapter of another model or revision.
    """
    distance = check_siblings(stack, instruct)
    scan: dict[float, dict[str, float]] = {}
    if instruct_weight is None and judged:
        for value in SCAN:
            scan[value] = measure(arithmetic(stack, [(adapter, weight)], [(instruct, value)]).model, judged)
        instruct_weight = min(scan, key=lambda value: sum(scan[value].values()))
    chosen = 1.0 if instruct_weight is None else instruct_weight
    made = arithmetic(stack, [(adapter, weight)], [(instruct, chosen)])
    plan = Plan(model=ModelReference.of(made))
    return Equipped(stack=made, plan=plan, weight=weight, instruct_weight=chosen, distance=distance, scan=scan)


@torch.no_grad()
def arithmetic(
    stack: Stack,
    adapters: Sequence[tuple[Adapter, float]] = (),
    siblings: Sequence[tuple[Stack, float]] = (),
) -> Stack:
    """Compute theta_0 + sum_k lambda_k Delta_k + sum_i lambda'_i (theta_i - theta_0), in float32, rounded once.

    With all weights 0 the result is bitwise equal to theta_0, and with a single lambda' = 1 to that sibling.

    Args:
        stack: theta_0; it is not changed.
        adapters: Delta_k with lambda_k.
        siblings: theta_i with lambda'_i, see :func:`check_siblings`.

    Raises:
        MethodError, TrainingError: as for :func:`equip`.
    """
    for adapter, _ in adapters:
        check_fits(stack, adapter)
    for sibling, _ in siblings:
        check_siblings(stack, sibling)
    model = share(stack.model)
    others = [(dict(sibling.model.named_parameters()), weight) for sibling, weight in siblings if weight]
    rest = 1.0 - sum(weight for _, weight in others)
    deltas = {f"{name}.weight": name for adapter, weight in adapters if weight for name in adapter.modules}
    for name, weight in list(model.named_parameters()):
        if not others and name not in deltas:
            continue
        value = rest * weight.float()
        for parameters, share_of in others:
            value = value + share_of * parameters[name].to(weight.device).float()
        for adapter, scale in adapters:
            if scale and deltas.get(name) in adapter.pairs:
                value = value + scale * adapter.delta(deltas[name]).to(weight.device)
        _put(model, weight, value.to(weight.dtype))
    return Stack(model, name=f"{stack.name}, by arithmetic")


@torch.no_grad()
def check_siblings(base: Stack, other: Stack) -> float:
    """Check that the weights of two models can be subtracted, and that both share a base.

    Args:
        base: theta_0.
        other: theta.

    Returns:
        |theta - theta_0| / |theta_0| over all parameters.

    Raises:
        MethodError: with the first difference.
    """
    ours, theirs = (dict(each.model.named_parameters()) for each in (base, other))
    for name in {**ours, **theirs}:
        shapes = [list(each[name].shape) if name in each else None for each in (ours, theirs)]
        if shapes[0] != shapes[1]:
            raise MethodError(
                f"{name} is {shapes[0]} in {base.name} and {shapes[1]} in {other.name}, so their weights cannot be "
                "added: give two models with the same base"
            )
    apart = sum(
        float((theirs[name].to(ours[name].device).float() - ours[name].float()).square().sum()) for name in ours
    )
    distance = (apart / sum(float(each.float().square().sum()) for each in ours.values())) ** 0.5
    if distance > UNRELATED:
        raise MethodError(
            f"the relative distance of {other.name} from {base.name} is {distance:.2f}, as for unrelated models: give "
            "the revision of the base that it was made from"
        )
    return distance


def _put(model: Any, old: nn.Parameter, value: torch.Tensor) -> None:
    """Replace a parameter by a new tensor wherever it is used, so that tied weights stay tied."""
    new = nn.Parameter(value, requires_grad=old.requires_grad)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter is old:
                setattr(module, name, new)
