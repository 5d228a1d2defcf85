"""IRepair: at every step, repair only the layer that is most responsible for what a model shall not write."""

from lamella.methods.irepair.job import repair
from lamella.methods.irepair.method import BASELINES, irepair, repair_loss, utility_kl
from lamella.methods.irepair.sensitivity import gradient_norms, layer_parameters, next_token_loss, sensitivity
from lamella.methods.irepair.slices import Loop, Trace, fit_slices

__all__ = [
    "BASELINES",
    "Loop",
    "Trace",
    "fit_slices",
    "gradient_norms",
    "irepair",
    "layer_parameters",
    "next_token_loss",
    "repair",
    "repair_loss",
    "sensitivity",
    "utility_kl",
]
