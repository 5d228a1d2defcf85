"""Fit a replacement module to the recorded inputs and outputs of the module that it replaces, by regression.

    loss = mean |part(x) - y|^2 / variance of y        1 for the best constant, 0 for a perfect copy

Any module that maps rows to rows can be fitted: a feed-forward network over tokens, convolutions over the attention
maps of a head, an attention over whole sequences. The rest of the model is not involved, so modules can be fitted one
by one.
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
    """The squared error relative to a variance.

    Attributes:
        variance: variance of the targets.
    """

    variance: float

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Compute the loss of a batch."""
        return squared_error(model, batch) / self.variance


@dataclass(frozen=True)
class FitResult:
    """How well a module was fitted.

    Attributes:
        log: training log of the regression.
        explained: R^2 on the training rows and on the held-out rows.
        rows: number of training rows.
    """

    log: TrainingLog
    explained: tuple[float, float]
    rows: int


def fit_part(
    part: nn.Module, recording: Recording, config: TrainConfig, *, held_out: float = 0.1, out: Path
) -> FitResult:
    """Train a module so that ``part(x)`` approximates ``y``, and keep its best weights on held-out rows.

    Args:
        part: module from x [rows, ...] to y [rows, ...]; all its parameters are trained, in place.
        recording: recorded inputs and outputs.
        config: settings of the regression.
        held_out: fraction of the rows, the last ones, to validate on.
        out: folder of the run, from which an interrupted run resumes.

    Returns:
        R^2 of the fit and the training log.

    Raises:
        TrainingError: for constant outputs, or when training cannot start or does not stay finite.
        CalibrationError: for too few rows.
    """
    training, validation = recording.split(held_out)
    if not min(training.variance, validation.variance) > 0:
        raise TrainingError("the recorded outputs are constant, so there is nothing to fit: drop that module instead")
    task = supervised(Relative(training.variance))
    patient = EarlyStopping(
        patience=config.with_steps(len(training)).steps or 1
    )  # keeps the best weights, never stops early
    log = fit(part, training, task, config, out=out, trainable=lambda name: True, held_out=validation, hooks=[patient])
    device = next(part.eval().parameters()).device

    def fitted(x: Tensor) -> Tensor:
        y: Tensor = part(x.to(device))
        return y.cpu()

    return FitResult(log, (training.explained(fitted), validation.explained(fitted)), len(training))
