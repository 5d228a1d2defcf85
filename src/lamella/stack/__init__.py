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
from lamella.stack.sharing import replace_forward, share
from lamella.stack.sites import Group, Level, Position, groups_at, positions_at, positions_of, sites_of
from lamella.stack.stack import Context, Point, Stack, Stream
from lamella.stack.sublayers import Parallel, PartialLayer, Placeholder, counts_tokens, hold, join
from lamella.stack.weights import Weight, matrices, weights
from lamella.stack.wiring import Part, Sizes, Wiring

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Context",
    "Experts",
    "Group",
    "Level",
    "Parallel",
    "Part",
    "PartialLayer",
    "Placeholder",
    "Point",
    "Position",
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
    "hold",
    "join",
    "matrices",
    "positions_at",
    "positions_of",
    "register_architecture",
    "replace_forward",
    "share",
    "sites_of",
    "weights",
]
