"""MuE: three exits, for image, text and each written word; see :mod:`lamella.methods.mue.method`."""

from lamella.methods.mue.method import mue, saturation, thresholds
from lamella.methods.mue.policy import OFF, StreamExits, TokenExits, decayed
from lamella.methods.mue.recipe import Exiting, exiting, layerwise_loss, planned, train
from lamella.methods.mue.reduction import Exits, Work, by_flops, by_layers, histograms, observed, quantiles
from lamella.methods.mue.search import Tried, chosen, complete, front, searched

__all__ = [
    "OFF",
    "Exiting",
    "Exits",
    "StreamExits",
    "TokenExits",
    "Tried",
    "Work",
    "by_flops",
    "by_layers",
    "chosen",
    "complete",
    "decayed",
    "exiting",
    "front",
    "histograms",
    "layerwise_loss",
    "mue",
    "observed",
    "planned",
    "quantiles",
    "saturation",
    "searched",
    "thresholds",
    "train",
]
