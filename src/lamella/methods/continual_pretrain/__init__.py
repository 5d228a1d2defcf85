"""Continual pre-training: train on new data at a full learning rate while replaying a fraction of the old data."""

from lamella.methods.continual_pretrain.curves import ContinualDataset
from lamella.methods.continual_pretrain.method import continual_pretrain
from lamella.methods.continual_pretrain.pretrainer import TRAINING, ContinualPretrainer

__all__ = [
    "TRAINING",
    "ContinualDataset",
    "ContinualPretrainer",
    "continual_pretrain",
]
