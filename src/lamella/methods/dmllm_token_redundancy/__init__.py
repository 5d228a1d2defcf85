"""Visual tokens of masked-diffusion models: whether, where and when they can be left out."""

from lamella.methods.dmllm_token_redundancy.method import (
    dmllm_token_redundancy,
    plan,
    planned,
    recommend,
    recovers,
    settings,
    text_of,
)
from lamella.methods.dmllm_token_redundancy.probe import (
    Trajectory,
    attention_mass,
    follow,
    information_loss,
    restoration,
)
from lamella.methods.dmllm_token_redundancy.schedule import (
    Drop,
    Lengths,
    VisualTokenSchedule,
    Widths,
    count,
    flops,
    of_step,
)

__all__ = [
    "Drop",
    "Lengths",
    "Trajectory",
    "VisualTokenSchedule",
    "Widths",
    "attention_mass",
    "count",
    "dmllm_token_redundancy",
    "flops",
    "follow",
    "information_loss",
    "of_step",
    "plan",
    "planned",
    "recommend",
    "recovers",
    "restoration",
    "settings",
    "text_of",
]
