"""The families of :mod:`lamella.methods.skr.equations` as linear systems."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

from lamella.methods.skr import equations
from lamella.methods.skr.equations import EquationFamily
from lamella.methods.skr.systems import LinearSystems

P = ParamSpec("P")


def _as_systems(draw: Callable[P, EquationFamily]) -> Callable[P, LinearSystems]:
    @wraps(draw)
    def systems(*args: P.args, **options: P.kwargs) -> LinearSystems:
        return LinearSystems.of_parameters(*draw(*args, **options))

    return systems


darcy = _as_systems(equations.darcy)
clustered_darcy = _as_systems(equations.clustered_darcy)
poisson = _as_systems(equations.poisson)
helmholtz = _as_systems(equations.helmholtz)
convection = _as_systems(equations.convection)
FAMILIES: dict[str, Callable[..., LinearSystems]] = {
    name: _as_systems(draw) for name, draw in equations.FAMILIES.items()
}
