"""Models as stacks of addressable layers."""

from lamella.stack.architectures import (
    ARCHITECTURES,
    ASSEMBLIES,
    PROJECTED,
    architectures_of,
    auto_class,
    cuttable,
    find_architecture,
    find_architectures,
    own_class,
    register_architecture,
)
from lamella.stack.attention import attend_with_weights, norm_before
from lamella.stack.blocks import BLOCK_TABLES, BlockKind, Blocks
from lamella.stack.digest import digest_of_files
from lamella.stack.entry import Architecture, Assembly, DerivedCode, Experts, Slot, Sublayer
from lamella.stack.prefixes import Prefixes, beginnings
from lamella.stack.proof import digest_of_proof, kind_of, numeric_attributes, prove
from lamella.stack.sharing import replace_forward, share
from lamella.stack.silence import silencers
from lamella.stack.sites import Group, Level, Position, groups_at, positions_at, positions_of, sites_of
from lamella.stack.stack import Boundary, Context, Hidden, Model, Stack, last_stack, library_of, open_model
from lamella.stack.sublayers import ByKind, Parallel, PartialLayer, Placeholder, counts_tokens, hold, join, own_keys
from lamella.stack.weights import Weight, matrices, weights
from lamella.stack.wiring import Part, Sizes, Wiring

__all__ = [
    "ARCHITECTURES",
    "ASSEMBLIES",
    "BLOCK_TABLES",
    "PROJECTED",
    "Architecture",
    "Assembly",
    "BlockKind",
    "Blocks",
    "Boundary",
    "ByKind",
    "Context",
    "DerivedCode",
    "Experts",
    "Group",
    "Hidden",
    "Level",
    "Model",
    "Parallel",
    "Part",
    "PartialLayer",
    "Placeholder",
    "Position",
    "Prefixes",
    "Sizes",
    "Slot",
    "Stack",
    "Sublayer",
    "Weight",
    "Wiring",
    "architectures_of",
    "attend_with_weights",
    "auto_class",
    "beginnings",
    "counts_tokens",
    "cuttable",
    "digest_of_files",
    "digest_of_proof",
    "find_architecture",
    "find_architectures",
    "groups_at",
    "hold",
    "join",
    "kind_of",
    "last_stack",
    "library_of",
    "matrices",
    "norm_before",
    "numeric_attributes",
    "open_model",
    "own_class",
    "own_keys",
    "positions_at",
    "positions_of",
    "prove",
    "register_architecture",
    "replace_forward",
    "share",
    "silencers",
    "sites_of",
    "weights",
]
