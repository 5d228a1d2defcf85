"""Datasets that a model is trained on in sequence, and the held-out loss of each over the whole run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lamella.data.samples import Sample
from lamella.errors import TrainingError
from lamella.train.log import Logged, TrainingLog


@dataclass(frozen=True)
class ContinualDataset:
    """One dataset of a continual run.

    Attributes:
        name: name of the dataset.
        samples: training samples, blocks of one length.
        held_out: held-out samples, never trained on.
    """

    name: str
    samples: Sequence[Sample]
    held_out: Sequence[Sample] = ()


@dataclass(frozen=True)
class Stage:
    """The training stage of one dataset.

    Attributes:
        name: name of the dataset.
        start: steps of the whole run before the stage.
        end: steps of the whole run after the stage.
        folder: folder of its checkpoints; the newest one was saved before any anneal.
        replayed: alpha, the replayed fraction.
        shift: held-out loss on the new and on the past data before the stage, if alpha was chosen from them.
        consumed: indices of the dataset's samples that were trained on, in order.
        log: training log of the stage.
    """

    name: str
    start: int
    end: int
    folder: Path
    replayed: float
    shift: tuple[float, float] | None
    consumed: list[int]
    log: TrainingLog


@dataclass
class LossCurves:
    """Held-out losses of every dataset over a whole run, in nats per token.

    Attributes:
        stages: the stages so far.
    """

    stages: list[Stage] = field(default_factory=list)

    def of(self, name: str) -> list[tuple[int, float]]:
        """Return the loss curve of one dataset: steps of the whole run, and losses.

        A stage starts where the last one ended.
        """
        return [
            (stage.start + point.step, point.parts[name])
            for stage in self.stages
            for point in stage.log.held_out
            if name in point.parts
        ]

    def forgetting(self) -> dict[str, float]:
        """Return the increase of each earlier dataset's loss since its own stage ended, or since the run began."""
        rises = {}
        for name in self.last.parts:
            turns = [stage.log.held_out[-1] for stage in self.stages if stage.name == name]
            datasets = turns[-1].parts[name] if turns else self.of(name)[0][1]
            if self.stages[-1].name != name:
                rises[name] = self.last.parts[name] - datasets
        return rises

    def adaptation(self) -> dict[str, float]:
        """Return the decrease of each dataset's loss during its last stage."""
        turns = {stage.name: stage.log.held_out for stage in self.stages}
        return {name: curve[0].parts[name] - curve[-1].parts[name] for name, curve in turns.items()}

    def average(self) -> float:
        """Return the paper's main score: the mean of the final losses over all datasets."""
        return self.last.loss

    def spike(self, name: str) -> float:
        """Return the maximum relative increase of a dataset's loss during the last stage; 0 if it never increased."""
        curve = [point.parts[name] for point in self.stages[-1].log.held_out]
        return max(curve) / curve[0] - 1

    @property
    def last(self) -> Logged:
        """The newest held-out losses.

        Raises:
            TrainingError: if nothing was measured.
        """
        if not self.stages or not self.stages[-1].log.held_out:
            raise TrainingError("there are no curves yet: train on a dataset with held-out samples first")
        return self.stages[-1].log.held_out[-1]
