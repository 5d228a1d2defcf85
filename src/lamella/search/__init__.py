"""Optimizers over decisions. They know nothing of models."""

from lamella.search.allocate import Allocation, allocate
from lamella.search.balanced import balanced, window
from lamella.search.greedy import Cost, Removal, greedy, lazy_greedy, one_shot, swap
from lamella.search.journal import Journal
from lamella.search.shapes import Candidate, Shape, enumerate_shapes
from lamella.search.spectral import Clusters, spectral_clusters

__all__ = [
    "Allocation",
    "Candidate",
    "Clusters",
    "Cost",
    "Journal",
    "Removal",
    "Shape",
    "allocate",
    "balanced",
    "enumerate_shapes",
    "greedy",
    "lazy_greedy",
    "one_shot",
    "spectral_clusters",
    "swap",
    "window",
]
