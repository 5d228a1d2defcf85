"""Two losses over shared stages: what each counts, how far its gradient may reach, and how far the two agree.

    L = w_walls L_walls + w_openings L_openings

    fixed          w as given
    uncertainty    w_t = exp(-s_t), and log(1 + exp(s_t)) is added; s_t is learnt (the form of CubiCasa5K's code)
    gradnorm       w_t so that the gradients of all tasks on the last shared stage are of one size, times how far each
                   is behind in learning to the power of alpha (Chen et al., 2018)

What matters is the size of the gradients that reach the shared stages: where that of one task is far larger, a clip of
the sum leaves little room for the other. So each task's gradient can be clipped by itself, before they are added. On
every shared stage the norm of each task's gradient and the cosine between them are logged.
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
LEAST = 1e-3  # of a weight that gradnorm changes
TINY = 1e-12


@dataclass(frozen=True)
class Balance:
    """What the two losses count.

    Attributes:
        weighting: ``fixed`` weights, ``uncertainty`` or ``gradnorm``.
        wall_weight, opening_weight: what each counts; ``gradnorm`` begins with it, ``uncertainty`` does not read it.
        clip_each: the largest norm of each task's own gradient, in each forward pass; none when left out.
        alpha: of ``gradnorm``: how much more a task counts that is behind.
        pace: of ``gradnorm``: the learning rate of the weights; the paper's 0.025.
        look_every: steps from one look at gradients to the next; ``gradnorm`` looks at each step.
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
        """What each task counts at the beginning."""
        weights = (1.0, 1.0) if self.weighting == "uncertainty" else (self.wall_weight, self.opening_weight)
        return dict(zip(TASKS, weights, strict=True))


