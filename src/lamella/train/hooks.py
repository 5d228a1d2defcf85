"""What looks on while a model trains: masks that are held, parts that are chosen, averages that are kept.

A hook sees the model and its optimizer before and after every step, and may change both. What it must know after a kill
it writes into the checkpoint.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lamella.errors import TrainingError
from lamella.train.log import TrainingLog
from lamella.train.loop import Loop


class TrainingRun:
    """A run as its hooks see it.

    Attributes:
        log: of the run so far.
    """

    def __init__(self, loop: Loop, settings: Mapping[str, Any]) -> None:
        self._loop = loop
        self._notes: dict[str, list[Tensor]] = defaultdict(list)
        self.log = TrainingLog(settings)

    @property
    def model(self) -> nn.Module:
        """What trains, as the loss sees it."""
        objective: Any = self._loop.model
        model: nn.Module = objective.model
        return model

    @property
    def trained(self) -> Mapping[str, nn.Parameter]:
        """The parameters that train, by name."""
        return self._loop.trained

    @property
    def state_tensors(self) -> Mapping[str, Tensor]:
        """All that training changes, by name: these parameters, and what batch norms have seen."""
        return self._loop.state_tensors

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Its groups are those that its factory made; their rates are set anew after each step."""
        optimizer: Any = self._loop.optimizer
        return cast(torch.optim.Optimizer, optimizer)

    @property
    def step(self) -> int:
        """How many steps are done."""
        return int(self._loop.state.global_step)

    @property
    def batches(self) -> Sequence[Any]:
        """What this process computes in the step that begins."""
        return self._loop.batches

    def weigh(self, values: Sequence[Tensor]) -> Tensor:
        """The mean of a value that every batch of this step has, over all processes; batches weigh as in the loss."""
        return self._loop.weigh(values)

    def note(self, name: str, value: Tensor) -> None:
        """Log a number of this step, which all processes have alike, beside the parts of the loss."""
        self._notes[name].append(value.detach().float())

    def noted(self) -> dict[str, float]:
        """The means of what was noted since this was last asked."""
        means = {name: float(torch.stack(values).mean()) for name, values in self._notes.items()}
        self._notes.clear()
        return means

    def check(self, value: Tensor, what: str) -> None:
        """Stop the run with a line that says where, unless all of a value is finite.

        Raises:
            TrainingError: then.
        """
        self._loop.stop_unless_finite(value, what)


class Hook:
    """Something that looks on; each method does nothing unless it is overridden.

    Attributes:
        splits: whether it works on parameters that a sharded run has split.
    """

    splits = False

    def begin(self, run: TrainingRun) -> None:
        """Called before the first step, and before the first one after a kill, when :meth:`load` was called."""

    def before_step(self, run: TrainingRun) -> None:
        """Called when the batches of a step are there, before anything is computed."""

    def before_update(self, run: TrainingRun) -> None:
        """Called when the gradients of a step are there and clipped, before the optimizer changes the weights."""

    def after_step(self, run: TrainingRun) -> None:
        """Called when the weights have changed, before they are evaluated or saved."""

    def evaluated(self, run: TrainingRun) -> None:
        """Called whenever an evaluation is due, before the first step too; the held-out loss is in the log."""

    def done(self, run: TrainingRun) -> bool:
        """Whether the run shall end here: asked after each step."""
        return False

    def end(self, run: TrainingRun) -> None:
        """Called when the run is over, finished now or before."""

    def save(self, folder: Path) -> None:
        """Write what must be known after a kill into a checkpoint, under names of its own; the first process alone."""

    def saved(self, folder: Path) -> None:
        """Called when a checkpoint is complete, before older ones go; the first process alone."""

    def load(self, folder: Path) -> None:
        """Read what :meth:`save` wrote; every process."""


class EarlyStopping(Hook):
    """Keeps what training changes at its lowest held-out loss, and leaves the model with it.

    Args:
        patience: evaluations without improvement after which training stops.
    """

    FILE = "best.safetensors"

    def __init__(self, patience: int) -> None:
        if patience < 1:
            raise TrainingError(f"patience {patience}: give at least 1")
        self.patience = patience
        self.best: dict[str, Tensor] = {}

    def tracked(self, run: TrainingRun) -> Mapping[str, Tensor]:
        """What is kept, by name."""
        return run.state_tensors

    def evaluated(self, run: TrainingRun) -> None:
        losses = [point.loss for point in run.log.held_out]  # none without held-out samples
        if losses and losses[-1] < min(losses[:-1], default=math.inf):
            self.best = {name: each.detach().clone() for name, each in self.tracked(run).items()}

    def done(self, run: TrainingRun) -> bool:
        losses = [point.loss for point in run.log.held_out]
        return len(losses) > self.patience and min(losses[-self.patience :]) >= min(losses[: -self.patience])

    @torch.no_grad()
    def end(self, run: TrainingRun) -> None:
        watched = self.tracked(run)
        for name, each in self.best.items():
            watched[name].copy_(each)

    def save(self, folder: Path) -> None:
        save_file(self.best, folder / self.FILE)

    def load(self, folder: Path) -> None:
        self.best = load_file(folder / self.FILE)
