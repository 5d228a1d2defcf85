r"""Learning rate schedules as pure functions of the optimizer step.

Ibrahim et al., "Simple and Scalable Strategies to Continually Pre-train Large Language Models", arXiv 2403.08763.

    Cosine      /\\__          warm-up, then a cosine decay to a minimum; restarted for every dataset ("re-warming")
    Infinite    /\\___ ... \\   warm-up, cool-down, constant while data comes, annealed when a model is needed

These are the shapes that transformers.get_scheduler lacks, and the two of its own that recipes here need with a first
step above 0; ``cosine``, ``linear`` and ``constant`` of a TrainConfig are transformers'.

Step t counts optimizer steps from 1, however many forward passes each of them takes. No schedule starts at the rate 0:
t = 0 counts as 1. Rates are continuous between phases.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lamella.errors import TrainingError, listed


class Schedule:
    """From the number of an optimizer step, counted from 1, to its learning rate."""

    def __call__(self, t: int) -> float:
        """Return the learning rate of step ``t``."""
        raise NotImplementedError

    def after(self, steps: int) -> Schedule:
        """Return the same schedule for a run that begins after ``steps`` of its steps."""
        return Continued(self, steps) if steps else self

    def as_dict(self) -> dict[str, Any]:
        """Return the shape and its parameters as JSON values, for records and to check a resumed run."""
        return {"shape": type(self).__name__.lower(), **asdict(self)}  # type: ignore[call-overload]


@dataclass(frozen=True)
class Constant(Schedule):
    """Linear warm-up, then constant.

    Attributes:
        high: the rate after the warm-up.
        warmup: n_w, warm-up steps.
    """

    high: float
    warmup: int = 0

    def __post_init__(self) -> None:
        _check_order("constant", 0, self.warmup)
        _check_rates("constant", self.high, self.high)

    def __call__(self, t: int) -> float:
        """Return the learning rate of step ``t``."""
        return self.high * max(t, 1) / max(self.warmup, 1) if t <= self.warmup else self.high


@dataclass(frozen=True)
class StepDecay(Schedule):
    """Linear warm-up, constant, then constant at a lower rate.

    Attributes:
        high: the rate after the warm-up.
        low: the rate of all steps after ``until``.
        warmup: n_w, warm-up steps.
        until: the last step at the high rate.
    """

    high: float
    low: float
    warmup: int
    until: int

    def __post_init__(self) -> None:
        _check_order("step decay", 0, self.warmup, self.until)
        _check_rates("step decay", self.low, self.high)

    def __call__(self, t: int) -> float:
        """Return the learning rate of step ``t``."""
        return self.low if t > self.until else Constant(self.high, self.warmup)(t)


@dataclass(frozen=True)
class Cosine(Schedule):
    """Linear warm-up, then a cosine decay to a minimum.

    The cosine starts at the end of the warm-up and ends at ``low``, which differs from a clipped cosine that ends at 0.

    Attributes:
        high: eta_max, the rate at the end of the warm-up.
        low: eta_min, the rate of step ``end`` and of all after it.
        warmup: n_w, warm-up steps.
        end: T, the last step.
    """

    high: float
    low: float
    warmup: int
    end: int

    def __post_init__(self) -> None:
        _check_order("cosine", 0, self.warmup, self.end)
        _check_rates("cosine", self.low, self.high)

    def __call__(self, t: int) -> float:
        """Return the learning rate of step ``t``."""
        if t <= self.warmup:
            return Constant(self.high, self.warmup)(t)
        x = _progress(t, self.warmup, self.end)
        return self.low + (self.high - self.low) / 2 * (1 + math.cos(math.pi * x))


@dataclass(frozen=True)
class Infinite(Schedule):
    """Warm-up, cool-down to a constant rate without an end, and an exponential anneal if ``anneal`` is given.

    Attributes:
        high: eta_max, the rate at the end of the warm-up.
        const: eta_const, the rate between cool-down and anneal.
        low: eta_min, the rate of step ``end`` and of all after it.
        warmup, cooled: n_w and n_cd, the last steps of the warm-up and of the cool-down. With ``cooled == warmup`` and
            ``const == high`` this is warm-up-stable-decay.
        anneal, end: n_ann and n_end, the first and last steps of the anneal; None: there is no anneal, as with ``anneal
            == end``.
        cooldown: ``cosine``, or ``invsqrt`` for an inverse square root.
        timescale: a, the steepness of the inverse square root.
    """

    high: float
    const: float
    low: float
    warmup: int
    cooled: int
    anneal: int | None = None
    end: int | None = None
    cooldown: Literal["cosine", "invsqrt"] = "cosine"
    timescale: float = 10.0

    def __post_init__(self) -> None:
        if (self.anneal is None) != (self.end is None):
            raise TrainingError("an infinite schedule needs both the start and the end of its anneal, or neither")
        _check_order("infinite", 0, self.warmup, self.cooled, *(t for t in (self.anneal, self.end) if t is not None))
        _check_rates("infinite", self.low, self.const, self.high)
        if self.low == 0 or self.timescale <= 0 or self.cooldown not in ("cosine", "invsqrt"):
            raise TrainingError(
                f"an infinite schedule with low {self.low:g}, timescale {self.timescale:g} and "
                f"cooldown '{self.cooldown}': give positive numbers, and cosine or invsqrt"
            )

    def __call__(self, t: int) -> float:
        """Return the learning rate of step ``t``."""
        if t <= self.warmup or (t <= self.cooled and self.cooldown == "cosine"):
            return Cosine(self.high, self.const, self.warmup, self.cooled)(t)
        if t <= self.cooled:
            x = _progress(t, self.warmup, self.cooled)
            return self.high + (self.const - self.high) * self._inverse_sqrt(x) / self._inverse_sqrt(1.0)
        if self.anneal is None or self.end is None or t <= self.anneal or self.end == self.anneal:
            return self.const
        return self.const * (self.low / self.const) ** _progress(t, self.anneal, self.end)

    def _inverse_sqrt(self, x: float) -> float:
        return (1 + self.timescale * x) ** -0.5 - 1


@dataclass(frozen=True)
class Continued(Schedule):
    """A schedule of which some steps are done already.

    Attributes:
        schedule: the complete schedule.
        done: the number of its earlier steps.
    """

    schedule: Schedule
    done: int

    def __call__(self, t: int) -> float:
        """Return the learning rate of step ``t`` of the continued run."""
        return self.schedule(self.done + max(t, 1))

    def as_dict(self) -> dict[str, Any]:
        """Return the schedule's parameters with the number of completed steps."""
        return {**self.schedule.as_dict(), "done": self.done}


