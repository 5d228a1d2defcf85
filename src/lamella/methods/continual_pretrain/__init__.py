"""Continual pre-training: learn from new data at a full learning rate, and replay a little of the old."""

from lamella.methods.continual_pretrain.curves import Stream
from lamella.methods.continual_pretrain.method import continual_pretrain
from lamella.methods.continual_pretrain.pretrainer import TRAINING, ContinualPretrainer

__all__ = [
    "TRAINING",
    "ContinualPretrainer",
    "Stream",
    "continual_pretrain",
]
