"""The projector between a vision tower and the text model, which is trained in full at its own learning rate.

The paper does so for LLaVA. A projector inside the tower, as in Qwen2-VL, stays frozen with the tower.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lamella.stack import Stack
from lamella.train import TrainConfig, adamw


def projector_of(stack: Stack) -> str:
    """Name of the module that converts image features into inputs of the text model; empty if there is none."""
    towers = [each.architecture for each in stack.stacks.values() if each.architecture.modality == "image"]
    return next((each.head for each in towers if each.head and not each.head.startswith(f"{each.base}.")), "")


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """A detached copy of the module's parameters."""
    return {name: each.detach().clone() for name, each in module.named_parameters()}


def two_rates(
    model: nn.Module, trained: Mapping[str, nn.Parameter], config: TrainConfig, *, projector: str, share: float
) -> torch.optim.Optimizer:
    """Create an AdamW optimizer with a lower learning rate for the projector.

    Args:
        model: the model.
        trained: the trained parameters by name.
        config: training settings.
        projector: name of the projector.
        share: learning rate of the projector, relative to the others.
    """
    inside = {name: each for name, each in trained.items() if name.startswith(f"{projector}.")}
    rest = {name: each for name, each in trained.items() if name not in inside}
    slower = [group | {"lr": share} for group in adamw(model, inside, config).param_groups]
    return torch.optim.AdamW([*adamw(model, rest, config).param_groups, *slower], lr=1.0, betas=config.betas)
