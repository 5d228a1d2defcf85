"""LayRA: add languages to a model by LoRA in its first and last layers."""

from lamella.methods.layra.arithmetic import Equipped, arithmetic, equip
from lamella.methods.layra.baselines import ArmResult, LanguageArm, arms, at_equal_loss, common_loss, follow
from lamella.methods.layra.comparison import ArmComparison, compare
from lamella.methods.layra.edges import Edges
from lamella.methods.layra.languages import Language, Matrix, average_ranks, measure
from lamella.methods.layra.method import Added, layra
from lamella.methods.layra.pivot import Pivots, pivot
from lamella.methods.layra.recipe import TRAINING, AdapterShape

__all__ = [
    "TRAINING",
    "AdapterShape",
    "Added",
    "ArmComparison",
    "ArmResult",
    "Edges",
    "Equipped",
    "Language",
    "LanguageArm",
    "Matrix",
    "Pivots",
    "arithmetic",
    "arms",
    "at_equal_loss",
    "average_ranks",
    "common_loss",
    "compare",
    "equip",
    "follow",
    "layra",
    "measure",
    "pivot",
]
