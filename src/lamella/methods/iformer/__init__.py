"""iFormer: convolution and pooling for high frequencies, attention for low ones, in shares that change with depth."""

from importlib.util import find_spec

from lamella.methods.iformer.album import Album
from lamella.methods.iformer.geometry import Geometry
from lamella.methods.iformer.measuring import convolved, fits, importance, spectra
from lamella.methods.iformer.method import applied, by_heads, compared, iformer, measured, plan
from lamella.methods.iformer.modules import Cost, Layer, LocalAttention, cost_of
from lamella.methods.iformer.network import BASE, LARGE, SMALL, InceptionMixer, InceptionTransformer, Shape
from lamella.methods.iformer.ramp import allocate, flat, mirrored, most_important
from lamella.methods.iformer.recipe import heal, train
from lamella.methods.iformer.result import Classifier, Ramped
from lamella.methods.iformer.spectra import Spectrum, spectrum
from lamella.methods.iformer.vision import Vision

if find_spec("timm"):
    from lamella.methods.iformer import backbone  # noqa: F401, registers iformer_small, _base and _large with timm

__all__ = [
    "BASE",
    "LARGE",
    "SMALL",
    "Album",
    "Classifier",
    "Cost",
    "Geometry",
    "InceptionMixer",
    "InceptionTransformer",
    "Layer",
    "LocalAttention",
    "Ramped",
    "Shape",
    "Spectrum",
    "Vision",
    "allocate",
    "applied",
    "by_heads",
    "compared",
    "convolved",
    "cost_of",
    "fits",
    "flat",
    "heal",
    "iformer",
    "importance",
    "measured",
    "mirrored",
    "most_important",
    "plan",
    "spectra",
    "spectrum",
    "train",
]
