"""What SwitchLoRA must be compared with: LoRA that is merged and begun anew, and gradients in a subspace.

ReLoRA (arXiv 2307.05695) merges its adapters every so many steps, draws new ones, forgets the optimizer's state, and
warms up again. GaLore (arXiv 2403.03507) keeps Adam's state for P^T G alone, P being the leading singular vectors of a
gradient, taken anew every so many steps; weights train whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lamella.train import Cosine, Hook, Lora, Schedule, TrainingRun
from lamella.train.lora import ADAPTER


@dataclass(frozen=True)
class Jagged(Schedule):
    """A cosine that warms up again after every restart.

    Attributes:
        whole: the cosine.
        every: steps from one restart to the next.
        again: steps of warming up again.
    """

    whole: Cosine
    every: int
    again: int

    def __call__(self, t: int) -> float:
        since = (t - 1) % self.every + 1
        return self.whole(t) * (min(1.0, since / self.again) if t > self.every else 1.0)


class ReLora(Hook):
    """Merges adapters every ``every`` steps and begins them anew; for weights that are the view's own.

    Args:
        lora: fresh adapters.
        every: steps from one restart to the next.
        seed: of the new halves.
    """

    def __init__(self, lora: Lora, every: int, seed: int) -> None:
        self.layers = [lora.view.get_submodule(name) for name in lora.modules]
        self.every, self.drawn = every, torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def after_step(self, run: TrainingRun) -> None:
        if run.step % self.every:
            return
        for layer in self.layers:
            a, b = (getattr(layer, f"lora_{half}")[ADAPTER].weight for half in "AB")
            product = layer.scaling[ADAPTER] * (b.float() @ a.float())
            layer.get_base_layer().weight.add_(product.T if layer.fan_in_fan_out else product)
            bound = 1 / math.sqrt(a.shape[1])  # Kaiming's, as peft begins
            a.copy_((2 * torch.rand(a.shape, generator=self.drawn) - 1) * bound)
            b.zero_()
            for each in (a, b):
                for value in run.optimizer.state.get(each, {}).values():
                    value.zero_()


class GaLore(torch.optim.Optimizer):
    """Adam on projected gradients.

    Args:
        groups: dictionaries with ``params``, ``lr`` and ``r``, the rank; None: plain Adam.
        gap: steps for which a projection stays.
        scale: of the projected updates.
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
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                step = state["step"] = state.get("step", 0) + 1
                gradient, back = parameter.grad, None
                if group["r"] is not None:
                    if (step - 1) % group["gap"] == 0:
                        state["basis"] = _basis(gradient, group["r"])
                    gradient, back = _projected(gradient, state["basis"])
                if "mean" not in state:
                    state["mean"], state["square"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
                first, second = group["betas"]
                mean = state["mean"].lerp_(gradient, 1 - first) / (1 - first**step)
                square = state["square"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
                update = mean / ((square / (1 - second**step)).sqrt() + 1e-8)
                whole = update if back is None else group["scale"] * back(update)
                parameter.sub_(group["lr"] * whole)
        return loss


def _basis(gradient: Tensor, r: int) -> Tensor:
    """The leading singular vectors of the shorter side [side, r]."""
    side = gradient if gradient.shape[0] <= gradient.shape[1] else gradient.T
    return torch.linalg.svd(side.float(), full_matrices=False)[0][:, :r].to(gradient.dtype)


def _projected(gradient: Tensor, basis: Tensor) -> tuple[Tensor, Any]:
    if gradient.shape[0] <= gradient.shape[1]:
        return basis.T @ gradient, lambda update: basis @ update
    return gradient @ basis, lambda update: update @ basis.T


def projected(model: nn.Module, trained: Any, config: Any, *, r: int, inside: str, rest: float) -> GaLore:
    """The optimizer factory: matrices whose names begin with ``inside`` are projected, the rest trains whole."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, each in trained.items():
        groups[each.ndim == 2 and name.startswith(inside)].append(each)
    return GaLore(
        [{"params": groups[True], "r": r, "lr": 1.0}, {"params": groups[False], "r": None, "lr": rest}],
        betas=config.betas,
    )
