"""The configuration of a training run: its length, learning rates, batch sizes and checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from lamella.errors import TrainingError
from lamella.train.schedules import Schedule, infinite, rewarm, step_decay, warmup_stable_decay

ScheduleName = Literal["cosine", "linear", "constant", "rewarm", "infinite", "wsd", "step"]

TRAINER_NAMES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}  # as Trainer names them
SHAPES: dict[str, Callable[..., Schedule]] = {
    "rewarm": rewarm,
    "infinite": infinite,
    "wsd": warmup_stable_decay,
    "step": step_decay,
}
WARMUP = 0.03  # of the steps


class Rates(NamedTuple):
    """The learning rate as Trainer needs it: a schedule with rates relative to 1, or a name and numbers."""

    schedule: Schedule | None
    lr: float = 1.0
    name: str = "constant"
    warmup: int = 0


@dataclass(frozen=True)
class TrainConfig:
    """The hyperparameters of a training run.

    In Python the schedule may also be a :class:`lamella.train.Schedule`, or a function from the number of steps to one:
    these have their own rates, so lr and warmup are omitted. In a sharded run the model itself stays where it is,
    preferably on the host, and receives the result.

    Attributes:
        steps: optimizer steps; one epoch by default.
        lr: peak learning rate.
        schedule: cosine or linear (decay to 0), constant, rewarm (decay to a tenth), wsd (stable, then anneal), step
            (stable, then a tenth) or infinite.
        warmup: learning rate warm-up: a fraction of the steps, or from 1 on their number; 0.03 by default.
        batch: samples per forward pass of one process.
        accumulate: forward passes per step (gradient accumulation).
        weight_decay: of weight matrices; biases, norms and other vectors have none.
        betas: of AdamW.
        clip: maximum gradient norm.
        seed: of the order of samples and of dropout.
        save_every: steps between checkpoints.
        log_every: steps between points of the log.
        eval_every: steps between evaluations of the held-out loss; at each checkpoint by default.
        bf16: compute in bfloat16 where possible; parameters, gradients and optimizer state keep their precision.
        gradient_checkpointing: keep only the inputs of a model's blocks, and compute the blocks again in the backward
            pass: a third more time for much less memory, with the same result.
        tensorboard: a folder for TensorBoard curves, written during training (extra tensorboard).
        shard: shard weights, gradients and optimizer state over the processes, where one device cannot hold them.

    Raises:
        TrainingError: for values out of range.
    """

    steps: int | None = None
    lr: float | None = None
    schedule: str | Schedule | Callable[[int], Schedule] = "cosine"
    warmup: float | None = None
    batch: int = 4
    accumulate: int = 1
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0
    seed: int = 0
    save_every: int = 100
    log_every: int = 10
    eval_every: int | None = None
    bf16: bool = False
    gradient_checkpointing: bool = False
    tensorboard: str | None = None
    shard: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "save_every", "log_every", "eval_every"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise TrainingError(f"{name} {count}: give at least 1")
        if not self.clip > 0:
            raise TrainingError(f"clip {self.clip:g}: give the maximum gradient norm, above 0")

    def with_steps(self, samples: int, processes: int = 1) -> TrainConfig:
        """Return the same configuration with a number of steps: one epoch of the samples if it has none.

        Args:
            samples: number of training samples.
            processes: number of processes, each with batches of its own.
        """
        size = self.batch * self.accumulate * processes
        return replace(self, steps=self.steps or max(1, samples // size))

    def with_schedule(self, schedule: Schedule | Callable[[int], Schedule]) -> TrainConfig:
        """Return the same run with another schedule, which has its own rates."""
        return replace(self, schedule=schedule, lr=None, warmup=None)

    @property
    def rates(self) -> Rates:
        """The learning rate as Trainer needs it, for a run whose number of steps is known.

        Raises:
            TrainingError: for an unknown schedule, one without a rate, or one with a rate that it does not need.
        """
        assert self.steps is not None
        if not isinstance(self.schedule, str):
            if self.lr is not None or self.warmup is not None:
                raise TrainingError("this schedule has its own rates and warm-up: omit lr and warmup")
            return Rates(self.schedule if isinstance(self.schedule, Schedule) else self.schedule(self.steps))
        if self.schedule not in TRAINER_NAMES | SHAPES:
            raise TrainingError(f"schedule '{self.schedule}': choose one of {', '.join([*TRAINER_NAMES, *SHAPES])}")
        if self.schedule in SHAPES:
            return Rates(self.shaped(SHAPES[self.schedule]))
        warmup = WARMUP if self.warmup is None else self.warmup
        warming = math.ceil(warmup if warmup >= 1 else warmup * self.steps)
        return Rates(None, self._peak_rate, TRAINER_NAMES[self.schedule], warming)

    def shaped(self, shape: Callable[..., Schedule], **options: Any) -> Schedule:
        """Return a schedule of a shape, such as :func:`lamella.train.rewarm`, with this run's steps, lr and warm-up.

        Raises:
            TrainingError: for a run without lr.
        """
        assert self.steps is not None
        if self.warmup is not None:
            options["warmup"] = self.warmup if self.warmup < 1 else self.warmup / self.steps
        return shape(self.steps, self._peak_rate, **options)

    @property
    def _peak_rate(self) -> float:
        if self.lr is None:
            raise TrainingError(f"schedule '{self.schedule}' needs lr, its peak learning rate")
        return self.lr

    def as_dict(self, processes: int) -> dict[str, Any]:
        """Return all settings that determine the result, as JSON values, for records and to check a resumed run."""
        rates = self.rates
        warmup = WARMUP if self.warmup is None else self.warmup
        named = {"schedule": self.schedule, "lr": self.lr, "warmup": warmup}
        return {
            "steps": self.steps,
            **({"schedule": rates.schedule.as_dict()} if rates.schedule else named),
            "batch": self.batch,
            "accumulate": self.accumulate,
            "processes": processes,
            **({"bf16": True} if self.bf16 else {}),
            **({"shard": True} if self.shard else {}),
            "weight_decay": self.weight_decay,
            "betas": self.betas,
            **({} if self.clip == TrainConfig.clip else {"clip": self.clip}),
            "seed": self.seed,
            "eval_every": self.eval_every,
        }
