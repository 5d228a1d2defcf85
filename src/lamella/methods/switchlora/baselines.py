"""Baselines for SwitchLoRA: LoRA that is merged and restarted, and gradients in a subspace.

ReLoRA (arXiv 2307.05695) periodically merges its adapters, initialises new ones, resets the optimizer's state, and
warms up again. GaLore (arXiv 2403.03507) keeps Adam's state only for P^T G, where P contains the leading singular
vectors of a gradient and is recomputed periodically; all weights are trained.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lamella.methods.switchlora.switching import base_weights
from lamella.train import Cosine, Hook, Lora, Schedule, TrainingRun
from lamella.train.lora import ADAPTER


@dataclass(frozen=True)
class RestartedCosine(Schedule):
    """A cosine that warms up again after every restart.

    Attributes:
        cosine: the cosine.
        every: steps between restarts.
        rewarm: warm-up steps after a restart.
    """

    cosine: Cosine
    every: int
    rewarm: int

    def __call__(self, t: int) -> float:
        """Return the factor of the learning rate at step `t`."""
        since = (t - 1) % self.every + 1
        return self.cosine(t) * (min(1.0, since / self.rewarm) if t > self.every else 1.0)


class ReLora(Hook):
    """Merges adapters every ``every`` steps and re-initialises them; for weights owned by the view.

    Args:
        lora: new adapters.
        every: steps between restarts.
        seed: random seed of the new adapters.
    """

    def __init__(self, lora: Lora, every: int, seed: int) -> None:
        self.layers = [lora.view.get_submodule(name) for name in lora.modules]
        self.every, self.seed = every, seed
        self.changes = base_weights(lora)

    @torch.no_grad()
    def after_step(self, run: TrainingRun) -> None:
        """Merge and restart the adapters if it is time."""
        if run.step % self.every:
            return
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + run.step)  # the same in a resumed run
        for layer in self.layers:
            a, b = (getattr(layer, f"lora_{half}")[ADAPTER].weight for half in "AB")
            product = layer.scaling[ADAPTER] * (b.float() @ a.float())
            layer.get_base_layer().weight.add_(product.T if layer.fan_in_fan_out else product)
            bound = 1 / math.sqrt(a.shape[1])  # Kaiming-uniform, as in peft
            a.copy_((2 * torch.rand(a.shape, generator=generator) - 1) * bound)
            b.zero_()
            for each in (a, b):
                for value in run.optimizer.state.get(each, {}).values():
                    value.zero_()


class GaLore(torch.optim.Optimizer):
    """Adam on projected gradients.

    Args:
        groups: dictionaries with ``params``, ``lr`` and ``r``, the rank; None for plain Adam.
        lr: learning rate.
        betas: decay rates of the moments.
        gap: steps between updates of the projection.
        scale: factor of the projected updates.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        gap: int = 200,
        scale: float = 0.25,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "gap": gap, "scale": scale, "r": None})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Perform an optimizer step."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                step = state["step"] = state.get("step", 0) + 1
                gradient, restore = parameter.grad, None
                if group["r"] is not None:
                    if (step - 1) % group["gap"] == 0:
                        state["basis"] = _basis(gradient, group["r"])
                    gradient, restore = _project(gradient, state["basis"])
                if "mean" not in state:
                    state["mean"], state["square"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
                first, second = group["betas"]
                mean = state["mean"].lerp_(gradient, 1 - first) / (1 - first**step)
                square = state["square"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
                update = mean / ((square / (1 - second**step)).sqrt() + 1e-8)
                change = update if restore is None else group["scale"] * restore(update)
                parameter.sub_(group["lr"] * change)
        return loss


def _basis(gradient: Tensor, r: int) -> Tensor:
    """Return the leading singular vectors of the shorter side `[side, r]`."""
    side = gradient if gradient.shape[0] <= gradient.shape[1] else gradient.T
    return torch.linalg.svd(side.float(), full_matrices=False)[0][:, :r].to(gradient.dtype)


def _project(gradient: Tensor, basis: Tensor) -> tuple[Tensor, Any]:
    if gradient.shape[0] <= gradient.shape[1]:
        return basis.T @ gradient, lambda update: basis @ update
    return gradient @ basis, lambda update: update @ basis.T


def projected_optimizer(model: nn.Module, trained: Any, config: Any, *, r: int, inside: str, rest: float) -> GaLore:
    """Create the optimizer: matrices whose names begin with ``inside`` are projected, the rest is trained in full.

    Args:
        model: the model.
        trained: the parameters by name.
        config: the settings of the training.
        r: the rank of the projection.
        inside: the prefix of projected parameters.
        rest: the learning rate of the other parameters, relative to that of the projected ones.
    """
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, each in trained.items():
        groups[each.ndim == 2 and name.startswith(inside)].append(each)
    return GaLore(
        [{"params": groups[True], "r": r, "lr": 1.0}, {"params": groups[False], "r": None, "lr": rest}],
        betas=config.betas,
    )
