"""The needs of a training run, from two of its steps on tensors without values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lamella.needs import Recorder, has_values
from lamella.progress import tracker
from lamella.train.attention import fast_attention
from lamella.train.config import TrainConfig
from lamella.train.log import Logged, TrainingLog
from lamella.train.loop import Objective
from lamella.train.mixing import Feed
from lamella.train.optimizers import Factory
from lamella.train.parameters import only
from lamella.train.recompute import recomputing
from lamella.train.runs import LOG
from lamella.train.task import Task

STEPS = 2  # that are recorded: the second holds the optimizer's state
LONGEST = 16  # steps of the run among which the one with the longest samples is chosen, since it needs most memory


def record_run(
    recorder: Recorder,
    model: nn.Module,
    feed: Feed,
    task: Task,
    config: TrainConfig,
    trained: dict[str, nn.Parameter],
    factory: Factory,
    sets: Mapping[str, Sequence[Any]],
    out: Path,
) -> TrainingLog:
    """Record a training run; see :func:`lamella.train.fit`. The model stays as it is.

    Args:
        recorder: what counts.
        model: the model without values.
        feed: the samples; a batch of long ones is read, others need no more.
        task: the loss, and the other parts of a step.
        config: steps and batch sizes.
        trained: the trained parameters by name.
        factory: makes the optimizer.
        sets: held-out samples by name.
        out: where the log is written.

    Returns:
        A log with the first and the last step, whose losses are placeholders.
    """
    assert config.steps is not None
    device = next(model.parameters()).device
    order = feed.order(min(LONGEST, config.steps), config.batch, config.seed)
    batches = [[order[start + each] for each in range(config.batch)] for start in range(0, len(order), config.batch)]
    samples = max(batches, key=lambda batch: sum(map(_size, batch)))
    objective = Objective(model, task).train()
    optimizer = factory(model, trained, config)
    models = nn.ModuleList([model, *task.frozen])
    values = {name: each.detach().clone() for name, each in trained.items() if has_values(each)}

    def passes(batch: Any) -> dict[str, float]:
        def forward(given: Any) -> Any:
            with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
                return objective(**given)

        with fast_attention(batch, config.bf16):
            _, parts = task.passes(forward, batch, lambda loss, **options: loss.backward(**options))
        return dict.fromkeys(parts, 1.0)

    with (
        tracker("training", STEPS) as count,
        only(model, trained),
        torch.enable_grad(),
        recomputing(models, config.gradient_checkpointing),
        recorder.times(config.steps / STEPS),
    ):
        for _ in range(STEPS):
            with recorder.times(config.accumulate):
                parts = passes(_moved(task.collate(samples), device))
            nn.utils.clip_grad_norm_(trained.values(), config.clip)
            cast(Any, optimizer).step()
            optimizer.zero_grad()
            count()
    model.eval()
    evaluations = 1 + config.steps // (config.eval_every or config.save_every)
    for judged in filter(len, sets.values()):
        with torch.no_grad(), recorder.times(evaluations * math.ceil(len(judged) / config.batch)):
            objective(**_moved(task.collate(list(judged[: config.batch])), device))
    with torch.no_grad():
        for name, before in values.items():
            trained[name].copy_(before)
    steps = (1, config.steps)
    known = {**parts, **dict.fromkeys(filter(None, sets), 1.0)}
    log = TrainingLog(
        {**config.as_dict(1), "loss": task.name},
        [Logged(step, 1.0, parts, lr=0.0) for step in steps],
        [Logged(step, 1.0, known) for step in steps] if any(map(len, sets.values())) else [],
    )
    out.mkdir(parents=True, exist_ok=True)
    log.write(out / LOG)
    return log


def _size(sample: Any) -> int:
    """Return the number of elements of a sample; 0 for one that is no mapping of tensors."""
    values = sample.values() if hasattr(sample, "values") else ()
    return sum(each.numel() for each in values if isinstance(each, Tensor))


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    return {name: _moved(each, device) for name, each in batch.items()} if hasattr(batch, "items") else batch
