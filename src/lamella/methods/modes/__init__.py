"""MoDES: skip the experts that a token of its modality needs least; see :mod:`lamella.methods.modes.method`."""

from lamella.methods.modes.frontier import Found, frontier, parity_grid, quantile_grid
from lamella.methods.modes.importance import Answers, layer_importance
from lamella.methods.modes.method import modes
from lamella.methods.modes.policy import ExpertSkipping

__all__ = [
    "Answers",
    "ExpertSkipping",
    "Found",
    "frontier",
    "layer_importance",
    "modes",
    "parity_grid",
    "quantile_grid",
]
