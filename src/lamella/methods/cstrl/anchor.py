"""The anchor: what a model may not move freely, and how strongly it is held (stages 3 and 4).

    F_i      = 1/M sum over batches ( d L_batch / d theta_i )^2           at theta*, the gap-sentence solution
    L(theta) = CE(theta) + lambda_e sum_i F_i (theta_i - theta*_i)^2      (no factor 1/2)
    lambda_e = max( 0.2, 0.9 (1 - e/E) )                                  e = 0, 1, ...: the epoch, E of them

The squared gradients are those of whole batches of 32, which is part of what lambda = 0.9 means: of single samples F is
about 32 times as large. L2-SP is the same with F = 1. In the authors' code the decay never reaches the loss, which is
multiplied by 0.9 throughout: that is ``decay="constant"``.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge
from torch import Tensor, nn

from lamella.data.samples import Sample, collate
from lamella.errors import MethodError, NumericsError
from lamella.measure import Fisher, fisher
from lamella.measure.labelled import LabelledBatch
from lamella.plan import fingerprint
from lamella.signature import Named
from lamella.stack import Model, weights
from lamella.train import Hook, TrainingRun, response_loss
from lamella.train.task import Batch, LossAndParts

ROWS = "anchor.json"
OUTSIDE = "outside the layers"


@dataclass(frozen=True)
class Anchor:
    """How strongly the model is held where the gap sentences have left it.

    Attributes:
        importance: of each parameter: ``fisher``, as elastic weight consolidation has it, or ``uniform``, as L2-SP has.
        lam: lambda in the first epoch; 0 lets go.
        floor: what lambda does not fall below, unless it is below from the beginning.
        decay: of lambda: ``linear``, once an epoch, or ``constant``, as the authors' code runs.
        normalize: ``mean`` divides F by its mean, so that a lambda means the same for another model; or ``none``.
        fisher_batch: samples whose mean gradient is squared for F.
    """

    importance: Literal["fisher", "uniform"] = "fisher"
    lam: Annotated[float, Named("lambda"), Ge(0)] = 0.9
    floor: Annotated[float, Ge(0)] = 0.2
    decay: Literal["linear", "constant"] = "linear"
    normalize: Literal["none", "mean"] = "none"
    fisher_batch: Annotated[int, Ge(1)] = 32

    def strength(self, epoch: int, epochs: int) -> float:
        """lambda_e in an epoch, counted from 0, of so many.

        >>> [round(Anchor().strength(e, 20), 2) for e in (0, 10, 16, 20)]
        [0.9, 0.45, 0.2, 0.2]
        """
        if self.decay == "constant":
            return self.lam
        return max(min(self.floor, self.lam), self.lam * (1 - epoch / epochs))


# Fisher information


def token_cross_entropy(model: nn.Module, batch: LabelledBatch) -> Tensor:
    """L_batch: the mean over all tokens of a batch that carry loss. Padding carries none, and nothing attends to it."""
    device = next(model.parameters()).device
    made = collate(batch)  # type: ignore[arg-type]
    return response_loss(model, {name: each.to(device) for name, each in made.items()})


def measured(model: Model, samples: list[Sample], batch: int) -> Fisher:
    """F of a model on the samples that it has been trained on, tied parameters once."""
    return fisher(model.model, samples, loss=token_cross_entropy, batch=batch)


def read_fisher(path: Path, model: Model) -> Fisher:
    """F from a file.

    Raises:
        MethodError: for no such file, or one that is of other weights.
    """
    found = Fisher.read(path)
    if found.weights != fingerprint.tensors(model.model):
        raise MethodError(
            f"{path} is of other weights than {model.name} has: an anchor is where its importances were measured; give "
            "the model that `lamella run cstrl gaps --save-fisher` has written with it, or leave fisher out"
        )
    for name, weight in weights(model.model).items():
        theta = weight.of(model.model)
        importance = found.tensors.get(name)
        if importance is None or importance.shape != theta.shape:
            raise MethodError(f"{path} has no importance of '{name}' {list(theta.shape)}: measure all parameters")
        if not torch.isfinite(importance).all() or (importance < 0).any():
            raise NumericsError(f"{path}: the importances of '{name}' are not all finite and positive: measure again")
    return found


# The penalty


class Penalty:
    """sum_i F_i (theta_i - theta*_i)^2, in float32.

    Args:
        start: theta*, by name; copied.
        importance: F by name, each in the shape of its parameter; None for F = 1.
        normalize: divide F by its mean over all parameters.
    """

    def __init__(
        self, start: Mapping[str, Tensor], importance: Mapping[str, Tensor] | None, normalize: bool = False
    ) -> None:
        self.start = {name: theta.detach().float().clone() for name, theta in start.items()}
        if importance is None:
            one = next(iter(self.start.values())).new_ones(())
            self.importance = dict.fromkeys(self.start, one)
            return
        mean = 1.0
        if normalize:
            total = sum(float(importance[name].double().sum()) for name in self.start)
            mean = total / sum(theta.numel() for theta in self.start.values())
        self.importance = {name: importance[name].to(theta.device) / mean for name, theta in self.start.items()}

    def of(self, theta: Mapping[str, Tensor]) -> Tensor:
        """The penalty of parameters, a number with a gradient."""
        return torch.stack([self.part(name, each).sum() for name, each in theta.items()]).sum()

    def part(self, name: str, theta: Tensor) -> Tensor:
        """What each entry of one parameter adds, in its shape."""
        return self.importance[name] * (theta.float() - self.start[name]).square()

    @torch.no_grad()
    def pull(self, theta: Mapping[str, Tensor]) -> float:
        """The norm of the penalty's gradient, 2 F (theta - theta*)."""
        squares = [
            (2 * self.importance[name] * (each.float() - self.start[name])).double().square().sum()
            for name, each in theta.items()
        ]
        return float(torch.stack(squares).sum().sqrt())

    @torch.no_grad()
    def by_site(self, theta: Mapping[str, Tensor], sites: Mapping[str, str]) -> dict[str, dict[str, float]]:
        """By site: the drift |theta - theta*| / |theta*|, and its share of the penalty in absolute numbers."""
        sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
        for name, each in theta.items():
            start = self.start[name]
            parts = (each.float() - start).square(), start.square(), self.part(name, each)
            for place, part in enumerate(parts):
                sums[sites[name]][place] += float(part.double().sum())
        return {
            site: {"drift": (moved / size) ** 0.5 if size else 0.0, "penalty": penalty}
            for site, (moved, size, penalty) in sums.items()
        }

    def mass(self, sites: Mapping[str, str]) -> dict[str, float]:
        """sum_i F_i by site."""
        sums: dict[str, float] = defaultdict(float)
        for name, start in self.start.items():
            sums[sites[name]] += float(self.importance[name].double().expand_as(start).sum())
        return dict(sums)


