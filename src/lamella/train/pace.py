"""The number of training steps that fit a given time: measured once and saved, so that an interrupted run keeps it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lamella.errors import TrainingError
from lamella.files import write
from lamella.needs import now
from lamella.train.attention import fast_attention
from lamella.train.config import TrainConfig
from lamella.train.parameters import Choice, choose, only
from lamella.train.recompute import recomputing
from lamella.train.task import Task


class TooLittleTime(TrainingError):
    """A time too short for any useful training."""


REPEATS = 2  # measurements after a warm-up; the faster one counts
MIN_STEPS = 8  # a shorter schedule heals nothing
OVERHEAD = 1.1  # factor for optimizer, log and checkpoints


def config_for_time(
    model: nn.Module,
    samples: Sequence[Any],
    task: Task,
    config: TrainConfig,
    seconds: float,
    *,
    trainable: Choice | None = None,
    out: Path,
) -> TrainConfig:
    """Return a training run that takes about the given time, on this machine under its current load.

    Args:
        model: a model or a view; it is not changed.
        samples: see :func:`lamella.train.fit`.
        task: see :func:`lamella.train.fit`.
        config: see :func:`lamella.train.fit`; its number of steps is replaced.
        seconds: the training time.
        trainable: see :func:`lamella.train.fit`.
        out: the folder of the run. The number of steps is saved next to it: a second call gives the same answer.

    Raises:
        TooLittleTime: if not even a few steps fit.
    """
    known = out.with_name(f"{out.name}.steps.json")
    if not known.exists():
        taken = min(_step(model, samples, task, config, trainable) for _ in range(1 + REPEATS))
        steps = int(seconds / taken)
        if steps < MIN_STEPS:
            raise TooLittleTime(
                f"{seconds:.0f} s suffice for {steps} steps of training at {taken:.1f} s each, fewer than the "
                f"{MIN_STEPS} needed: give more time, or do not heal"
            )
        out.parent.mkdir(parents=True, exist_ok=True)
        write(known, json.dumps({"steps": steps, "seconds per step": taken}) + "\n")
    return replace(config, steps=json.loads(known.read_text(encoding="utf-8"))["steps"])


def _step(model: Any, samples: Sequence[Any], task: Task, config: TrainConfig, trainable: Choice | None) -> float:
    """Return the time of one step's forward and backward passes, in seconds."""
    device = next(model.parameters()).device
    batch = {name: each.to(device) for name, each in task.collate(samples[: config.batch]).items()}
    trained = choose(model, trainable)
    again = recomputing(model, config.gradient_checkpointing)
    with only(model, trained), torch.enable_grad(), fast_attention(batch, config.bf16), again:
        begin = now()
        for _ in range(config.accumulate):
            with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
                result = task.loss(model, batch)
            (result if isinstance(result, torch.Tensor) else result[0]).backward()
        return (now() - begin) * OVERHEAD
