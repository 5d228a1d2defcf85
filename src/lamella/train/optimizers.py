"""Optimizers of a run and their parameter groups.

    def by_layer(model, trained, config):
        return torch.optim.RMSprop([{"params": [each], "lr": 0.5} for each in trained.values()], lr=1.0)

A factory gets the model, the trained parameters and the run's config. The learning rates of its groups are multiples of
the run's, which the schedule then changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.trainer_pt_utils import get_parameter_names

from lamella.errors import TrainingError
from lamella.train.config import TrainConfig

Factory = Callable[[nn.Module, Mapping[str, nn.Parameter], TrainConfig], torch.optim.Optimizer]

OPTIMIZER = "optimizer.pt"  # as Trainer names it
UNDECAYED = ("bias", "layernorm", "rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)")  # as Trainer chooses them


def adamw(model: nn.Module, trained: Mapping[str, nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """Create AdamW with the config's betas; weight decay applies only to weight matrices, not to biases or norms.

    It uses PyTorch's fused implementation, which is faster on a CPU, too.

    Args:
        model: the model, whose modules tell which parameters belong to norms.
        trained: the trained parameters by name.
        config: gives ``betas`` and ``weight_decay``; the learning rate is 1, to be multiplied by that of the schedule.
    """
    names = get_parameter_names(model, [nn.LayerNorm], UNDECAYED)
    decayed = {name for name in names if name in trained and trained[name].ndim > 1}
    groups = [
        {"params": [each for name, each in trained.items() if name in decayed], "weight_decay": config.weight_decay},
        {"params": [each for name, each in trained.items() if name not in decayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1.0, betas=config.betas, fused=True)


def factory_name(factory: Factory) -> str:
    """Return the name of a factory for records."""
    function: Any = factory.func if isinstance(factory, partial) else factory
    return str(getattr(function, "__qualname__", type(function).__qualname__))


def state_of(run: Path) -> Path:
    """Return the file of the optimizer state in the newest checkpoint of a finished run.

    Raises:
        TrainingError: if there is none.
    """
    checkpoints = sorted(run.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    if not checkpoints or not (checkpoints[-1] / OPTIMIZER).exists():
        raise TrainingError(f"{run} contains no checkpoint with an optimizer state: give the folder of a finished run")
    return checkpoints[-1] / OPTIMIZER


def load_optimizer_state(file: Path, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Load the state of an earlier optimizer, such as its moments; parameter groups and learning rates stay.

    Args:
        file: the saved state.
        optimizer: the optimizer, changed in place.
        device: device of the loaded tensors.

    Raises:
        TrainingError: if it belongs to other parameters.
    """
    state = torch.load(file, map_location=device, weights_only=True)["state"]
    ours = [each.shape for group in optimizer.param_groups for each in group["params"]]
    for index, values in state.items():
        shapes = {value.shape for value in values.values() if isinstance(value, torch.Tensor) and value.ndim > 0}
        if index >= len(ours) or shapes - {ours[index]}:
            raise TrainingError(f"{file} is the optimizer state of other parameters: train the same ones")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
