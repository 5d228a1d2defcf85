"""Training: samples, losses, LoRA, and one thin layer over ``transformers.Trainer``.

A training job is four lines: choose what trains (:func:`own` or :func:`add_lora`), make samples, choose a loss, and
call :func:`fit`, which goes on by itself from where an earlier call was killed.
"""

from lamella.train.data import NO_LOSS, Sample, blocks, collate, pairs
from lamella.train.fit import fit
from lamella.train.healing import Healed, with_weights_of
from lamella.train.log import Point, TrainingLog
from lamella.train.lora import Lora, add_lora
from lamella.train.losses import (
    PROJECTION,
    cosine_distance,
    cross_entropy,
    distillation_loss,
    distilled_loss,
    forward_kl,
    logit_mse,
    projection,
    response_loss,
    scored_states,
)
from lamella.train.parameters import choose, own

__all__ = [
    "NO_LOSS",
    "PROJECTION",
    "Healed",
    "Lora",
    "Point",
    "Sample",
    "TrainingLog",
    "add_lora",
    "blocks",
    "choose",
    "collate",
    "cosine_distance",
    "cross_entropy",
    "distillation_loss",
    "distilled_loss",
    "fit",
    "forward_kl",
    "logit_mse",
    "own",
    "pairs",
    "projection",
    "response_loss",
    "scored_states",
    "with_weights_of",
]
