"""Hooks of a training run, for fixed masks, selected parameters or averaged weights.

A hook gets the model and its optimizer before and after every step, and may change both. Its state is saved in the
checkpoints.
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
        """The trained model, as the loss sees it."""
        objective: Any = self._loop.model
        model: nn.Module = objective.model
        return model

    @property
    def trained(self) -> Mapping[str, nn.Parameter]:
        """The trained parameters by name."""
        return self._loop.trained

    @property
    def state_tensors(self) -> Mapping[str, Tensor]:
        """All tensors that training changes, by name: see :func:`lamella.train.loop.changing`."""
        return self._loop.state_tensors

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer, with the groups of its factory; their learning rates are set after each step."""
        optimizer: Any = self._loop.optimizer
        return cast(torch.optim.Optimizer, optimizer)

    @property
    def step(self) -> int:
        """The number of completed steps."""
        return int(self._loop.state.global_step)

    @property
    def batches(self) -> Sequence[Any]:
        """This process's batches of the coming step."""
        return self._loop.batches

    def weigh(self, values: Sequence[Tensor]) -> Tensor:
        """Return the mean of one value per batch of this step, over all processes, weighted as in the loss."""
        return self._loop.weigh(values)

    def note(self, name: str, value: Tensor) -> None:
        """Log a value of this step beside the parts of the loss.

        Args:
            name: name of the value in the log.
            value: the value, a scalar; it must be the same in all processes.
        """
        self._notes[name].append(value.detach().float())

    def noted(self) -> dict[str, float]:
        """Return the means of the values logged since the last call."""
        means = {name: float(torch.stack(values).mean()) for name, values in self._notes.items()}
        self._notes.clear()
        return means

    def check(self, value: Tensor, what: str) -> None:
        """Stop the run with a message that names the step, unless all values are finite.

        Args:
            value: values of any shape.
            what: their name in the message.

        Raises:
            TrainingError: if any is not finite.
        """
        self._loop.stop_unless_finite(value, what)


class Hook:
    """A base class of hooks; each method does nothing unless it is overridden.

    Attributes:
        splits: whether it supports the split parameters of a sharded run.
        changes: names of the frozen parameters that it changes; checkpoints contain them.
    """

    splits = False
    changes: Sequence[str] = ()

    def begin(self, run: TrainingRun) -> None:
        """Called before the first step, or, after :meth:`load`, before the first step of a resumed run."""

    def before_step(self, run: TrainingRun) -> None:
        """Called when the batches of a step are loaded, before anything is computed."""

    def before_clip(self, run: TrainingRun) -> None:
        """Called when the gradients of a step are computed, before they are clipped."""

    def before_update(self, run: TrainingRun) -> None:
        """Called when the gradients of a step are computed and clipped, before the optimizer step."""

    def after_step(self, run: TrainingRun) -> None:
        """Called after the optimizer step, before the weights are evaluated or saved."""

    def evaluated(self, run: TrainingRun) -> None:
        """Called after each evaluation, including the one before the first step; the held-out loss is in the log."""

    def done(self, run: TrainingRun) -> bool:
        """Return whether the run should end here; called after each step."""
        return False

    def end(self, run: TrainingRun) -> None:
        """Called at the end of the run, also if it had finished before."""

    def save(self, folder: Path) -> None:
        """Write the hook's state to a checkpoint, under names of its own; called in the first process only."""

    def saved(self, folder: Path) -> None:
        """Called when a checkpoint is complete, before older ones are deleted; called in the first process only."""

    def load(self, folder: Path) -> None:
        """Read the state that :meth:`save` wrote; called in every process."""


class EarlyStopping(Hook):
    """Keep the state with the lowest held-out loss, and restore it at the end.

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
        """Return the tensors to keep, by name."""
        return run.state_tensors

    def evaluated(self, run: TrainingRun) -> None:
        """Keep the tensors if the last held-out loss is the lowest."""
        losses = [point.loss for point in run.log.held_out]  # none without held-out samples
        if losses and losses[-1] < min(losses[:-1], default=math.inf):
            self.best = {name: each.detach().clone() for name, each in self.tracked(run).items()}

    def done(self, run: TrainingRun) -> bool:
        """Return whether the held-out loss has not improved for ``patience`` evaluations."""
        losses = [point.loss for point in run.log.held_out]
        return len(losses) > self.patience and min(losses[-self.patience :]) >= min(losses[: -self.patience])

    @torch.no_grad()
    def end(self, run: TrainingRun) -> None:
        """Restore the tensors with the lowest held-out loss."""
        tensors = self.tracked(run)
        for name, each in self.best.items():
            tensors[name].copy_(each)

    def save(self, folder: Path) -> None:
        """Save the best tensors in a checkpoint."""
        save_file(self.best, folder / self.FILE)

    def load(self, folder: Path) -> None:
        """Load the best tensors from a checkpoint."""
        self.best = load_file(folder / self.FILE)
