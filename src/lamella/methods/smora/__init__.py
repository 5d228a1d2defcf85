"""SMoRA: one adapter for many tasks, whose every rank is an expert of its own."""

from lamella.methods.smora.balancing import Balance
from lamella.methods.smora.examples import TaskExamples, with_prompts
from lamella.methods.smora.method import TRAINING, Experts, smora, trains
from lamella.methods.smora.modules import KERNELS, RankExperts, Route, choose, dense, sparse
from lamella.methods.smora.usage import Usage

__all__ = [
    "KERNELS",
    "TRAINING",
    "Balance",
    "Experts",
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
