"""Train one slice of a model at a time: at every step one group of parameters is chosen, and only that one is updated.

    score     gradient norms of a separate loss for each slice; the gradients are not used otherwise
    choose    one slice, by the index of the step and these norms
    update    the gradient of the objective for that slice alone, clipped; all others have none

None is not zero: with gradients of zero, RMSprop would decay its state of a slice, and Adam would update it. With one
slice that is the whole model this is ordinary training, so methods with and without selection share one loop, one
optimizer and one order of samples.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lamella.files import write
from lamella.methods.irepair.sensitivity import Gradients, gradients_of, norms_of
from lamella.train import EarlyStopping, Hook, Sample, TrainConfig, TrainingRun, collate

Example = Mapping[str, Sample]  # corresponding samples, by their roles
Roles = dict[str, dict[str, Tensor]]  # for each role, the result of lamella.train.collate
Slice = Mapping[str, nn.Parameter]
Score = Callable[[Any, Roles], Tensor]
Choose = Callable[[int, Sequence[float]], int]

ALPHA = 0.99  # of RMSprop's running square; torch's default
TRACE = "trace.json"


@dataclass
class Choices:
    """The chosen slices and the sensitivities.

    Attributes:
        chosen: the slice of each step [steps].
        sensitivities: the gradient norms of each step [steps, slices]; empty without a score.
    """

    chosen: list[int] = field(default_factory=list)
    sensitivities: list[list[float]] = field(default_factory=list)

    @property
    def touched(self) -> list[int]:
        """Every slice that was chosen at some step."""
        return sorted(set(self.chosen))

    def write(self, path: Path) -> None:
        """Write the trace as JSON."""
        write(path, json.dumps(asdict(self)) + "\n")

    @classmethod
    def read(cls, path: Path) -> Choices:
        """Read what :meth:`write` wrote."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))


class SliceTraining(Hook):
    """Hook that chooses the slice of each step, and gives a gradient to that one alone.

    Its sensitivities cover the whole step, over all of its batches and processes.

    Args:
        slices: groups of the model's parameters, by name; a parameter is in at most one.
        choose: function of the step, counted from 1, and the sensitivities (empty without ``score``) that returns a
            slice.
        score: function of the model and a batch that returns the loss whose gradient norms are the sensitivities.
        per_parameter: see :func:`lamella.methods.irepair.sensitivity.norms_of`.
        bias_correction: RMSprop's running square of a slice starts at 0 and advances only when the slice is chosen, so
            the first step of each is ten times as large as later ones. True corrects it, as Adam does.

    Attributes:
        trace: the choices so far.
    """

    def __init__(
        self,
        slices: Sequence[Slice],
        choose: Choose,
        score: Score | None = None,
        *,
        per_parameter: bool = False,
        bias_correction: bool = False,
    ) -> None:
        self.slices, self.choose, self.score = slices, choose, score
        self.per_parameter, self.bias_correction = per_parameter, bias_correction
        self.trace = Choices()

    def optimizer(self, model: nn.Module, trained: Slice, config: TrainConfig) -> torch.optim.Optimizer:
        """Create the optimizer of the run: RMSprop with a group for each slice.

        Args:
            model: the model; unused.
            trained: the trained parameters; unused.
            config: training settings; unused.
        """
        return torch.optim.RMSprop([{"params": list(own.values())} for own in self.slices], lr=1.0, alpha=ALPHA)

    @property
    def touched(self) -> dict[str, nn.Parameter]:
        """The parameters of every slice that was chosen so far."""
        return {name: each for number in self.trace.touched for name, each in self.slices[number].items()}

    def before_step(self, run: TrainingRun) -> None:
        """Choose the slice of the step."""
        norms: list[float] = []
        if self.score is not None:
            norms = self._sensitivities(run, self.score).tolist()
            self.trace.sensitivities.append(norms)
        chosen = self.choose(run.step + 1, norms)
        self.trace.chosen.append(chosen)
        for number, own in enumerate(self.slices):
            for parameter in own.values():
                parameter.requires_grad_(number == chosen)
        if self.bias_correction:
            times = self.trace.chosen.count(chosen)
            run.optimizer.param_groups[chosen]["lr"] *= math.sqrt(1 - ALPHA**times)

    def _sensitivities(self, run: TrainingRun, score: Score) -> Tensor:
        """The gradient norms of the step's score for each slice [slices]."""
        for own in self.slices:
            for parameter in own.values():
                parameter.requires_grad_(True)
        run.model.eval()
        scores, gradients = [], []
        for batch in run.batches:
            value = score(run.model, batch)
            scores.append(value.detach())
            gradients.append(gradients_of(value, self.slices))
        value = run.weigh(scores)
        run.check(value, "score")
        run.note("score", value)
        norms = norms_of(self._of_step(run, gradients), self.slices, self.per_parameter)
        run.check(norms, "sensitivity")
        return norms

    def _of_step(self, run: TrainingRun, batches: Sequence[Gradients]) -> Gradients:
        """The gradients of the whole step, from those of this process's batches."""
        return [
            [
                run.weigh([torch.zeros_like(parameter) if each is None else each for each in gradients])
                for parameter, *gradients in zip(own.values(), *found, strict=True)
            ]
            for own, *found in zip(self.slices, *batches, strict=True)
        ]

    def save(self, folder: Path) -> None:
        """Save the trace with a checkpoint."""
        self.trace.write(folder / TRACE)

    def load(self, folder: Path) -> None:
        """Load the trace of a checkpoint."""
        self.trace = Choices.read(folder / TRACE)


class BestSlices(EarlyStopping):
    """Hook that keeps the trained parameters of the lowest held-out loss, and restores them at the end.

    Args:
        slices: the hook that chooses the slices; it must be called before this one.
        patience: evaluations without improvement after which training stops.
    """

    def __init__(self, slices: SliceTraining, patience: int) -> None:
        super().__init__(patience)
        self.slices = slices

    def watched(self, run: TrainingRun) -> Slice:
        """The parameters that may have changed."""
        return self.slices.touched

    def before_step(self, run: TrainingRun) -> None:
        """Keep the original values of a slice that is chosen for the first time."""
        for name, parameter in self.slices.touched.items():
            if name not in self.best:  # chosen for the first time: unchanged so far, at the best point too
                self.best[name] = parameter.detach().clone()


def by_role(examples: Sequence[Example]) -> Roles:
    """Collate examples into one batch per role."""
    return {role: collate([example[role] for example in examples]) for role in examples[0]}


def count_examples(batch: Roles) -> int:
    """Number of examples in a batch."""
    return len(next(iter(batch.values()))["input_ids"])
