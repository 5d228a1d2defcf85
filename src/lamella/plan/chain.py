"""The normal form of what a plan does to one stack."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from operator import mul
from typing import Literal, NamedTuple

from lamella.plan.entries import PhasedPath, PolicyReference
from lamella.plan.reference import StackReference
from lamella.stack import Group, Position, groups_at


class Run(NamedTuple):
    """One execution of a layer.

    Attributes:
        layer: index of the layer in the original stack.
        sublayers: names of the sublayers that run, in order.
    """

    layer: int
    sublayers: tuple[str, ...]

    @property
    def positions(self) -> tuple[Position, ...]:
        """The positions of the sublayers that run."""
        return tuple(Position(self.layer, name) for name in self.sublayers)


@dataclass(frozen=True)
class Chain:
    """A stack under a plan.

    Attributes:
        stack: the stack without the plan.
        dropped: positions of the sublayers that do not run.
        path: which layers run, in which order; None if all layers run in their order.
        policy: the policy that decides at run time; None if there is none.
        shares: for each layer, the remaining fraction of the weight matrices of each of its sublayers.
    """

    stack: StackReference
    dropped: frozenset[Position]
    path: PhasedPath | None
    policy: PolicyReference | None
    shares: list[tuple[float, ...]]

    @property
    def positions(self) -> tuple[Position, ...]:
        """The positions of all sublayers of the original stack."""
        return self.stack.positions

    @cached_property
    def layers(self) -> list[Group]:
        """The positions of each layer."""
        return groups_at("block", self.positions)

    def runs(self, phase: Literal["prefill", "decode"]) -> tuple[Run, ...]:
        """Return every execution of a layer in a phase, in order; executions without a sublayer are left out.

        Args:
            phase: ``prefill`` for the prompt, ``decode`` for generated tokens.
        """
        order: Iterable[int] = range(self.stack.layers) if self.path is None else getattr(self.path, phase)
        left = [tuple(name for layer, name in group if (layer, name) not in self.dropped) for group in self.layers]
        return tuple(Run(layer, left[layer]) for layer in order if left[layer])

    @property
    def is_static(self) -> bool:
        """Whether all tokens run through the same layers, which are known in advance."""
        return self.policy is None and self.runs("prefill") == self.runs("decode")

    @property
    def executions(self) -> list[tuple[float, ...]]:
        """How often a generated token runs each sublayer of each layer; an expected value if a policy decides."""
        if self.policy is not None:
            return self.policy.work or [(1.0,) * len(group) for group in self.layers]
        times = Counter(position for run in self.runs("decode") for position in run.positions)
        return [tuple(float(times[position]) for position in group) for group in self.layers]

    @property
    def work(self) -> list[tuple[float, ...]]:
        """The fraction of each sublayer's full cost per generated token: executions times remaining widths."""
        return [tuple(map(mul, times, shares)) for times, shares in zip(self.executions, self.shares, strict=True)]

    @property
    def in_order(self) -> bool:
        """Whether no layer is repeated or moved, so that the plan only removes sublayers."""
        layers = [run.layer for run in self.runs("prefill")]
        return layers == sorted(set(layers))

    @property
    def skipped(self) -> frozenset[Position]:
        """The sublayers that generated tokens never run."""
        return frozenset(self.positions).difference(*(run.positions for run in self.runs("decode")))

    @property
    def in_layers(self) -> bool:
        """Whether the sublayers that generated tokens never run form whole layers."""
        gone = self.skipped
        return all(gone.issuperset(group) or gone.isdisjoint(group) for group in self.layers)

    @property
    def removed(self) -> float:
        """The number of sublayers that a generated token does not run; see :attr:`work`.

        It is an expected value if a policy decides.
        """
        return len(self.positions) - sum(map(sum, self.work))
