"""Optimizers over decisions, which know nothing of models."""

from lamella.search.greedy import Clock, Cost, Removal, greedy, lazy_greedy, one_shot, swap
from lamella.search.journal import Memo, Removals, take
from lamella.search.pareto import pareto
from lamella.search.thresholds import rising, threshold
from lamella.search.window import window

__all__ = [
    "Clock",
    "Cost",
    "Memo",
    "Removal",
    "Removals",
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
