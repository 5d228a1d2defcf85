"""Models as addressable layers."""

from lamella.stack.families import FAMILIES, Family, find_family, register_family
from lamella.stack.halves import Parallel, PartialLayer, Placeholder, counts_tokens, hold, join
from lamella.stack.sharing import replace_forward, share
from lamella.stack.sites import KINDS, Group, Level, groups_at, half_site, halves_of, sites_of
from lamella.stack.stack import Context, Stack, Stream
from lamella.stack.weights import Weight, matrices, weights

__all__ = [
    "FAMILIES",
    "KINDS",
    "Context",
    "Family",
    "Group",
    "Level",
    "Parallel",
    "PartialLayer",
    "Placeholder",
    "Stack",
    "Stream",
    "Weight",
    "counts_tokens",
    "find_family",
    "groups_at",
    "half_site",
    "halves_of",
    "hold",
    "join",
    "matrices",
    "register_family",
    "replace_forward",
    "share",
    "sites_of",
    "weights",
]
