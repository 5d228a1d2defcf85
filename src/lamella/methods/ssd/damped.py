"""The effect of dampening on a model, by parameter and by layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from lamella.plan import Factors, touched
from lamella.stack import Stack


@dataclass(frozen=True)
class ParameterDampening:
    """The effect of dampening on one parameter, or on several together.

    Attributes:
        name: the name of the parameter, or of the site.
        weights: the number of weights.
        selected: the number of weights in S.
        mass: the sum of their magnitudes.
        removed: the part of the mass that dampening removes.
    """

    name: str
    weights: int
    selected: int
    mass: float
    removed: float

    @property
    def share(self) -> float:
        """The fraction of weights that are selected."""
        return self.selected / self.weights

    @property
    def removed_share(self) -> float:
        """The fraction of the mass that is removed."""
        return self.removed / self.mass if self.mass else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return the values as a dictionary."""
        return asdict(self) | {"share": self.share, "removed_share": self.removed_share}


@dataclass(frozen=True)
class Dampening:
    """The dampening of a model.

    Attributes:
        factors: for ``lamella.plan.apply_factors``.
        alpha: the threshold that was used.
        bound: |D| / |D_f|, which no ratio exceeds; None if the estimator has no such bound.
        parameters: the effect on each parameter that may change.
        untouched: buffers with running statistics, which are not parameters and still depend on the forgotten data.
    """

    factors: dict[str, Factors]
    alpha: float
    bound: float | None
    parameters: list[ParameterDampening]
    untouched: list[str]

    @property
    def total(self) -> ParameterDampening:
        """The effect on all parameters together."""
        return _sum("all", self.parameters)

    def by_layer(self, model: nn.Module | Stack) -> list[ParameterDampening]:
        """Return the effect by site of a stack, in order, or by module of any other model."""
        groups = defaultdict(list)
        for each in self.parameters:
            site = touched(model, [each.name])[0] if isinstance(model, Stack) else each.name.rpartition(".")[0]
            groups[site].append(each)
        return [_sum(site, group) for site, group in groups.items()]


def _sum(name: str, parts: Sequence[ParameterDampening]) -> ParameterDampening:
    return ParameterDampening(
        name, *(sum(getattr(p, key) for p in parts) for key in ("weights", "selected", "mass", "removed"))
    )
