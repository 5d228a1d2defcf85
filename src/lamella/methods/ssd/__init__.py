"""SSD: forget some training data by dampening the weights that are important for it and for little else."""

from lamella.methods.ssd.damped import Dampening
from lamella.methods.ssd.judge import Forgetting, Responses, RetentionGuard, evaluate, membership, untrained_like, zrf
from lamella.methods.ssd.method import make_plan, ssd
from lamella.methods.ssd.percentile import percentile
from lamella.methods.ssd.selection import adaptive_alpha, dampen, dampening, importances, select_weights

__all__ = [
    "Dampening",
    "Forgetting",
    "Responses",
    "RetentionGuard",
    "adaptive_alpha",
    "dampen",
    "dampening",
    "evaluate",
    "importances",
    "make_plan",
    "membership",
    "percentile",
    "select_weights",
    "ssd",
    "untrained_like",
    "zrf",
]
