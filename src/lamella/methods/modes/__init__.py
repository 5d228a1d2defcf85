"""MoDES: skip the experts that matter least to a token of its modality; see :mod:`lamella.methods.modes.method`."""

from lamella.methods.modes.frontier import FrontierResult, frontier, parity_grid, quantile_grid
from lamella.methods.modes.importance import AnswerDistance, layer_importance
from lamella.methods.modes.method import modes
from lamella.methods.modes.policy import ExpertSkipping

__all__ = [
    "AnswerDistance",
    "ExpertSkipping",
    "FrontierResult",
    "frontier",
    "layer_importance",
    "modes",
    "parity_grid",
    "quantile_grid",
]
