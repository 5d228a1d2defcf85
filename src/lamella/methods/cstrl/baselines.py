"""What the anchor must be compared with: layers that stay frozen, for good or for a while.

Gradual unfreezing, as the authors study it: the encoder is frozen but for a tenth of its tensors, from the embedding's
end, and after each epoch so many more train that all of them do when a fifth of the epochs is left.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lamella.train import Hook, TrainingRun

FIRST = 0.1  # of the encoder's tensors: what trains from the beginning
REST = 0.2  # of the epochs: for so long all of it trains


def unfrozen(epoch: int, epochs: int) -> float:
    """The share of the encoder's tensors that train in an epoch, counted from 0."""
    steps = (epochs - 1) - REST * epochs
    return min(1.0, FIRST + epoch * (1 - FIRST) / steps) if steps > 0 else 1.0


def encoder_names(model: nn.Module) -> list[str]:
    """The names of the parameters that are the encoder's alone, from the embedding's end; tied ones are not."""
    return [name for name, _ in model.named_parameters() if name.startswith(("encoder.", "model.encoder."))]


class Unfreezing(Hook):
    """Lets a growing share of some parameters train.

    Args:
        names: which ones, those that train first at the beginning.
        samples: in an epoch.
        size: samples in a step.
        epochs: of the run.
    """

    def __init__(self, names: Sequence[str], *, samples: int, size: int, epochs: int) -> None:
        self.names, self.samples, self.size, self.epochs = names, samples, size, epochs

    def before_step(self, run: TrainingRun) -> None:
        share = unfrozen(run.step * self.size // self.samples, self.epochs)
        count = round(share * len(self.names))
        for place, name in enumerate(self.names):
            run.trained[name].requires_grad_(place < count)
