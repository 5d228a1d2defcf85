"""The projector between a vision tower and the text, which trains as a whole beside the adapters, at a rate of its own.

The paper does so for LLaVA. What lies inside the tower, as in Qwen2-VL, stays as it is with the tower.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lamella.stack import Stack
from lamella.train import TrainConfig, adamw


def projector_of(stack: Stack) -> str:
    """The name of the module that makes features of images into what the text reads; empty where there is none."""
    towers = [each.architecture for each in stack.stacks.values() if each.architecture.modality == "image"]
    return next((each.head for each in towers if each.head and not each.head.startswith(f"{each.base}.")), "")


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """Its parameters as they are now, apart from it."""
    return {name: each.detach().clone() for name, each in module.named_parameters()}


def two_rates(
    model: nn.Module, trained: Mapping[str, nn.Parameter], config: TrainConfig, *, projector: str, share: float
) -> torch.optim.Optimizer:
    """AdamW, by which the projector trains at a share of the rate of all else."""
    beside = {name: each for name, each in trained.items() if name.startswith(f"{projector}.")}
    rest = {name: each for name, each in trained.items() if name not in beside}
    slower = [group | {"lr": share} for group in adamw(model, beside, config).param_groups]
    return torch.optim.AdamW([*adamw(model, rest, config).param_groups, *slower], lr=1.0, betas=config.betas)
