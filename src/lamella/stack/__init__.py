"""Models as addressable layers."""

from lamella.stack.families import FAMILIES, Family, find_family, register_family
from lamella.stack.halves import Parallel, PartialLayer, Placeholder, hold, join
from lamella.stack.matrices import Matrix, matrices
from lamella.stack.sharing import replace_forward, share
from lamella.stack.sites import KINDS, half_site, halves_of, sites_of
from lamella.stack.stack import Context, Stack, Stream

__all__ = [
    "FAMILIES",
    "KINDS",
    "Context",
    "Family",
    "Matrix",
    "Parallel",
    "PartialLayer",
    "Placeholder",
    "Stack",
    "Stream",
    "find_family",
    "half_site",
    "halves_of",
    "hold",
    "join",
    "matrices",
    "register_family",
    "replace_forward",
    "share",
    "sites_of",
]
