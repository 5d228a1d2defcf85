"""IRepair: at every step, train only the layer that is most responsible for unwanted text."""

from lamella.methods.irepair.losses import repair_loss, utility_kl
from lamella.methods.irepair.method import irepair
from lamella.methods.irepair.pairs import ContinuationPair, Pairs, Triple, read_pair_file, read_pairs
from lamella.methods.irepair.recipe import BASELINES, TRAINING, RepairSettings, repair
from lamella.methods.irepair.sensitivity import gradients_of, layer_parameters, next_token_loss, norms_of, sensitivity
from lamella.methods.irepair.slices import BestSlices, Choices, SliceTraining, by_role, count_examples
from lamella.methods.irepair.utility import Utility

__all__ = [
    "BASELINES",
    "TRAINING",
    "BestSlices",
    "Choices",
    "ContinuationPair",
    "Pairs",
    "RepairSettings",
    "SliceTraining",
    "Triple",
    "Utility",
    "by_role",
    "count_examples",
    "gradients_of",
    "irepair",
    "layer_parameters",
    "next_token_loss",
    "norms_of",
    "read_pair_file",
    "read_pairs",
    "repair",
    "repair_loss",
    "sensitivity",
    "utility_kl",
]
