"""Optimizers over decisions. They know nothing of models."""

from lamella.search.balanced import balanced, window
from lamella.search.greedy import Cost, Removal, greedy, lazy_greedy, one_shot, swap
from lamella.search.journal import Journal
from lamella.search.spectral import Clusters, spectral_clusters

__all__ = [
    "Clusters",
    "Cost",
    "Journal",
    "Removal",
    "balanced",
    "greedy",
    "lazy_greedy",
    "one_shot",
    "spectral_clusters",
    "swap",
    "window",
]
