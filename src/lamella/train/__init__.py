"""Training: samples, losses, LoRA, and a thin layer over ``transformers.Trainer``.

A training job takes four lines: choose the trained parameters (:func:`own` or :func:`add_lora`), make samples, choose
a loss, and call :func:`fit`, which resumes where an earlier, interrupted call stopped:

    fit(view, samples, Task(response_loss), TrainConfig(steps=200, lr=1e-4), out="run")
"""

from lamella.data.samples import NO_LOSS, Sample, blocks, collate, pairs
from lamella.evaluate.scored import scored_states
from lamella.train.adapters import Adapter, concatenate, merge
from lamella.train.augmentation import Augmentation, AugmentedLoss
from lamella.train.config import ScheduleName, TrainConfig
from lamella.train.distil import check_vocabulary, distil
from lamella.train.fit import fit, fit_policy
from lamella.train.healing import with_modules_of, with_weights_of
from lamella.train.hooks import EarlyStopping, Hook, TrainingRun
from lamella.train.log import Logged, TrainingLog
from lamella.train.lora import Lora, add_lora, linear_at
from lamella.train.losses import (
    PROJECTION,
    cosine_distance,
    cross_entropy,
    diffusion_loss,
    distillation_loss,
    distilled_loss,
    dpo_loss,
    forward_kl,
    logit_mse,
    mean_loss,
    projection,
    response_loss,
)
from lamella.train.mixing import Feed, Order, Replay, ReplayedSample, past_mixture
from lamella.train.optimizers import adamw
from lamella.train.pace import TooLittleTime
from lamella.train.parameters import choose, own
from lamella.train.refit import refit
from lamella.train.schedules import (
    Constant,
    Cosine,
    Infinite,
    Schedule,
    StepDecay,
    constant,
    infinite,
    rewarm,
    step_decay,
    warmup_stable_decay,
)
from lamella.train.supervised import class_cross_entropy, squared_error, supervised
from lamella.train.task import Task, batching
from lamella.train.trained import Healed, Trained, TrainedEvidence

__all__ = [
    "NO_LOSS",
    "PROJECTION",
    "Adapter",
    "Augmentation",
    "AugmentedLoss",
    "Constant",
    "Cosine",
    "EarlyStopping",
    "Feed",
    "Healed",
    "Hook",
    "Infinite",
    "Logged",
    "Lora",
    "Order",
    "Replay",
    "ReplayedSample",
    "Sample",
    "Schedule",
    "ScheduleName",
    "StepDecay",
    "Task",
    "TooLittleTime",
    "TrainConfig",
    "Trained",
    "TrainedEvidence",
    "TrainingLog",
    "TrainingRun",
    "adamw",
    "add_lora",
    "batching",
    "blocks",
    "check_vocabulary",
    "choose",
    "class_cross_entropy",
    "collate",
    "concatenate",
    "constant",
    "cosine_distance",
    "cross_entropy",
    "diffusion_loss",
    "distil",
    "distillation_loss",
    "distilled_loss",
    "dpo_loss",
    "fit",
    "fit_policy",
    "forward_kl",
    "infinite",
    "linear_at",
    "logit_mse",
    "mean_loss",
    "merge",
    "own",
    "pairs",
    "past_mixture",
    "projection",
    "refit",
    "response_loss",
    "rewarm",
    "scored_states",
    "squared_error",
    "step_decay",
    "supervised",
    "warmup_stable_decay",
    "with_modules_of",
    "with_weights_of",
]
