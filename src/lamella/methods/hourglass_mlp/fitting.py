"""Fitting a new part of a model to what the old one did, by regression on recorded inputs and outputs.

    loss = mean |part(x) - y|^2 / variance of y        1 for the best constant, 0 for a perfect copy

Whatever reads rows and gives rows fits: a feed-forward network over tokens, convolutions over the maps of a head, an
attention over whole sequences. What else runs in the model plays no part, so parts can be fitted one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from lamella.errors import TrainingError
from lamella.measure.recording import Recording
from lamella.train.config import TrainConfig
from lamella.train.fit import fit
from lamella.train.hooks import EarlyStopping
from lamella.train.log import TrainingLog
from lamella.train.supervised import squared_error, supervised
from lamella.train.task import Batch


@dataclass(frozen=True)
class Relative:
    """The squared error as a share of a variance."""

    variance: float

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        return squared_error(model, batch) / self.variance


@dataclass(frozen=True)
class Fitted:
    """How well a part was fitted.

    Attributes:
        log: of the regression.
        explained: R^2 on rows that it was fitted to, and on held-out ones.
        rows: how many it was fitted to.
    """

    log: TrainingLog
    explained: tuple[float, float]
    rows: int


def fit_part(part: nn.Module, recording: Recording, config: TrainConfig, *, held_out: float = 0.1, out: Path) -> Fitted:
    """Train a part so that ``part(x)`` is ``y``, and leave it as it was best on held-out rows.

    Args:
        part: from x [rows, ...] to y [rows, ...]; all its parameters train, in place.
        recording: what it shall do.
        config: of the regression.
        held_out: the share of rows, the last ones, that it is judged on.
        out: the folder of the run, which goes on from there after a stop.

    Raises:
        TrainingError: for outputs that never change, or when training cannot start or stay finite.
        CalibrationError: for too few rows.
    """
    given, kept = recording.split(held_out)
    if not min(given.variance, kept.variance) > 0:
        raise TrainingError("the recorded outputs are all alike: there is nothing to fit, so drop that part instead")
    task = supervised(Relative(given.variance))
    patient = EarlyStopping(patience=config.with_steps(len(given)).steps or 1)  # it never stops before the end
    log = fit(part, given, task, config, out=out, trainable=lambda name: True, held_out=kept, hooks=[patient])
    device = next(part.eval().parameters()).device

    def fitted(x: Tensor) -> Tensor:
        y: Tensor = part(x.to(device))
        return y.cpu()

    return Fitted(log, (given.explained(fitted), kept.explained(fitted)), len(given))
