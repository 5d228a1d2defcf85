"""gamma-MoD: mixture-of-depths layers that most image tokens skip, and their training; see :mod:`.method`."""

from lamella.methods.gamma_mod.arank import attention_ranks, lowest, rank_of
from lamella.methods.gamma_mod.method import arank, gamma_mod, thresholds
from lamella.methods.gamma_mod.policy import MixtureOfDepths
from lamella.methods.gamma_mod.recipe import TRAINING, Routing, RoutingTrace, observe, quantile, train

__all__ = [
    "TRAINING",
    "MixtureOfDepths",
    "Routing",
    "RoutingTrace",
    "arank",
    "attention_ranks",
    "gamma_mod",
    "lowest",
    "observe",
    "quantile",
    "rank_of",
    "thresholds",
    "train",
]
