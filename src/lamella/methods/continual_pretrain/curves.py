"""Datasets that a model learns one after the other, and what each of them costs the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lamella.data.samples import Sample
from lamella.errors import TrainingError
from lamella.train.log import Logged, TrainingLog


@dataclass(frozen=True)
class Stream:
    """One dataset.

    Attributes:
        name: of the dataset.
        samples: training samples, blocks of one length.
        held_out: samples of it that nothing trains on.
    """

    name: str
    samples: Sequence[Sample]
    held_out: Sequence[Sample] = ()


@dataclass(frozen=True)
class Stage:
    """One dataset's turn.

    Attributes:
        name: of the dataset.
        start, end: steps of the whole run before it and after it.
        folder: of its run; the newest checkpoint in it is the one from before any anneal.
        replayed: alpha.
        shift: held-out loss on the new data and on the past before it, where alpha was chosen by them.
        consumed: which of the dataset's samples were seen, in their order.
        log: of its run.
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
    """Held-out losses of every dataset over a whole run, in nats per token."""

    stages: list[Stage] = field(default_factory=list)

    def of(self, name: str) -> list[tuple[int, float]]:
        """One dataset's curve: steps of the whole run, and losses. A new stage begins where the last one ended."""
        return [
            (stage.start + point.step, point.parts[name])
            for stage in self.stages
            for point in stage.log.held_out
            if name in point.parts
        ]

    def forgetting(self) -> dict[str, float]:
        """By how much each earlier dataset's loss has risen since its own turn ended, or since the run began."""
        rises = {}
        for name in self.last.parts:
            turns = [stage.log.held_out[-1] for stage in self.stages if stage.name == name]
            known = turns[-1].parts[name] if turns else self.of(name)[0][1]
            if self.stages[-1].name != name:
                rises[name] = self.last.parts[name] - known
        return rises

    def adaptation(self) -> dict[str, float]:
        """By how much each dataset's loss fell during its last turn."""
        turns = {stage.name: stage.log.held_out for stage in self.stages}
        return {name: curve[0].parts[name] - curve[-1].parts[name] for name, curve in turns.items()}

    def average(self) -> float:
        """The paper's main score: the mean of the last losses over all datasets."""
        return self.last.loss

    def spike(self, name: str) -> float:
        """How far a dataset's loss rose above where the last turn began, as a share of it; 0 when it never did."""
        curve = [point.parts[name] for point in self.stages[-1].log.held_out]
        return max(curve) / curve[0] - 1

    @property
    def last(self) -> Logged:
        """The newest held-out point.

        Raises:
            TrainingError: when nothing was measured.
        """
        if not self.stages or not self.stages[-1].log.held_out:
            raise TrainingError("there are no curves yet: train on a stream with held-out samples first")
        return self.stages[-1].log.held_out[-1]
