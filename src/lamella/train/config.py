"""What a training run is: how long, how fast, on how much at once, and what is kept of it on the way."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from lamella.errors import TrainingError
from lamella.train.schedules import Schedule, infinite, rewarm, step_decay, warmup_stable_decay

ScheduleName = Literal["cosine", "linear", "constant", "rewarm", "infinite", "wsd", "step"]

FALLING = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}  # as Trainer names them
SHAPES: dict[str, Callable[..., Schedule]] = {
    "rewarm": rewarm,
    "infinite": infinite,
    "wsd": warmup_stable_decay,
    "step": step_decay,
}
WARMUP = 0.03  # of the steps


class Rates(NamedTuple):
    """What Trainer is told of the learning rate: a schedule, whose rates are multiples of 1, or a name and numbers."""

    schedule: Schedule | None
    lr: float = 1.0
    name: str = "constant"
    warmup: int = 0


@dataclass(frozen=True)
class TrainConfig:
    """A training run in numbers: one value, which whoever trains takes and passes on.

    In Python the schedule may also be a :class:`lamella.train.Schedule`, or a function from the steps to one: these
    have rates of their own, so lr and warmup are left out. In a sharded run the model itself stays where it is, best on
    the host, and gets the result.

    Attributes:
        steps: optimizer steps; one pass over the samples when left out.
        lr: the highest learning rate.
        schedule: cosine or linear (down to 0), constant, rewarm (down to a tenth), wsd (stay, then anneal), step
            (stay, then a tenth) or infinite.
        warmup: over which the rate rises: a share of the steps, or from 1 on their number; 0.03 when left out.
        batch: samples in one forward pass of one process.
        accumulate: forward passes for one step.
        weight_decay: of weight matrices; biases, norms and other vectors have none.
        betas: of AdamW.
        clip: the largest norm of a gradient.
        seed: of the order of samples and of dropout.
        save_every: steps from one checkpoint to the next.
        log_every: steps from one point of the log to the next.
        eval_every: steps from one held-out loss to the next; with each checkpoint when left out.
        bf16: compute in bfloat16 what can be; parameters, gradients and optimizer state keep their precision.
        tensorboard: a folder in which TensorBoard finds the curves while training runs (extra tensorboard).
        shard: split weights, gradients and optimizer state over the processes, where one device cannot hold them.

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
    tensorboard: str | None = None
    shard: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "save_every", "log_every", "eval_every"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise TrainingError(f"{name} {count}: give at least 1")
        if not self.clip > 0:
            raise TrainingError(f"clip {self.clip:g}: give the largest norm of a gradient, above 0")

    def with_steps(self, samples: int, processes: int = 1) -> TrainConfig:
        """The same run with its number of steps: where it has none, one pass over so many samples."""
        size = self.batch * self.accumulate * processes
        return replace(self, steps=self.steps or max(1, samples // size))

    def with_schedule(self, schedule: Schedule | Callable[[int], Schedule]) -> TrainConfig:
        """The same run with another schedule, which has its own rates."""
        return replace(self, schedule=schedule, lr=None, warmup=None)

    @property
    def rates(self) -> Rates:
        """What Trainer is told of the rate, for a run whose steps are known.

        Raises:
            TrainingError: for an unknown schedule, one without a rate, or with one that it does not need.
        """
        assert self.steps is not None
        if not isinstance(self.schedule, str):
            if self.lr is not None or self.warmup is not None:
                raise TrainingError("this schedule has its own rates and warm-up: leave lr and warmup out")
            return Rates(self.schedule if isinstance(self.schedule, Schedule) else self.schedule(self.steps))
        if self.schedule not in FALLING | SHAPES:
            raise TrainingError(f"schedule '{self.schedule}': choose one of {', '.join([*FALLING, *SHAPES])}")
        if self.schedule in SHAPES:
            return Rates(self.shaped(SHAPES[self.schedule]))
        warmup = WARMUP if self.warmup is None else self.warmup
        warming = math.ceil(warmup if warmup >= 1 else warmup * self.steps)
        return Rates(None, self._highest, FALLING[self.schedule], warming)

    def shaped(self, shape: Callable[..., Schedule], **options: Any) -> Schedule:
        """A schedule of a shape, such as :func:`lamella.train.rewarm`, with this run's steps, lr and given warm-up.

        Raises:
            TrainingError: for a run without lr.
        """
        assert self.steps is not None
        if self.warmup is not None:
            options["warmup"] = self.warmup if self.warmup < 1 else self.warmup / self.steps
        return shape(self.steps, self._highest, **options)

    @property
    def _highest(self) -> float:
        if self.lr is None:
            raise TrainingError(f"schedule '{self.schedule}' needs lr, its highest learning rate")
        return self.lr

    def as_dict(self, processes: int) -> dict[str, Any]:
        """All that decides the result, as JSON values: what a record says and a resumed run compares."""
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
