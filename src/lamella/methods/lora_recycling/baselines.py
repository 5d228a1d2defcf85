"""Dense merges of a pool by published methods that need no training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le
from torch import Tensor

from lamella.data import Examples
from lamella.errors import MethodError
from lamella.methods.lora_recycling.judge import AnswerScores
from lamella.methods.lora_recycling.merging import EntryMerge, Sign, core, tsv
from lamella.methods.lora_recycling.pool import AdapterPool, Members
from lamella.plan import ModelReference, Plan
from lamella.progress import track
from lamella.registry import command
from lamella.results import Edit
from lamella.stack import Stack
from lamella.train import Adapter, concatenate
from lamella.train.adapters import with_updates

Merge = Literal["average", "arithmetic", "ties", "dare", "dare-ties", "magnitude", "tsv", "core"]
GRID = tuple(step / 10 for step in range(1, 11))  # values of lambda to try; the paper's


@dataclass(kw_only=True)
class Merged(Edit):
    """A model with a pool merged into it.

    Attributes:
        names: names of the merged adapters.
        how, weight: the method, and lambda.
        losses: loss on the examples, by lambda; empty if lambda was given.
        members: members of the pool, and the reasons for rejecting the others.
    """

    names: Sequence[str]
    how: str
    weight: float
    losses: dict[float, float]
    members: Members

    def __post_init__(self) -> None:
        super().__post_init__()
        self.findings = {
            "merged": list(self.names),
            "how": self.how,
            "weight": self.weight,
            "scan": [{"weight": weight, "loss": loss} for weight, loss in self.losses.items()],
            "refused": dict(self.members.refused),
        }
        self.notes = [f"{len(self.names)} adapters were merged by {self.how}, each with a weight of {self.weight:.4g}."]
        if self.losses and self.weight == max(self.losses):
            self.notes.append("The largest weight tried is the best one: a larger one may be better still.")
        self.notes.append("This does not compare the merge with training one adapter: use lora-recycling for that.")


@command("lora-recycling", "merge")
def merge(
    stack: Stack,
    pool: AdapterPool,
    data: Examples | None = None,
    *,
    how: Merge = "average",
    names: tuple[str, ...] = (),
    weight: float | None = None,
    density: Annotated[float, Gt(0), Le(1)] = 0.2,
    sign: Sign = "mass",
    triplets: Annotated[int, Ge(1)] = 16,
    seed: int = 0,
) -> Merged:
    """Merge adapters of a pool into a model's weights, fitting at most one weight for all.

    Args:
        stack: the model that the adapters belong to; it is not changed.
        pool: existing adapters.
        data: examples for choosing the weight, from 0.1 to 1; they must differ from the test examples.
        how: ``average``, ``arithmetic`` (their sum), ``ties``, ``dare``, ``dare-ties``, ``magnitude``, ``tsv`` or
            ``core``.
        names: names of the members to merge, separated by commas; defaults to all usable ones.
        weight: lambda, weight of each adapter; by default chosen on ``data``, or without data 1/N in linear sums and
            else 1.
        density: fraction of entries that ties, dare and magnitude keep; the paper's 0.2.
        sign: sign election of ties: by ``mass`` or by ``frequency``.
        triplets: number of singular triplets that tsv keeps of each adapter; the original's 16.
        seed: random seed of dare's masks.

    Returns:
        The merged model.

    Raises:
        MethodError: for names that cannot be merged, or a pool without usable adapters.
    """
    members = pool.members(stack)
    chosen = list(names or members.norms)
    for name in chosen:
        if name not in members.norms:
            raise MethodError(f"'{name}' cannot be merged: {members.refused.get(name, 'the pool has no such adapter')}")
    adapters = members.take(chosen)
    linear = how in ("average", "arithmetic", "core", "dare", "magnitude")
    make = partial(updates, adapters, how=how, density=density, sign=sign, triplets=triplets, seed=seed)
    losses: dict[float, float] = {}
    if weight is None and how != "average" and data is not None:
        losses = {each: _loss(stack, make, each, data) for each in track(GRID, "choosing the weight")}
        weight = min(losses, key=lambda each: losses[each])
    if weight is None or how == "average":
        weight = 1 / len(adapters) if linear else 1.0
    made = with_updates(stack, make(weight))
    plan = Plan(model=ModelReference.of(made))
    return Merged(stack=made, plan=plan, names=chosen, how=how, weight=weight, losses=losses, members=members)


def _loss(stack: Stack, make: Callable[[float], Iterator[tuple[str, Tensor]]], weight: float, data: Examples) -> float:
    return AnswerScores.of(with_updates(stack, make(weight)).model, data).loss


def updates(
    adapters: Sequence[Adapter],
    weight: float,
    *,
    how: Merge,
    density: float = 0.2,
    sign: Sign = "mass",
    triplets: int = 16,
    seed: int = 0,
) -> Iterator[tuple[str, Tensor]]:
    """Iterate over the updates of a merge, one module at a time.

    Args:
        adapters: the adapters.
        weight: lambda.
        how: the method.
        density: fraction of entries to keep.
        sign: sign election of ties.
        triplets: singular triplets per adapter of tsv.
        seed: random seed of dare's masks.
    """
    weights = [weight] * len(adapters)
    match how:
        case "average" | "arithmetic":
            found = concatenate(adapters, weights)
        case "tsv":
            found = tsv(adapters, weights, triplets)
        case "core":
            found = core(adapters, weights)
        case _:
            yield from EntryMerge(adapters, weights, how, density, sign, seed).updates()
            return
    for name in found.modules:
        yield name, found.delta(name)
