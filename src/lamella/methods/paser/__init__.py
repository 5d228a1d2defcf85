"""PASER: choose the samples to heal a pruned model with, by the skills that pruning has damaged."""

from lamella.measure import embed
from lamella.methods.paser.concepts import ConceptGraph, concepts
from lamella.methods.paser.method import Clustering, budgets, degradation, paser, take
from lamella.methods.paser.pool import InstructionExample, InstructionPool, Selection, read_pool
from lamella.methods.paser.spectral import Graph, spectral_clusters

__all__ = [
    "Clustering",
    "ConceptGraph",
    "Graph",
    "InstructionExample",
    "InstructionPool",
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
