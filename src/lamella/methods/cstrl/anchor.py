"""The anchor: a Fisher-weighted penalty that keeps parameters near the gap-sentence solution (stages 3 and 4).

    F_i      = 1/M sum over batches ( d L_batch / d theta_i )^2           at theta*, the gap-sentence solution
    L(theta) = CE(theta) + lambda_e sum_i F_i (theta_i - theta*_i)^2      (no factor 1/2)
    lambda_e = max( 0.2, 0.9 (1 - e/E) )                                  e = 0, 1, ..., E - 1: the epoch

The gradient of the penalty, 2 lambda_e F (theta - theta*), is added to that of the cross-entropy before clipping.

The gradients are squared per batch of 32, to which lambda = 0.9 refers: per single sample F is about 32 times as large.
L2-SP is the same with F = 1. In the authors' code the decay never reaches the loss, which is multiplied by 0.9
throughout: that is ``decay="constant"``.
"""

from __future__ import annotations

import copy
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
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
from lamella.train.sharding import gathered, sharded
from lamella.train.task import Batch, LossAndParts

ROWS = "anchor.json"
OUTSIDE = "outside the layers"


@dataclass(frozen=True)
class Anchor:
    """Strength of the anchor to the gap-sentence solution.

    Attributes:
        importance: weight of each parameter: ``fisher``, as in elastic weight consolidation, or ``uniform``, as in
            L2-SP.
        lam: lambda in the first epoch; 0 disables the anchor.
        floor: minimum of lambda, unless it starts below.
        decay: decay of lambda: ``linear`` per epoch, or ``constant``, as the authors' code computes it.
        normalize: ``mean`` divides F by its mean, so that a lambda transfers to another model; or ``none``.
        fisher_batch: number of samples whose mean gradient is squared for F.
    """

    importance: Literal["fisher", "uniform"] = "fisher"
    lam: Annotated[float, Named("lambda"), Ge(0)] = 0.9
    floor: Annotated[float, Ge(0)] = 0.2
    decay: Literal["linear", "constant"] = "linear"
    normalize: Literal["none", "mean"] = "none"
    fisher_batch: Annotated[int, Ge(1)] = 32

    def strength(self, epoch: int, epochs: int) -> float:
        """Return lambda_e.

        Args:
            epoch: e, counted from 0.
            epochs: E, the number of epochs.

        >>> [round(Anchor().strength(e, 20), 2) for e in (0, 10, 16, 20)]
        [0.9, 0.45, 0.2, 0.2]
        """
        if self.decay == "constant":
            return self.lam
        return max(min(self.floor, self.lam), self.lam * (1 - epoch / epochs))


# Fisher information


def token_cross_entropy(model: nn.Module, batch: LabelledBatch) -> Tensor:
    """Return L_batch: the mean loss over all labelled tokens of a batch; padding is neither labelled nor attended to.

    Args:
        model: the model.
        batch: samples.
    """
    device = next(model.parameters()).device
    made = collate(batch)  # type: ignore[arg-type]
    return response_loss(model, {name: each.to(device) for name, each in made.items()})


def measure_fisher(model: Model, samples: list[Sample], batch: int) -> Fisher:
    """Measure F of a model on its training samples; tied parameters count once.

    Args:
        model: the model.
        samples: the samples that it was trained on.
        batch: number of samples whose mean gradient is squared.
    """
    return fisher(model.model, samples, loss=token_cross_entropy, batch=batch)


