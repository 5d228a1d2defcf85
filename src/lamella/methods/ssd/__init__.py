"""SSD: forget some training data by dampening the weights that matter to them and to little else."""

from lamella.methods.ssd.judge import Answers, Forgetting, Guard, answers, membership, untrained_like, zrf
from lamella.methods.ssd.method import adaptive_alpha, dampen, dampening, importances, selected, ssd
from lamella.methods.ssd.page import render_forgetting
from lamella.methods.ssd.percentile import percentile
from lamella.methods.ssd.summary import Dampening

__all__ = [
    "Answers",
    "Dampening",
    "Forgetting",
    "Guard",
    "adaptive_alpha",
    "answers",
    "dampen",
    "dampening",
    "importances",
    "membership",
    "percentile",
    "render_forgetting",
    "selected",
    "ssd",
    "untrained_like",
    "zrf",
]
