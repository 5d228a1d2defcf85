"""Hourglass MLP: a wide skip around narrow hidden layers."""

from lamella.methods.hourglass_mlp.fitting import FitResult, fit_part
from lamella.methods.hourglass_mlp.frontier import MLPShape, ShapeGrid, frontier, psnr
from lamella.methods.hourglass_mlp.method import hourglass_mlp, sensitivity
from lamella.methods.hourglass_mlp.modules import HourglassSublayer
from lamella.methods.hourglass_mlp.network import FrozenLift, HourglassFFN, HourglassMLP, Size, inner_widths, size_of
from lamella.methods.hourglass_mlp.recipe import heal
from lamella.methods.hourglass_mlp.vectors import Vectors

__all__ = [
    "FitResult",
    "FrozenLift",
    "HourglassFFN",
    "HourglassMLP",
    "HourglassSublayer",
    "MLPShape",
    "ShapeGrid",
    "Size",
    "Vectors",
    "fit_part",
    "frontier",
    "heal",
    "hourglass_mlp",
    "inner_widths",
    "psnr",
    "sensitivity",
    "size_of",
]