def read_fisher(path: Path, model: Model) -> Fisher:
    """Read F from a file.

    Args:
        path: the file.
        model: the model for which it was measured.

    Raises:
        MethodError: if the file does not exist, or belongs to other weights.
        NumericsError: if a value is negative or not finite.
    """
    found = Fisher.read(path)
    if found.weights != fingerprint.tensors(model.model):
        raise MethodError(
            f"{path} belongs to other weights than {model.name}: Fisher information must be measured at the anchor; "
            "give the model that `lamella run cstrl gaps --save-fisher` has written with it, or omit fisher"
        )
    for name, weight in weights(model.model).items():
        theta = weight.of(model.model)
        importance = found.tensors.get(name)
        if importance is None or importance.shape != theta.shape:
            raise MethodError(f"{path} has no values for '{name}' {list(theta.shape)}: measure all parameters")
        if not torch.isfinite(importance).all() or (importance < 0).any():
            raise NumericsError(f"{path}: the values of '{name}' are not all finite and non-negative: measure again")
    return found


# The penalty


class Penalty:
    """The penalty sum_i F_i (theta_i - theta*_i)^2, in float32.

    Args:
        start: theta* by name; copied.
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

    def sharded(self, theta: Mapping[str, Tensor]) -> Penalty:
        """Return the same penalty for parameters that may be sharded over processes.

        Args:
            theta: the parameters by name.
        """
        part = copy.copy(self)
        part.start = {name: sharded(self.start[name], each) for name, each in theta.items()}
        part.importance = {
            name: sharded(self.importance[name], each) if self.importance[name].ndim else self.importance[name]
            for name, each in theta.items()
        }
        return part

    def of(self, theta: Mapping[str, Tensor]) -> Tensor:
        """Return the penalty of parameters, a differentiable scalar unless they are sharded."""
        return torch.stack([gathered(self.part(name, each).sum()) for name, each in theta.items()]).sum()

    def part(self, name: str, theta: Tensor) -> Tensor:
        """Return the penalty of each element of one parameter, in its shape.

        Args:
            name: name of the parameter.
            theta: its values.
        """
        return self.importance[name] * (theta.float() - self.start[name]).square()

    @torch.no_grad()
    def gradient(self, name: str, theta: Tensor) -> Tensor:
        """Return the gradient of the penalty with respect to one parameter, 2 F (theta - theta*), in its shape.

        Args:
            name: name of the parameter.
            theta: its values.
        """
        return 2 * self.importance[name] * (theta.float() - self.start[name])

    @torch.no_grad()
    def by_site(self, theta: Mapping[str, Tensor], sites: Mapping[str, str]) -> dict[str, dict[str, float]]:
        """Return, by site, the drift |theta - theta*| / |theta*| and the penalty.

        Args:
            theta: parameters by name.
            sites: site of each parameter, by name.
        """
        sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
        for name, each in theta.items():
            start = self.start[name]
            parts = (each.float() - start).square(), start.square(), self.part(name, each)
            for index, part in enumerate(parts):
                sums[sites[name]][index] += float(gathered(part.double().sum()))
        return {
            site: {"drift": (moved / size) ** 0.5 if size else 0.0, "penalty": penalty}
            for site, (moved, size, penalty) in sums.items()
        }

    def mass(self, sites: Mapping[str, str]) -> dict[str, float]:
        """Return sum_i F_i by site.

        Args:
            sites: site of each parameter, by name.
        """
        sums: dict[str, float] = defaultdict(float)
        for name, start in self.start.items():
            sums[sites[name]] += float(self.importance[name].double().expand_as(start).sum())
        return dict(sums)


def sites_of_parameters(model: Model) -> dict[str, str]:
    """Return the layer of each parameter, by name; other parameters are "outside the layers"."""
    prefixes = {stack.architecture.prefix: stack.prefix for stack in model.stacks.values()}

    def site(name: str) -> str:
        for inside, shown in prefixes.items():
            if name.startswith(inside):
                return f"{shown}layers.{name.removeprefix(inside).split('.', 1)[0]}"
        return OUTSIDE

    return {name: site(name) for name in weights(model.model)}


def _norm(tensors: Iterable[Tensor]) -> float:
    """Return the norm of all tensors together."""
    return float(torch.stack([gathered(each.double().square().sum()) for each in tensors]).sum().sqrt())


class AnchoredLoss(Hook):
    """Cross-entropy with the penalty; lambda changes per epoch, and statistics are recorded at the end of each epoch.

    Args:
        penalty: the penalty.
        anchor: its strength.
        sites: site of each parameter, by name.
        samples: number of samples per epoch.
        size: number of samples per step.
        steps: number of steps of the run.

    Attributes:
        rows: by epoch: lambda, the mean task loss, the penalty (without lambda), the norm of the anchor's gradient over
            that of the task's, and the result of :meth:`Penalty.by_site`.
    """

    splits = True

    def __init__(
        self, penalty: Penalty, anchor: Anchor, sites: Mapping[str, str], *, samples: int, size: int, steps: int
    ) -> None:
        self.penalty, self.anchor, self.sites = penalty, anchor, sites
        self.ours = penalty  # its shards in this process
        self.samples, self.size, self.steps = samples, size, steps
        self.epochs = self.epoch(steps - 1) + 1  # the last epoch may be incomplete
        self.rows: list[dict[str, Any]] = []
        self.tasks: list[float] = []  # task losses of the steps of the current epoch
        self.losses: list[Tensor] = []  # task losses of the batches of the current step
        self.strength, self.ratio = anchor.lam, 0.0
        self.theta: Mapping[str, Tensor] = penalty.start

    def epoch(self, step: int) -> int:
        """Return the epoch of a step, both counted from 0."""
        return step * self.size // self.samples

    def loss(self, model: Any, batch: Batch) -> Tensor | LossAndParts:
        """Return the loss, whose penalty is a constant here; without gradient (held-out samples), no penalty.

        Args:
            model: the model.
            batch: a batch.
        """
        task = response_loss(model, batch)
        if not torch.is_grad_enabled():
            return task
        self.losses.append(task.detach())
        with torch.no_grad():
            penalty = self.strength * self.ours.of(self.theta) if self.strength else torch.zeros_like(task)
        return task + penalty, {"task": task.detach(), "penalty": penalty}

    def begin(self, run: TrainingRun) -> None:
        """Get the trained parameters."""
        self.theta = run.trained
        self.ours = self.penalty.sharded(self.theta)

    def before_step(self, run: TrainingRun) -> None:
        """Set lambda for the step."""
        self.strength = self.anchor.strength(self.epoch(run.step), self.epochs)
        self.losses.clear()

    @torch.no_grad()
    def before_clip(self, run: TrainingRun) -> None:
        """Add the gradient of the penalty; in the last step of an epoch, compare the norms of both gradients."""
        self.tasks.append(float(run.weigh(self.losses)))
        if self._is_last(run.step):
            norm = _norm(each.grad for each in self.theta.values() if each.grad is not None)
            pulls = _norm(self.ours.gradient(name, each) for name, each in self.theta.items())
            self.ratio = self.strength * pulls / norm if norm else 0.0
        if self.strength:
            for name, each in self.theta.items():
                pull = self.strength * self.ours.gradient(name, each)
                each.grad = pull.to(each) if each.grad is None else each.grad.add_(pull)

    def after_step(self, run: TrainingRun) -> None:
        """Record the statistics at the end of an epoch."""
        run.note("lambda", torch.tensor(self.strength))
        done = run.step - 1
        if not self._is_last(done):
            return
        found = self.ours.by_site(self.theta, self.sites)
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
        """Return whether a step, counted from 0, ends an epoch."""
        return step + 1 == self.steps or self.epoch(step + 1) > self.epoch(step)

    def save(self, folder: Path) -> None:
        """Save the recorded statistics."""
        (folder / ROWS).write_text(json.dumps({"rows": self.rows, "tasks": self.tasks}), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Load the recorded statistics."""
        found = json.loads((folder / ROWS).read_text(encoding="utf-8"))
        self.rows, self.tasks = found["rows"], found["tasks"]
