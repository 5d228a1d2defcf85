"""KORE: put new knowledge into a model along directions that its old inputs do not excite."""

from lamella.methods.kore.covariance import Covariance, equal_rank, input_covariance, normalised
from lamella.methods.kore.method import TRAINING, Constraint, kore, weight_of
from lamella.methods.kore.nullspace import Factors, factors, null_basis

__all__ = [
    "TRAINING",
    "Constraint",
    "Covariance",
    "Factors",
    "equal_rank",
    "factors",
    "input_covariance",
    "kore",
    "normalised",
    "null_basis",
    "weight_of",
]
