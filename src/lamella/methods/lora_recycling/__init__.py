"""LoRA recycling: decide between merging existing adapters for a task and training a new one."""

from lamella.data import Examples
from lamella.methods.lora_recycling.baselines import Merged, merge, updates
from lamella.methods.lora_recycling.choosing import closeness, cosine, inner, norm
from lamella.methods.lora_recycling.controls import randomise
from lamella.methods.lora_recycling.judge import AnswerScores
from lamella.methods.lora_recycling.merging import EntryMerge, average, core, tsv
from lamella.methods.lora_recycling.method import lora_recycling
from lamella.methods.lora_recycling.modules import AdapterMixture, attach, groups
from lamella.methods.lora_recycling.pool import AdapterPool, Members
from lamella.methods.lora_recycling.recipe import (
    FITTING,
    Mixing,
    Target,
    adaptive,
    lorahub,
    mixture,
    pi_tuning,
    target_lora,
)
from lamella.methods.lora_recycling.result import MergeVerdict, Recycled
from lamella.methods.lora_recycling.trial import TaskSplits, Trial, TrialArm

__all__ = [
    "FITTING",
    "AdapterMixture",
    "AdapterPool",
    "AnswerScores",
    "EntryMerge",
    "Examples",
    "Members",
    "MergeVerdict",
    "Merged",
    "Mixing",
    "Recycled",
    "Target",
    "TaskSplits",
    "Trial",
    "TrialArm",
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
    "randomise",
    "target_lora",
    "tsv",
    "updates",
]
