"""What dampening does to a model, parameter by parameter and layer by layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from lamella.plan import Factors, touched
from lamella.stack import Stack


@dataclass(frozen=True)
class Damped:
    """What dampening does to one parameter, or to several together.

    Attributes:
        name: of the parameter, or of the site.
        weights: how many there are.
        selected: how many of them are in S.
        mass, removed: the sum of their magnitudes, and how much of it dampening takes.
    """

    name: str
    weights: int
    selected: int
    mass: float
    removed: float

    @property
    def share(self) -> float:
        """Of the weights that are selected."""
        return self.selected / self.weights

    @property
    def removed_share(self) -> float:
        """Of the mass that is removed."""
        return self.removed / self.mass if self.mass else 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"share": self.share, "removed_share": self.removed_share}


@dataclass(frozen=True)
class Dampening:
    """What is done to a model, parameter by parameter.

    Attributes:
        factors: for ``lamella.plan.apply_factors``.
        alpha: the one that was used.
        bound: |D| / |D_f|, which no ratio exceeds; None where the estimator has no such bound.
        parameters: what it does to each parameter that it may change.
        untouched: buffers with running statistics: not parameters, so they keep what they know of the forgotten.
    """

    factors: dict[str, Factors]
    alpha: float
    bound: float | None
    parameters: list[Damped]
    untouched: list[str]

    @property
    def total(self) -> Damped:
        return _together("all", self.parameters)

    def by_layer(self, model: nn.Module | Stack) -> list[Damped]:
        """The same by site of a stack, in its order, or by module of any other model."""
        groups = defaultdict(list)
        for each in self.parameters:
            site = touched(model, [each.name])[0] if isinstance(model, Stack) else each.name.rpartition(".")[0]
            groups[site].append(each)
        return [_together(site, group) for site, group in groups.items()]


def _together(name: str, parts: Sequence[Damped]) -> Damped:
    return Damped(name, *(sum(getattr(p, key) for p in parts) for key in ("weights", "selected", "mass", "removed")))
