"""Visual token redundancy of masked-diffusion models: whether, where and when image tokens can be dropped."""

from lamella.methods.dmllm_token_redundancy.method import (
    dmllm_token_redundancy,
    plan,
    plan_of,
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
    LayerWidths,
    RequestLengths,
    VisualTokenSchedule,
    count,
    flops,
    of_step,
)

__all__ = [
    "Drop",
    "LayerWidths",
    "RequestLengths",
    "Trajectory",
    "VisualTokenSchedule",
    "attention_mass",
    "count",
    "dmllm_token_redundancy",
    "flops",
    "follow",
    "information_loss",
    "of_step",
    "plan",
    "plan_of",
    "recommend",
    "recovers",
    "restoration",
    "settings",
    "text_of",
]
