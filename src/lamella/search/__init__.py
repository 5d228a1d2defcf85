"""Optimizers over decisions. They know nothing of models."""

from lamella.search.allocate import Allocation, allocate
from lamella.search.balanced import balanced, window
from lamella.search.greedy import Clock, Cost, Removal, greedy, lazy_greedy, one_shot, swap
from lamella.search.journal import Memo, Removals, take
from lamella.search.pareto import pareto
from lamella.search.thresholds import rising, threshold

__all__ = [
    "Allocation",
    "Clock",
    "Cost",
    "Memo",
    "Removal",
    "Removals",
    "allocate",
    "balanced",
    "greedy",
    "lazy_greedy",
    "one_shot",
    "pareto",
    "rising",
    "swap",
    "take",
    "threshold",
    "window",
]
