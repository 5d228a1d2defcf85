"""LAPTOP-Diff: diffusion models made smaller by whole blocks, chosen by a knapsack, and healed by distillation."""

from lamella.methods.laptop_diff.cut import formed, modelling_file, natural_form
from lamella.methods.laptop_diff.denoiser import Denoiser
from lamella.methods.laptop_diff.judge import Judging, drawn, judged
from lamella.methods.laptop_diff.knapsack import Choice, covering, greedy
from lamella.methods.laptop_diff.method import Measuring, heal, laptop_diff
from lamella.methods.laptop_diff.recipe import (
    PROBES,
    Distillation,
    Weights,
    balanced,
    distil,
    encoded,
    matched,
    stages,
)
from lamella.methods.laptop_diff.result import Pruned
from lamella.methods.laptop_diff.scores import Scores, additivity, joint, magnitudes, measured, random_sets, taylor
from lamella.methods.laptop_diff.tuples import Tuples, error, predictions, targets

__all__ = [
    "PROBES",
    "Choice",
    "Denoiser",
    "Distillation",
    "Judging",
    "Measuring",
    "Pruned",
    "Scores",
    "Tuples",
    "Weights",
    "additivity",
    "balanced",
    "covering",
    "distil",
    "drawn",
    "encoded",
    "error",
    "formed",
    "greedy",
    "heal",
    "joint",
    "judged",
    "laptop_diff",
    "magnitudes",
    "matched",
    "measured",
    "modelling_file",
    "natural_form",
    "predictions",
    "random_sets",
    "stages",
    "targets",
    "taylor",
]
