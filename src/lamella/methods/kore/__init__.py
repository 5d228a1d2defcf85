"""KORE: add new knowledge to a model along directions that its old inputs do not excite."""

from lamella.methods.kore.augment import augment
from lamella.methods.kore.covariance import Covariance, equal_rank, input_covariance, normalised
from lamella.methods.kore.items import Item, Knowledge
from lamella.methods.kore.method import TRAINING, Constraint, kore, weight_of
from lamella.methods.kore.nullspace import LowRankFactors, factors, null_basis
from lamella.methods.kore.tree import ConversationTurn, Templates, Tree

__all__ = [
    "TRAINING",
    "Constraint",
    "ConversationTurn",
    "Covariance",
    "Item",
    "Knowledge",
    "LowRankFactors",
    "Templates",
    "Tree",
    "augment",
    "equal_rank",
    "factors",
    "input_covariance",
    "kore",
    "normalised",
    "null_basis",
    "weight_of",
]
