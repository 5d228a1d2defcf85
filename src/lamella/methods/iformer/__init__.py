"""iFormer: convolution and pooling for high frequencies, attention for low ones, with ratios that change with depth."""

from importlib.util import find_spec

from lamella.methods.iformer.album import Album
from lamella.methods.iformer.geometry import Geometry
from lamella.methods.iformer.measuring import convolution_replacement, fit_convolutions, importance, spectra
from lamella.methods.iformer.method import apply_plan, compare, costs_by_heads, iformer, measure_spectra, plan
from lamella.methods.iformer.modules import AttentionCost, LayerPlan, LocalAttention, cost_of
from lamella.methods.iformer.network import BASE, LARGE, SMALL, InceptionMixer, InceptionTransformer, StageShape
from lamella.methods.iformer.ramp import allocate, flat, mirrored, most_important
from lamella.methods.iformer.recipe import heal, train
from lamella.methods.iformer.result import IFormerClassifier, Ramped
from lamella.methods.iformer.spectra import Spectrum, spectrum
from lamella.methods.iformer.vision import Vision

if find_spec("timm"):
    from lamella.methods.iformer import backbone  # noqa: F401, registers iformer_small, _base and _large with timm

__all__ = [
    "BASE",
    "LARGE",
    "SMALL",
    "Album",
    "AttentionCost",
    "Geometry",
    "IFormerClassifier",
    "InceptionMixer",
    "InceptionTransformer",
    "LayerPlan",
    "LocalAttention",
    "Ramped",
    "Spectrum",
    "StageShape",
    "Vision",
    "allocate",
    "apply_plan",
    "compare",
    "convolution_replacement",
    "cost_of",
    "costs_by_heads",
    "fit_convolutions",
    "flat",
    "heal",
    "iformer",
    "importance",
    "measure_spectra",
    "mirrored",
    "most_important",
    "plan",
    "spectra",
    "spectrum",
    "train",
]
