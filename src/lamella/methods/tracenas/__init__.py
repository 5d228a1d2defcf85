"""TraceNAS: search for the shape whose gradients agree best with the original's, before any training."""

from lamella.methods.tracenas.evolve import Breeding, Genome, cross_depth, cross_width, evolve, flip
from lamella.methods.tracenas.method import TRAINING, phi, recover, tracenas
from lamella.methods.tracenas.space import PrunedShape, SearchSpace
from lamella.methods.tracenas.traces import GradientTraces, Traces, cosine, pearson

__all__ = [
    "TRAINING",
    "Breeding",
    "Genome",
    "GradientTraces",
    "PrunedShape",
    "SearchSpace",
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
