"""SLAB: norms that become batch norms while a model trains and fold away, and attention without a softmax."""

from lamella.methods.slab.method import fold, slab
from lamella.methods.slab.modules import LinearAttention, PRepBN, Real, RepBN, attended, begun
from lamella.methods.slab.recipe import Counted, Schedule, counted, free_sites, without_norms
from lamella.methods.slab.sites import Site, sites_of
from lamella.methods.slab.transition import (
    Transition,
    constancy,
    convert,
    fold_before,
    fold_behind,
    merge,
    places,
    refresh,
)

__all__ = [
    "Counted",
    "LinearAttention",
    "PRepBN",
    "Real",
    "RepBN",
    "Schedule",
    "Site",
    "Transition",
    "attended",
    "begun",
    "constancy",
    "convert",
    "counted",
    "fold",
    "fold_before",
    "fold_behind",
    "free_sites",
    "merge",
    "places",
    "refresh",
    "sites_of",
    "slab",
    "without_norms",
]
