"""LoRA recycling: whether to merge other people's adapters for a task, or to train one's own."""

from lamella.data import Examples
from lamella.methods.lora_recycling.baselines import Merged, merge, updates
from lamella.methods.lora_recycling.choosing import closeness, cosine, inner, norm
from lamella.methods.lora_recycling.controls import randomised
from lamella.methods.lora_recycling.judge import Judged
from lamella.methods.lora_recycling.merging import EntryMerge, average, core, tsv
from lamella.methods.lora_recycling.method import lora_recycling
from lamella.methods.lora_recycling.modules import Mixture, attach, groups
from lamella.methods.lora_recycling.pool import Members, Pool
from lamella.methods.lora_recycling.recipe import (
    FITTING,
    Best,
    Mixing,
    Target,
    adaptive,
    lorahub,
    mixture,
    pi_tuning,
    target_lora,
)
from lamella.methods.lora_recycling.result import Recycled, Verdict
from lamella.methods.lora_recycling.trial import Arm, Splits, Trial

__all__ = [
    "FITTING",
    "Arm",
    "Best",
    "EntryMerge",
    "Examples",
    "Judged",
    "Members",
    "Merged",
    "Mixing",
    "Mixture",
    "Pool",
    "Recycled",
    "Splits",
    "Target",
    "Trial",
    "Verdict",
    "adaptive",
    "attach",
    "average",
    "closeness",
    "core",
    "cosine",
    "groups",
    "inner",
    "lora_recycling",
    "lorahub",
    "merge",
    "mixture",
    "norm",
    "pi_tuning",
    "randomised",
    "target_lora",
    "tsv",
    "updates",
]
