"""Visual tokens of masked-diffusion models: whether, where and when they can be left out."""

from lamella.methods.dmllm_token_redundancy.schedule import (
    Drop,
    Lengths,
    VisualTokenSchedule,
    Widths,
    count,
    flops,
    of_step,
)

__all__ = ["Drop", "Lengths", "VisualTokenSchedule", "Widths", "count", "flops", "of_step"]
