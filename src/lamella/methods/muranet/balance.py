"""Balance of two losses over shared stages: their weights, gradient clipping per task, and gradient agreement.

    L = w_walls L_walls + w_openings L_openings

    fixed          w as given
    uncertainty    w_t = exp(-s_t), and log(1 + exp(s_t)) is added; s_t is learned (the form of CubiCasa5K's code)
    gradnorm       w_t so that the gradients of both tasks on the last shared stage have one norm, times the relative
                   loss of each task to the power of alpha (Chen et al., 2018)

The relevant quantity is the norm of the gradients that reach the shared stages: where that of one task is much larger,
a clip of the sum leaves little for the other. So each task's gradient can be clipped before they are added. The norm of
each task's gradient and the cosine between both are logged for every shared stage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import softplus

from lamella.errors import MethodError
from lamella.methods.muranet.modules import PlanNetwork
from lamella.train import Hook, TrainingRun

TASKS = ("walls", "openings")
Kind = Literal["fixed", "uncertainty", "gradnorm"]
LEAST = 1e-3  # lower bound of a weight with gradnorm
TINY = 1e-12


@dataclass(frozen=True)
class LossBalance:
    """Weights and clipping of the two losses.

    Attributes:
        weighting: ``fixed`` weights, ``uncertainty`` or ``gradnorm``.
        wall_weight: weight of the wall loss; the initial one with ``gradnorm``, unused with ``uncertainty``.
        opening_weight: weight of the opening loss; the initial one with ``gradnorm``, unused with ``uncertainty``.
        clip_each: maximum norm of each task's own gradient, in each forward pass; no clipping if None.
        alpha: with ``gradnorm``, how strongly a slower task is weighted up.
        pace: with ``gradnorm``, the learning rate of the weights; 0.025 in the paper.
        look_every: number of steps between two measurements of gradients; ``gradnorm`` measures in each step.
    """

    weighting: Kind = "fixed"
    wall_weight: Annotated[float, Gt(0)] = 10.0
    opening_weight: Annotated[float, Gt(0)] = 1.0
    clip_each: Annotated[float, Gt(0)] | None = None
    alpha: Annotated[float, Ge(0)] = 1.5
    pace: Annotated[float, Gt(0)] = 0.025
    look_every: Annotated[int, Ge(1)] = 10

    @property
    def first(self) -> dict[str, float]:
        """The initial weight of each task."""
        weights = (1.0, 1.0) if self.weighting == "uncertainty" else (self.wall_weight, self.opening_weight)
        return dict(zip(TASKS, weights, strict=True))


class WeightedNetwork(nn.Module):
    """A network with the weights of its two losses.

    Args:
        network: the network to train.
        balance: balance of its losses.

    Raises:
        MethodError: for ``gradnorm`` if the tasks share no stage.
    """

    weights: Tensor

    def __init__(self, network: PlanNetwork, balance: LossBalance) -> None:
        super().__init__()
        self.network, self.learned = network, balance.weighting == "uncertainty"
        self.register_buffer("weights", torch.tensor([balance.wall_weight, balance.opening_weight]))
        self.s = nn.Parameter(torch.zeros(2), requires_grad=self.learned)
        if balance.weighting == "gradnorm" and not shared_stages(network):
            raise MethodError(
                "gradnorm compares gradients on a shared trainable stage, and there is none: share a stage"
            )
        self.to(network.encoder.mean.device)

    def weight(self, task: str) -> Tensor:
        """Return the current weight of a task."""
        index = TASKS.index(task)
        return (-self.s[index]).exp() if self.learned else self.weights[index]

    def total(self, losses: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted loss of both tasks, or of the only one."""
        found = torch.stack([self.weight(task) * loss for task, loss in losses.items()]).sum()
        if self.learned:
            found = found + torch.stack([softplus(self.s[TASKS.index(task)]) for task in losses]).sum()
        return found


def shared_stages(network: PlanNetwork) -> dict[int, list[nn.Parameter]]:
    """Return the trainable parameters of each stage that both tasks share, by its index."""
    if network.walls is None or network.openings is None:
        return {}
    stages = network.encoder.stages[: network.encoder.shared]
    found = {index: [each for each in stage.parameters() if each.requires_grad] for index, stage in enumerate(stages)}
    return {index: parameters for index, parameters in found.items() if parameters}


def gradients(loss: Tensor, stages: Mapping[int, Sequence[nn.Parameter]]) -> dict[int, Tensor]:
    """Return the gradient of a loss with respect to each stage, flattened to a vector; the graph is retained.

    Args:
        loss: the loss, a scalar.
        stages: parameters of each stage, by its index.
    """
    every = [each for parameters in stages.values() for each in parameters]
    found = iter(torch.autograd.grad(loss, every, retain_graph=True, materialize_grads=True))
    return {index: torch.cat([next(found).flatten() for _ in of_stage]) for index, of_stage in stages.items()}


