"""SKR: solve a family of linear systems in sorted order, recycling a Krylov subspace from each system to the next."""

from lamella.methods.skr.baselines import BASELINES, SolverComparison, baseline, compare
from lamella.methods.skr.equations import GaussianField
from lamella.methods.skr.families import FAMILIES
from lamella.methods.skr.gcrodr import gcrodr
from lamella.methods.skr.method import skr
from lamella.methods.skr.result import Solutions
from lamella.methods.skr.sorting import arrange
from lamella.methods.skr.systems import LinearSystems

__all__ = [
    "BASELINES",
    "FAMILIES",
    "GaussianField",
    "LinearSystems",
    "Solutions",
    "SolverComparison",
    "arrange",
    "baseline",
    "compare",
    "gcrodr",
    "skr",
]
