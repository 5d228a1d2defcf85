"""MuE: three early exits, for image, text and each generated token; see :mod:`lamella.methods.mue.method`."""

from lamella.methods.mue.method import mue, saturation, thresholds
from lamella.methods.mue.policy import OFF, ModalityExits, TokenExits, decayed
from lamella.methods.mue.recipe import ExitSettings, exit_plan, exit_view, layerwise_loss, train
from lamella.methods.mue.reduction import (
    ExitCosts,
    Exits,
    by_flops,
    by_layers,
    histograms,
    measure_exits,
    quantile_thresholds,
)
from lamella.methods.mue.search import ExitTrial, best_trial, pareto_trials, search_thresholds, with_all_exits

__all__ = [
    "OFF",
    "ExitCosts",
    "ExitSettings",
    "ExitTrial",
    "Exits",
    "ModalityExits",
    "TokenExits",
    "best_trial",
    "by_flops",
    "by_layers",
    "decayed",
    "exit_plan",
    "exit_view",
    "histograms",
    "layerwise_loss",
    "measure_exits",
    "mue",
    "pareto_trials",
    "quantile_thresholds",
    "saturation",
    "search_thresholds",
    "thresholds",
    "train",
    "with_all_exits",
]
