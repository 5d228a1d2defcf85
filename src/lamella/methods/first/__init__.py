"""FiRST: trained routers read the prompt once and choose the layers that its answer runs."""

from lamella.methods.first.method import ROUTING, TRAINING, first, thresholds, train_routers, tune
from lamella.methods.first.policy import PromptRouters, buckets, signatures

__all__ = [
    "ROUTING",
    "TRAINING",
    "PromptRouters",
    "buckets",
    "first",
    "signatures",
    "thresholds",
    "train_routers",
    "tune",
]
