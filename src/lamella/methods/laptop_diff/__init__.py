"""LAPTOP-Diff: prune whole blocks of diffusion models, chosen by a knapsack solver, and heal by distillation."""

from lamella.methods.laptop_diff.cut import convert, modelling_file, natural_form
from lamella.methods.laptop_diff.denoiser import Denoiser
from lamella.methods.laptop_diff.judge import EvaluationSettings, evaluate_networks, generate_images
from lamella.methods.laptop_diff.knapsack import Choice, covering, greedy
from lamella.methods.laptop_diff.method import ScoringSettings, heal, laptop_diff
from lamella.methods.laptop_diff.recipe import (
    PROBES,
    DistillationLoss,
    LossWeights,
    balance_loss,
    distil,
    encode_samples,
    match_stages,
    stages,
)
from lamella.methods.laptop_diff.result import PrunedDenoiser
from lamella.methods.laptop_diff.scores import (
    BlockScores,
    additivity,
    joint,
    magnitudes,
    measure_blocks,
    random_sets,
    taylor,
)
from lamella.methods.laptop_diff.tuples import Tuples, error, predictions, targets

__all__ = [
    "PROBES",
    "BlockScores",
    "Choice",
    "Denoiser",
    "DistillationLoss",
    "EvaluationSettings",
    "LossWeights",
    "PrunedDenoiser",
    "ScoringSettings",
    "Tuples",
    "additivity",
    "balance_loss",
    "convert",
    "covering",
    "distil",
    "encode_samples",
    "error",
    "evaluate_networks",
    "generate_images",
    "greedy",
    "heal",
    "joint",
    "laptop_diff",
    "magnitudes",
    "match_stages",
    "measure_blocks",
    "modelling_file",
    "natural_form",
    "predictions",
    "random_sets",
    "stages",
    "targets",
    "taylor",
]
