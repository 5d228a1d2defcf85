"""TraceNAS: search the shape whose gradient still points where the original's does, before any training."""

from lamella.methods.tracenas.evolve import Breeding, Genome, cross_depth, cross_width, evolve, flip
from lamella.methods.tracenas.method import TRAINING, phi, recover, tracenas
from lamella.methods.tracenas.space import Cut, Space
from lamella.methods.tracenas.traces import GradientTraces, Traces, cosine, pearson

__all__ = [
    "TRAINING",
    "Breeding",
    "Cut",
    "Genome",
    "GradientTraces",
    "Space",
    "Traces",
    "cosine",
    "cross_depth",
    "cross_width",
    "evolve",
    "flip",
    "pearson",
    "phi",
    "recover",
    "tracenas",
]
