"""Baselines of the anchor: layers frozen for the whole run or temporarily.

Gradual unfreezing, as studied by the authors: at first only a tenth of the encoder's tensors is trained, starting at
the embedding; more are unfrozen after each epoch, until all are trained for the last fifth of the epochs.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lamella.train import Hook, TrainingRun

FIRST = 0.1  # fraction of the encoder's tensors that are trained from the beginning
REST = 0.2  # fraction of the epochs, at the end, in which all are trained


def unfrozen_fraction(epoch: int, epochs: int) -> float:
    """Return the fraction of the encoder's tensors that are trained in an epoch.

    Args:
        epoch: the epoch, counted from 0.
        epochs: number of epochs.
    """
    steps = (epochs - 1) - REST * epochs
    return min(1.0, FIRST + epoch * (1 - FIRST) / steps) if steps > 0 else 1.0


def encoder_names(model: nn.Module) -> list[str]:
    """Return the names of the parameters of the encoder only, starting at the embedding; tied ones are excluded."""
    return [name for name, _ in model.named_parameters() if name.startswith(("encoder.", "model.encoder."))]


class Unfreezing(Hook):
    """Train a growing fraction of some parameters.

    Args:
        names: names of the parameters, in the order in which they are unfrozen.
        samples: number of samples per epoch.
        size: number of samples per step.
        epochs: number of epochs.
    """

    def __init__(self, names: Sequence[str], *, samples: int, size: int, epochs: int) -> None:
        self.names, self.samples, self.size, self.epochs = names, samples, size, epochs

    def before_step(self, run: TrainingRun) -> None:
        """Freeze and unfreeze the parameters for the step."""
        share = unfrozen_fraction(run.step * self.size // self.samples, self.epochs)
        count = round(share * len(self.names))
        for index, name in enumerate(self.names):
            run.trained[name].requires_grad_(index < count)