class Balanced(nn.Module):
    """A network with what its two losses count.

    Args:
        network: that trains.
        balance: of its losses.

    Raises:
        MethodError: for ``gradnorm`` where the two share no stage.
    """

    weights: Tensor

    def __init__(self, network: PlanNetwork, balance: Balance) -> None:
        super().__init__()
        self.network, self.learnt = network, balance.weighting == "uncertainty"
        self.register_buffer("weights", torch.tensor([balance.wall_weight, balance.opening_weight]))
        self.s = nn.Parameter(torch.zeros(2), requires_grad=self.learnt)
        if balance.weighting == "gradnorm" and not shared_stages(network):
            raise MethodError("gradnorm compares gradients on a shared stage that trains, and there is none: share one")
        self.to(network.encoder.mean.device)

    def weight(self, task: str) -> Tensor:
        """What a task counts now."""
        place = TASKS.index(task)
        return (-self.s[place]).exp() if self.learnt else self.weights[place]

    def total(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The loss of both tasks, or of the one that there is."""
        found = torch.stack([self.weight(task) * loss for task, loss in losses.items()]).sum()
        if self.learnt:
            found = found + torch.stack([softplus(self.s[TASKS.index(task)]) for task in losses]).sum()
        return found


def shared_stages(network: PlanNetwork) -> dict[int, list[nn.Parameter]]:
    """The parameters that train of each stage that both tasks read, by its place."""
    if network.walls is None or network.openings is None:
        return {}
    stages = network.encoder.stages[: network.encoder.shared]
    found = {place: [each for each in stage.parameters() if each.requires_grad] for place, stage in enumerate(stages)}
    return {place: parameters for place, parameters in found.items() if parameters}


def gradients(loss: Tensor, stages: Mapping[int, Sequence[nn.Parameter]]) -> dict[int, Tensor]:
    """The gradient of a loss on each stage, as one vector; the graph stays."""
    every = [each for parameters in stages.values() for each in parameters]
    found = iter(torch.autograd.grad(loss, every, retain_graph=True, materialize_grads=True))
    return {place: torch.cat([next(found).flatten() for _ in of_stage]) for place, of_stage in stages.items()}


def agreement(ours: Mapping[int, Tensor], theirs: Mapping[int, Tensor]) -> Tensor:
    """For each stage the norm of both gradients, and the cosine between them [stages, 3]."""
    rows = []
    for place, a in ours.items():
        b = theirs[place]
        rows.append(torch.stack([a.norm(), b.norm(), a @ b / (a.norm() * b.norm()).clamp(min=TINY)]))
    return torch.stack(rows)


class Balancing(Hook):
    """Carries a balance out: clips each task, looks at gradients, and moves the weights of ``gradnorm``.

    Args:
        model: that trains.
        balance: of its losses.
    """

    FILE = "balance.safetensors"

    def __init__(self, model: Balanced, balance: Balance) -> None:
        self.model, self.balance = model, balance
        self.stages = shared_stages(model.network)
        self.first: Tensor | None = None  # the losses that gradnorm began with
        self.moments = torch.zeros(2, 2)  # of its Adam
        self.looks = False
        self.seen: list[tuple[Tensor, Tensor]] = []  # of each batch of a step: losses, and agreement

    def passes(self, forward: Callable[[Any], Any], batch: Any, backward: Callable[..., None]) -> Any:
        """One forward and one backward pass, with looks at the gradients of each task between them."""
        loss, parts = forward(batch)
        losses = {task: parts[task] for task in TASKS if task in parts}
        if self.looks and len(losses) == 2 and self.stages:
            ours, theirs = (gradients(each, self.stages) for each in losses.values())
            self.seen.append((torch.stack([*losses.values()]).detach(), agreement(ours, theirs)))
        most = self.balance.clip_each
        backward(loss if most is None else loss + self._clipped(losses, most))
        return loss, parts

    def _clipped(self, losses: Mapping[str, Tensor], most: float) -> Tensor:
        """What is to be added to the loss so that no task's gradient is longer than it may be."""
        trained = [each for each in self.model.network.parameters() if each.requires_grad]
        less = []
        for task, loss in losses.items():
            weighed = self.model.weight(task).detach() * loss
            each = torch.autograd.grad(weighed, trained, retain_graph=True, allow_unused=True)
            norm = torch.nn.utils.get_total_norm([g for g in each if g is not None])
            less.append((most / norm.clamp(min=TINY)).clamp(max=1) * weighed - weighed)
        return torch.stack(less).sum()

    def before_step(self, run: TrainingRun) -> None:
        self.looks = self.balance.weighting == "gradnorm" or run.step % self.balance.look_every == 0

    def before_update(self, run: TrainingRun) -> None:
        if not self.seen:
            return
        losses, rows = run.weigh([each for each, _ in self.seen]), run.weigh([each for _, each in self.seen])
        self.seen = []
        for place, row in zip(self.stages, rows, strict=True):
            for name, value in zip((*(f"gradient of {task}" for task in TASKS), "cosine"), row, strict=True):
                run.note(f"{name}, stage {place}", value)
        if self.balance.weighting == "gradnorm":
            self._move(losses, rows[-1, :2], run.step)
        for task in TASKS:
            run.note(f"weight of {task}", self.model.weight(task))

    @torch.no_grad()
    def _move(self, losses: Tensor, norms: Tensor, step: int) -> None:
        """One step of Adam on sum_t |w_t g_t - mean * r_t^alpha|, after which the weights come to the same sum."""
        weights = self.model.weights
        self.first = losses.clone() if self.first is None else self.first
        behind = losses / self.first.clamp(min=TINY)
        wanted = (weights * norms).mean() * (behind / behind.mean()) ** self.balance.alpha
        slope = (weights * norms - wanted).sign() * norms
        moments = self.moments.to(weights.device)
        moments[0].lerp_(slope, 0.1)
        moments[1].lerp_(slope.square(), 0.001)
        mean, square = moments[0] / (1 - 0.9 ** (step + 1)), moments[1] / (1 - 0.999 ** (step + 1))
        self.moments, total = moments, weights.sum()
        moved = (weights - self.balance.pace * mean / (square.sqrt() + 1e-8)).clamp(min=LEAST)
        weights.copy_(moved * total / moved.sum())

    def save(self, folder: Path) -> None:
        kept = {"weights": self.model.weights, "moments": self.moments}
        save_file(kept | ({} if self.first is None else {"first": self.first}), folder / self.FILE)

    def load(self, folder: Path) -> None:
        kept = load_file(folder / self.FILE)
        self.model.weights.copy_(kept["weights"])
        first = kept.get("first")
        self.moments, self.first = kept["moments"], None if first is None else first.to(self.model.weights.device)
