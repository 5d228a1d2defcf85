"""SLAB: norms that become batch norms in training and are folded away, and attention without a softmax."""

from lamella.methods.slab.method import fold, slab
from lamella.methods.slab.modules import LinearAttention, PRepBN, RepBN, TokenMask, initial_repbn, linear_attention
from lamella.methods.slab.networks import VisionConfig
from lamella.methods.slab.recipe import GammaSchedule, MaskedLoss, counted_tokens, free_sites, without_norms
from lamella.methods.slab.sites import Site, sites_of
from lamella.methods.slab.transition import (
    Transition,
    constancy,
    convert,
    fold_after,
    fold_before,
    merge,
    prepbn_modules,
    refresh,
)

__all__ = [
    "GammaSchedule",
    "LinearAttention",
    "MaskedLoss",
    "PRepBN",
    "RepBN",
    "Site",
    "TokenMask",
    "Transition",
    "VisionConfig",
    "constancy",
    "convert",
    "counted_tokens",
    "fold",
    "fold_after",
    "fold_before",
    "free_sites",
    "initial_repbn",
    "linear_attention",
    "merge",
    "prepbn_modules",
    "refresh",
    "sites_of",
    "slab",
    "without_norms",
]
