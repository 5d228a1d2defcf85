"""Models as addressable layers."""

from lamella.stack.architectures import (
    ARCHITECTURES,
    Architecture,
    Experts,
    Sublayer,
    cuttable,
    find_architecture,
    register_architecture,
)
from lamella.stack.halves import Parallel, PartialLayer, Placeholder, counts_tokens, hold, join
from lamella.stack.sharing import replace_forward, share
from lamella.stack.sites import KINDS, Group, Level, groups_at, half_site, halves_of, sites_of
from lamella.stack.stack import Context, Stack, Stream
from lamella.stack.weights import Weight, matrices, weights
from lamella.stack.wiring import Part, Sizes, Wiring

__all__ = [
    "ARCHITECTURES",
    "KINDS",
    "Architecture",
    "Context",
    "Experts",
    "Group",
    "Level",
    "Parallel",
    "Part",
    "PartialLayer",
    "Placeholder",
    "Sizes",
    "Stack",
    "Stream",
    "Sublayer",
    "Weight",
    "Wiring",
    "counts_tokens",
    "cuttable",
    "find_architecture",
    "groups_at",
    "half_site",
    "halves_of",
    "hold",
    "join",
    "matrices",
    "register_architecture",
    "replace_forward",
    "share",
    "sites_of",
    "weights",
]
