"""SMoRA: one adapter for many tasks, in which every rank is an expert."""

from lamella.methods.smora.balancing import LoadBalance
from lamella.methods.smora.examples import TaskExamples, with_prompts
from lamella.methods.smora.method import TRAINING, ExpertSettings, smora, trains
from lamella.methods.smora.modules import KERNELS, RankExperts, Route, choose, dense, sparse
from lamella.methods.smora.usage import Usage

__all__ = [
    "KERNELS",
    "TRAINING",
    "ExpertSettings",
    "LoadBalance",
    "RankExperts",
    "Route",
    "TaskExamples",
    "Usage",
    "choose",
    "dense",
    "smora",
    "sparse",
    "trains",
    "with_prompts",
]