def rewarm(steps: int, lr: float, *, floor: float = 0.1, warmup: float = 0.01) -> Cosine:
    """Re-warm and re-decay: the paper's schedule for one more dataset.

    Args:
        steps: T, of the whole run on that dataset.
        lr: eta_max; the paper uses that of pre-training.
        floor: eta_min / eta_max.
        warmup: n_w as a fraction of the steps; its length hardly matters.
    """
    return Cosine(lr, floor * lr, _steps(warmup, steps), steps)


def infinite(
    steps: int,
    lr: float,
    *,
    const: float = 0.55,
    floor: float = 0.1,
    warmup: float = 0.01,
    cooled: float = 0.6,
    anneal: float | None = 0.85,
    cooldown: Literal["cosine", "invsqrt"] = "cosine",
) -> Infinite:
    """Return the paper's infinite schedule for a first run of the given length, with the constants of its 405M model.

    Args:
        steps: n_end, when the first annealed model is needed.
        lr: eta_max.
        const: eta_const / eta_max.
        floor: eta_min / eta_max.
        warmup: end of the warm-up, as a fraction of the steps.
        cooled: end of the cool-down, as a fraction of the steps.
        anneal: start of the anneal, as a fraction of the steps; None omits it.
        cooldown: the shape of the cool-down.
    """
    begin, end = (None, None) if anneal is None else (_steps(anneal, steps), steps)
    ends = (_steps(warmup, steps), _steps(cooled, steps), begin, end)
    return Infinite(lr, const * lr, floor * lr, *ends, cooldown)


def warmup_stable_decay(
    steps: int, lr: float, *, floor: float = 0.1, warmup: float = 0.01, anneal: float = 0.85
) -> Infinite:
    """Return the schedule of warm-up, constant peak rate and anneal: the infinite schedule without its cool-down.

    Args:
        steps: number of optimizer steps of the run.
        lr: peak learning rate.
        floor: final learning rate as a fraction of the peak.
        warmup: fraction of the steps in which the rate rises.
        anneal: fraction of the steps after which the rate falls.
    """
    begin = _steps(warmup, steps)
    return Infinite(lr, lr, floor * lr, begin, begin, max(_steps(anneal, steps), begin), steps)


def constant(steps: int, lr: float, *, warmup: float = 0.01) -> Constant:
    """Return the schedule of a linear warm-up and a constant rate.

    Args:
        steps: number of optimizer steps of the run.
        lr: learning rate after the warm-up.
        warmup: fraction of the steps in which the rate rises.
    """
    return Constant(lr, _steps(warmup, steps))


def step_decay(steps: int, lr: float, *, floor: float = 0.1, warmup: float = 0.0, until: float = 10 / 11) -> StepDecay:
    """Constant at the peak rate, then at a tenth of it; vision papers use 1000 of 1100 epochs at the peak rate.

    Args:
        steps: of the whole run.
        lr: the peak rate.
        floor: the low rate, as a fraction of it.
        warmup: end of the warm-up, as a fraction of the steps.
        until: end of the peak rate, as a fraction of the steps.
    """
    begin = _steps(warmup, steps)
    return StepDecay(lr, floor * lr, begin, max(_steps(until, steps), begin))


def _steps(share: float, steps: int) -> int:
    return math.ceil(round(share * steps, 9))  # 0.55 * 100 is a little more than 55


def _progress(t: int, begin: int, end: int) -> float:
    """Return the progress within a phase, from 0 to 1."""
    return (min(max(t, 1), end) - begin) / (end - begin) if end > begin else 1.0


def _check_order(shape: str, *ends: int) -> None:
    if list(ends) != sorted(ends):
        raise TrainingError(
            f"the phases of a {shape} schedule end at steps {listed(ends[1:])}: give them in ascending order"
        )


def _check_rates(shape: str, *rates: float) -> None:
    if list(rates) != sorted(rates) or rates[0] < 0 or not math.isfinite(rates[-1]):
        raise TrainingError(
            f"the rates of a {shape} schedule, from the lowest, are {listed(rates)}: give ascending rates from 0 on"
        )
