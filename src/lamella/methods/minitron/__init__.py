"""Minitron: prune width and depth by activations, all at once, then train back by distillation alone."""

from lamella.methods.minitron.activations import Importance, activation_importance
from lamella.methods.minitron.contest import contest
from lamella.methods.minitron.method import Ranking, Wanted, minitron, rank, trim
from lamella.methods.minitron.recipe import TRAINING
from lamella.methods.minitron.shapes import enumerate_shapes
from lamella.methods.minitron.space import Shape, Space

__all__ = [
    "TRAINING",
    "Importance",
    "Ranking",
    "Shape",
    "Space",
    "Wanted",
    "activation_importance",
    "contest",
    "enumerate_shapes",
    "minitron",
    "rank",
    "trim",
]
