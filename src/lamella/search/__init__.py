"""Optimizers over decisions. They know nothing of models."""

from lamella.search.allocate import Allocation, allocate
from lamella.search.balanced import balanced, window
from lamella.search.greedy import Cost, Removal, greedy, lazy_greedy, one_shot, swap
from lamella.search.journal import Journal

__all__ = [
    "Allocation",
    "Cost",
    "Journal",
    "Removal",
    "allocate",
    "balanced",
    "greedy",
    "lazy_greedy",
    "one_shot",
    "swap",
    "window",
]
