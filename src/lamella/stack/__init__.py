"""Models as addressable layers."""

from lamella.stack.architectures import (
    ARCHITECTURES,
    ASSEMBLIES,
    Architecture,
    Assembly,
    Experts,
    Slot,
    Sublayer,
    auto_class,
    cuttable,
    find_architecture,
    find_architectures,
    register_architecture,
)
from lamella.stack.blocks import Blocks
from lamella.stack.prefixes import Prefixes, beginnings
from lamella.stack.sharing import replace_forward, share
from lamella.stack.sites import Group, Level, Position, groups_at, positions_at, positions_of, sites_of
from lamella.stack.stack import Context, Model, Place, Stack, Stream, open_model
from lamella.stack.sublayers import Parallel, PartialLayer, Placeholder, counts_tokens, hold, join, own_keys
from lamella.stack.weights import Weight, matrices, weights
from lamella.stack.wiring import Part, Sizes, Wiring

__all__ = [
    "ARCHITECTURES",
    "ASSEMBLIES",
    "Architecture",
    "Assembly",
    "Blocks",
    "Context",
    "Experts",
    "Group",
    "Level",
    "Model",
    "Parallel",
    "Part",
    "PartialLayer",
    "Place",
    "Placeholder",
    "Position",
    "Prefixes",
    "Sizes",
    "Slot",
    "Stack",
    "Stream",
    "Sublayer",
    "Weight",
    "Wiring",
    "auto_class",
    "beginnings",
    "counts_tokens",
    "cuttable",
    "find_architecture",
    "find_architectures",
    "groups_at",
    "hold",
    "join",
    "matrices",
    "open_model",
    "own_keys",
    "positions_at",
    "positions_of",
    "register_architecture",
    "replace_forward",
    "share",
    "sites_of",
    "weights",
]
