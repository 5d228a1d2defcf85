"""Optimizers over decisions. They know nothing of models."""

from lamella.search.balanced import balanced, window
from lamella.search.greedy import Cost, Removal, greedy, lazy_greedy, one_shot, swap

__all__ = ["Cost", "Removal", "balanced", "greedy", "lazy_greedy", "one_shot", "swap", "window"]
