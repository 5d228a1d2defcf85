"""Training of attackers until they stop improving: an attacker that was stopped too early makes a cut look safe.

Some of the attacker's images are held out. At each rate in turn, from high to low, the attacker is trained until
its loss on these images has not improved for some evaluations, and continues from its best weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from lamella.train import EarlyStopping, Task, TrainConfig, fit

HELD_OUT, MOST_HELD_OUT = 5, 1024  # one in five of the attacker's images is held out, and at most 1,024
EVERY, PATIENCE = 50, 6  # steps between evaluations, and evaluations without improvement after which training stops
LONGEST = 10_000  # maximum number of steps at each rate


class Strength(NamedTuple):
    """How long an attacker was trained.

    Attributes:
        steps: number of steps, over all rates.
        converged: whether it had stopped improving before the maximum number of steps.
    """

    steps: int
    converged: bool


def train_to_convergence(
    attacker: nn.Module,
    samples: Sequence[Any],
    task: Task,
    config: TrainConfig,
    out: Path,
    *,
    rates: Sequence[float],
    trainable: Callable[[str], bool],
    settings: Mapping[str, Any],
) -> Strength:
    """Train an attacker in place, and keep its best weights on held-out samples.

    Args:
        attacker: the attacker.
        samples: training samples in random order; the first of them are held out.
        task: its loss.
        config: training configuration; steps is the maximum number at each rate, and lr is used in place of ``rates``.
        out: folder for checkpoints.
        rates: learning rates, from high to low.
        trainable: from the name of a parameter to whether it is trained.
        settings: further settings that determine the result.
    """
    kept = min(len(samples) // HELD_OUT, MOST_HELD_OUT)
    most = config.steps or LONGEST
    steps, converged = 0, True
    for rate in rates if config.lr is None else (config.lr,):
        at_rate = replace(config, lr=rate, steps=most, eval_every=EVERY, log_every=EVERY)
        log = fit(
            attacker,
            samples[kept:],
            task,
            at_rate,
            out=out / f"{rate:g}",
            trainable=trainable,
            held_out=samples[:kept],
            hooks=[EarlyStopping(PATIENCE)],
            settings=settings,
        )
        last = log.held_out[-1].step
        steps, converged = steps + last, converged and last < most
    return Strength(steps, converged)
