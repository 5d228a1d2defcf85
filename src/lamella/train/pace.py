"""How many steps of training fit a time: measured once, and kept, so that a run that was stopped goes on as it was."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lamella.errors import TrainingError
from lamella.files import write
from lamella.train.attention import quick_attention
from lamella.train.config import TrainConfig
from lamella.train.parameters import Choice, choose, only
from lamella.train.task import Task


class TooLittleTime(TrainingError):
    """A time in which no training fits that would change anything for the better."""


ROUNDS = 2  # of measuring, after one to warm up; the faster one counts
LEAST = 8  # steps: a schedule of fewer heals nothing
OVERHEAD = 1.1  # of optimizer, log and checkpoints, over the passes


def paced(
    model: nn.Module,
    samples: Sequence[Any],
    task: Task,
    config: TrainConfig,
    seconds: float,
    *,
    trainable: Choice | None = None,
    out: Path,
) -> TrainConfig:
    """A training run that takes about so long, on this machine and as busy as it is now.

    Args:
        model: a model or a view; nothing of it changes.
        samples, task, config, trainable, out: what :func:`lamella.train.fit` will be given. Beside ``out``, the number
            of steps is kept: asked again, the answer is the same.
        seconds: how long to train.

    Raises:
        TooLittleTime: when not even a few steps fit.
    """
    known = out.with_name(f"{out.name}.steps.json")
    if not known.exists():
        taken = min(_step(model, samples, task, config, trainable) for _ in range(1 + ROUNDS))
        steps = int(seconds / taken)
        if steps < LEAST:
            raise TooLittleTime(
                f"{steps} steps of training fit {seconds:.0f} s, at {taken:.1f} s each, and fewer than {LEAST} heal "
                "nothing: give more time, or do not heal"
            )
        out.parent.mkdir(parents=True, exist_ok=True)
        write(known, json.dumps({"steps": steps, "seconds per step": taken}) + "\n")
    return replace(config, steps=json.loads(known.read_text(encoding="utf-8"))["steps"])


def _step(model: Any, samples: Sequence[Any], task: Task, config: TrainConfig, trainable: Choice | None) -> float:
    """The seconds of one step's forward and backward passes."""
    device = next(model.parameters()).device
    batch = {name: each.to(device) for name, each in task.collate(samples[: config.batch]).items()}
    trained = choose(model, trainable)
    with only(model, trained), torch.enable_grad(), quick_attention(batch, config.bf16):
        begin = time.perf_counter()
        for _ in range(config.accumulate):
            with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
                result = task.loss(model, batch)
            (result if isinstance(result, torch.Tensor) else result[0]).backward()
        return (time.perf_counter() - begin) * OVERHEAD
