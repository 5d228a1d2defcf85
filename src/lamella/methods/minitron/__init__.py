"""Minitron: prune width and depth in one shot by the size of activations, then re-train by distillation alone."""

from lamella.methods.minitron.activations import Importance, activation_importance
from lamella.methods.minitron.contest import Contest, contest
from lamella.methods.minitron.method import Ranking, TargetSizes, minitron, rank, trim
from lamella.methods.minitron.recipe import TRAINING
from lamella.methods.minitron.shapes import enumerate_shapes
from lamella.methods.minitron.space import ModelShape, ShapeSpace

__all__ = [
    "TRAINING",
    "Contest",
    "Importance",
    "ModelShape",
    "Ranking",
    "ShapeSpace",
    "TargetSizes",
    "activation_importance",
    "contest",
    "enumerate_shapes",
    "minitron",
    "rank",
    "trim",
]
