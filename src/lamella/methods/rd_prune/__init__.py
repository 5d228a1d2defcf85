"""RD-Prune: choose how many weights to prune in each layer so that the output of the whole network changes least."""

from lamella.methods.rd_prune.curves import Curves, joint_distortion, magnitude_order, rate_distortion, zero_at
from lamella.methods.rd_prune.knapsack import Allocation, allocate
from lamella.methods.rd_prune.masked import MaskHook
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
    "MaskHook",
    "allocate",
    "allocate_by_curves",
    "allocate_by_rule",
    "joint_distortion",
    "magnitude_order",
    "masks_for",
    "prune_in_rounds",
    "rate_distortion",
    "rd_prune",
    "zero_at",
]
