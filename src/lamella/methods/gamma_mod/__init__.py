"""gamma-MoD: layers that most image tokens pass by, and what trains them; see :mod:`.method`."""

from lamella.methods.gamma_mod.arank import attention_ranks, lowest, rank_of
from lamella.methods.gamma_mod.method import arank, gamma_mod, thresholds
from lamella.methods.gamma_mod.policy import MixtureOfDepths
from lamella.methods.gamma_mod.recipe import TRAINING, Routing, Seen, observed, quantile, train

__all__ = [
    "TRAINING",
    "MixtureOfDepths",
    "Routing",
    "Seen",
    "arank",
    "attention_ranks",
    "gamma_mod",
    "lowest",
    "observed",
    "quantile",
    "rank_of",
    "thresholds",
    "train",
]