def sites_of_parameters(model: Model) -> dict[str, str]:
    """The layer of each parameter, by its name; what belongs to none lies outside the layers."""
    prefixes = {stack.architecture.prefix: stack.prefix for stack in model.stacks.values()}

    def site(name: str) -> str:
        for inside, shown in prefixes.items():
            if name.startswith(inside):
                return f"{shown}layers.{name.removeprefix(inside).split('.', 1)[0]}"
        return OUTSIDE

    return {name: site(name) for name in weights(model.model)}


class Anchored(Hook):
    """Cross-entropy with the penalty; lambda changes from epoch to epoch, and each epoch is looked at when it ends.

    Args:
        penalty: what is added.
        anchor: how much of it.
        sites: of the parameters, by name.
        samples: in an epoch.
        size: samples in a step.
        steps: of the run.

    Attributes:
        rows: by epoch: lambda, the mean task loss, the penalty (without lambda), the norm of the anchor's gradient over
            that of the task's, and what :meth:`Penalty.by_site` says.
    """

    def __init__(
        self, penalty: Penalty, anchor: Anchor, sites: Mapping[str, str], *, samples: int, size: int, steps: int
    ) -> None:
        self.penalty, self.anchor, self.sites = penalty, anchor, sites
        self.samples, self.size, self.steps = samples, size, steps
        self.epochs = self.epoch(steps - 1) + 1  # as many as begin: the last step may reach beyond the end of the last
        self.rows: list[dict[str, Any]] = []
        self.tasks: list[float] = []  # of the epoch that goes on
        self.strength, self.ratio, self.looks = anchor.lam, 0.0, False
        self.theta: Mapping[str, nn.Parameter] = {}

    def epoch(self, step: int) -> int:
        """Of a step, counted from 0."""
        return step * self.size // self.samples

    def loss(self, model: Any, batch: Batch) -> Tensor | LossAndParts:
        """What trains; of held-out samples, the cross-entropy alone."""
        task = response_loss(model, batch)
        if not torch.is_grad_enabled():
            return task
        self.tasks.append(float(task.detach()))
        if self.looks:
            self._look(task)
        if self.strength == 0:
            with torch.no_grad():
                return task, {"task": task.detach(), "penalty": 0 * self.penalty.of(self.theta)}
        penalty = self.strength * self.penalty.of(self.theta)
        return task + penalty, {"task": task.detach(), "penalty": penalty.detach()}

    def _look(self, task: Tensor) -> None:
        """How strong the anchor's gradient is beside the task's, once in an epoch."""
        self.looks = False
        found = torch.autograd.grad(task, list(self.theta.values()), retain_graph=True, allow_unused=True)
        squares = [each.double().square().sum() for each in found if each is not None]
        norm = float(torch.stack(squares).sum().sqrt())
        self.ratio = self.strength * self.penalty.pull(self.theta) / norm if norm else 0.0

    def begin(self, run: TrainingRun) -> None:
        self.theta = run.trained

    def before_step(self, run: TrainingRun) -> None:
        self.strength = self.anchor.strength(self.epoch(run.step), self.epochs)
        self.looks = self._is_last(run.step)

    def after_step(self, run: TrainingRun) -> None:
        run.note("lambda", torch.tensor(self.strength))
        done = run.step - 1
        if not self._is_last(done):
            return
        found = self.penalty.by_site(self.theta, self.sites)
        self.rows.append(
            {
                "epoch": self.epoch(done),
                "step": run.step,
                "lambda": self.strength,
                "task": sum(self.tasks) / len(self.tasks),
                "penalty": sum(each["penalty"] for each in found.values()),
                "ratio": self.ratio,
                "sites": found,
            }
        )
        self.tasks.clear()

    def _is_last(self, step: int) -> bool:
        """Whether a step, counted from 0, ends an epoch."""
        return step + 1 == self.steps or self.epoch(step + 1) > self.epoch(step)

    def save(self, folder: Path) -> None:
        (folder / ROWS).write_text(json.dumps({"rows": self.rows, "tasks": self.tasks}), encoding="utf-8")

    def load(self, folder: Path) -> None:
        found = json.loads((folder / ROWS).read_text(encoding="utf-8"))
        self.rows, self.tasks = found["rows"], found["tasks"]
