"""PASER: which samples to train a cut model back on, by what the cut has damaged."""

from lamella.measure import embed
from lamella.methods.paser.concepts import ConceptGraph, concepts
from lamella.methods.paser.method import Clustering, budgets, degradation, paser, take
from lamella.methods.paser.pool import Example, Pool, Selection, read_pool
from lamella.methods.paser.spectral import Graph, spectral_clusters

__all__ = [
    "Clustering",
    "ConceptGraph",
    "Example",
    "Graph",
    "Pool",
    "Selection",
    "budgets",
    "concepts",
    "degradation",
    "embed",
    "paser",
    "read_pool",
    "spectral_clusters",
    "take",
]
