"""SSD: forget some training data by dampening the weights that matter to them and to little else."""

from lamella.methods.ssd.damped import Dampening
from lamella.methods.ssd.judge import Forgetting, Guard, Responses, answers, membership, untrained_like, zrf
from lamella.methods.ssd.method import scaled, ssd
from lamella.methods.ssd.percentile import percentile
from lamella.methods.ssd.selection import adaptive_alpha, dampen, dampening, importances, selected

__all__ = [
    "Dampening",
    "Forgetting",
    "Guard",
    "Responses",
    "adaptive_alpha",
    "answers",
    "dampen",
    "dampening",
    "importances",
    "membership",
    "percentile",
    "scaled",
    "selected",
    "ssd",
    "untrained_like",
    "zrf",
]
