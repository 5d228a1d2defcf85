"""RD-Prune: how much to prune in each layer, so that the output of the whole network moves least."""

from lamella.methods.rd_prune.curves import Curves, joint_distortion, rate_distortion, smallest, without
from lamella.methods.rd_prune.knapsack import Allocation, allocate
from lamella.methods.rd_prune.masked import Holding
from lamella.methods.rd_prune.method import (
    RULES,
    TRAINING,
    Amounts,
    allocate_by_curves,
    allocate_by_rule,
    masks_for,
    rd_prune,
)
from lamella.methods.rd_prune.rounds import prune_in_rounds

__all__ = [
    "RULES",
    "TRAINING",
    "Allocation",
    "Amounts",
    "Curves",
    "Holding",
    "allocate",
    "allocate_by_curves",
    "allocate_by_rule",
    "joint_distortion",
    "masks_for",
    "prune_in_rounds",
    "rate_distortion",
    "rd_prune",
    "smallest",
    "without",
]