def agreement(ours: Mapping[int, Tensor], theirs: Mapping[int, Tensor]) -> Tensor:
    """Compare the gradients of two tasks: for each stage, both norms and the cosine between them [stages, 3].

    Args:
        ours: gradient of one task, by stage.
        theirs: gradient of the other task, by stage.
    """
    rows = []
    for index, a in ours.items():
        b = theirs[index]
        rows.append(torch.stack([a.norm(), b.norm(), a @ b / (a.norm() * b.norm()).clamp(min=TINY)]))
    return torch.stack(rows)


class BalanceHook(Hook):
    """Hook that applies a balance: clips each task, measures gradients, and updates the weights of ``gradnorm``.

    Args:
        model: the network with its loss weights.
        balance: balance of its losses.
    """

    FILE = "balance.safetensors"

    def __init__(self, model: WeightedNetwork, balance: LossBalance) -> None:
        self.model, self.balance = model, balance
        self.stages = shared_stages(model.network)
        self.first: Tensor | None = None  # the losses of the first step with gradnorm
        self.moments = torch.zeros(2, 2)  # of Adam
        self.looks = False
        self.measured: list[tuple[Tensor, Tensor]] = []  # losses and agreement of each batch of a step

    def passes(self, forward: Callable[[Any], Any], batch: Any, backward: Callable[..., None]) -> Any:
        """Run one forward and one backward pass, and measure the gradients of each task in between.

        Args:
            forward: returns the loss of a batch and its parts, among them the loss of each task.
            batch: the batch.
            backward: computes gradients from a loss.
        """
        loss, parts = forward(batch)
        losses = {task: parts[task] for task in TASKS if task in parts}
        if self.looks and len(losses) == 2 and self.stages:
            ours, theirs = (gradients(each, self.stages) for each in losses.values())
            self.measured.append((torch.stack([*losses.values()]).detach(), agreement(ours, theirs)))
        most = self.balance.clip_each
        backward(loss if most is None else loss + self._clipped(losses, most))
        return loss, parts

    def _clipped(self, losses: Mapping[str, Tensor], most: float) -> Tensor:
        """Return the term to add to the loss so that no task's gradient exceeds the maximum norm."""
        trained = [each for each in self.model.network.parameters() if each.requires_grad]
        terms = []
        for task, loss in losses.items():
            weighted = self.model.weight(task).detach() * loss
            each = torch.autograd.grad(weighted, trained, retain_graph=True, allow_unused=True)
            norm = torch.nn.utils.get_total_norm([g for g in each if g is not None])
            terms.append((most / norm.clamp(min=TINY)).clamp(max=1) * weighted - weighted)
        return torch.stack(terms).sum()

    def before_step(self, run: TrainingRun) -> None:
        """Decide whether gradients are measured in this step."""
        self.looks = self.balance.weighting == "gradnorm" or run.step % self.balance.look_every == 0

    def before_update(self, run: TrainingRun) -> None:
        """Log the measurements of a step, and update the weights of ``gradnorm``."""
        if not self.measured:
            return
        losses, rows = run.weigh([each for each, _ in self.measured]), run.weigh([each for _, each in self.measured])
        self.measured = []
        for index, row in zip(self.stages, rows, strict=True):
            for name, value in zip((*(f"gradient of {task}" for task in TASKS), "cosine"), row, strict=True):
                run.note(f"{name}, stage {index}", value)
        if self.balance.weighting == "gradnorm":
            self._move(losses, rows[-1, :2], run.step)
        for task in TASKS:
            run.note(f"weight of {task}", self.model.weight(task))

    @torch.no_grad()
    def _move(self, losses: Tensor, norms: Tensor, step: int) -> None:
        """Take a step of Adam on sum_t |w_t g_t - mean * r_t^alpha|, then rescale the weights to their former sum."""
        weights = self.model.weights
        self.first = losses.clone() if self.first is None else self.first
        relative = losses / self.first.clamp(min=TINY)
        targets = (weights * norms).mean() * (relative / relative.mean()) ** self.balance.alpha
        slope = (weights * norms - targets).sign() * norms
        moments = self.moments.to(weights.device)
        moments[0].lerp_(slope, 0.1)
        moments[1].lerp_(slope.square(), 0.001)
        mean, square = moments[0] / (1 - 0.9 ** (step + 1)), moments[1] / (1 - 0.999 ** (step + 1))
        self.moments, total = moments, weights.sum()
        moved = (weights - self.balance.pace * mean / (square.sqrt() + 1e-8)).clamp(min=LEAST)
        weights.copy_(moved * total / moved.sum())

    def save(self, folder: Path) -> None:
        """Save the weights, the moments of Adam and the first losses."""
        state = {"weights": self.model.weights, "moments": self.moments}
        save_file(state | ({} if self.first is None else {"first": self.first}), folder / self.FILE)

    def load(self, folder: Path) -> None:
        """Load the state that :meth:`save` wrote."""
        state = load_file(folder / self.FILE)
        self.model.weights.copy_(state["weights"])
        first = state.get("first")
        self.moments, self.first = state["moments"], None if first is None else first.to(self.model.weights.device)
