"""Optimizers over decisions. They know nothing of models."""

from lamella.search.allocate import Allocation, allocate
from lamella.search.balanced import balanced, window
from lamella.search.evolve import Breeding, Genome, Scored, cross_depth, cross_width, evolve, flip
from lamella.search.greedy import Cost, Removal, greedy, lazy_greedy, one_shot, swap
from lamella.search.journal import Memo, Removals, take
from lamella.search.shapes import Candidate, Shape, enumerate_shapes
from lamella.search.spectral import Clusters, spectral_clusters

__all__ = [
    "Allocation",
    "Breeding",
    "Candidate",
    "Clusters",
    "Cost",
    "Genome",
    "Memo",
    "Removal",
    "Removals",
    "Scored",
    "Shape",
    "allocate",
    "balanced",
    "cross_depth",
    "cross_width",
    "enumerate_shapes",
    "evolve",
    "flip",
    "greedy",
    "lazy_greedy",
    "one_shot",
    "spectral_clusters",
    "swap",
    "take",
    "window",
]
