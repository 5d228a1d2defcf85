"""The training loop: a thin layer over ``transformers.Trainer``.

It adds arbitrary loss functions, training of selected parameters only, the same batches for any number of processes,
checkpoints of trained parameters only, and bit-exact resumption from the newest complete checkpoint.
"""

from __future__ import annotations

import atexit
import gc
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed
from torch import nn
from transformers import TrainingArguments
from transformers.integrations import TensorBoardCallback

from lamella import processes
from lamella.errors import TrainingError
from lamella.extras import require
from lamella.needs import current_recorder
from lamella.progress import tracker
from lamella.train.config import TrainConfig
from lamella.train.hooks import Hook, TrainingRun
from lamella.train.log import TrainingLog
from lamella.train.loop import Loop, Objective
from lamella.train.mixing import Feed
from lamella.train.optimizers import Factory, adamw, factory_name, state_of
from lamella.train.parameters import Choice, choose, only
from lamella.train.recompute import recomputing
from lamella.train.record import record_run
from lamella.train.runs import as_json, model_digest, samples_digest
from lamella.train.sharding import ShardedLoop
from lamella.train.task import Loss, Task, batching
from lamella.train.watch import Watch


def fit(
    model: nn.Module,
    samples: Sequence[Any] | Feed,
    task: Task,
    config: TrainConfig,
    *,
    out: str | Path,
    trainable: Choice | None = None,
    optimizer: Factory = adamw,
    held_out: Sequence[Any] | Mapping[str, Sequence[Any]] = (),
    after: Path | None = None,
    hooks: Sequence[Hook] = (),
    settings: Mapping[str, Any] | None = None,
) -> TrainingLog:
    """Train some of a model's parameters, in place.

    Called again after an interruption, with a model created in the same way, it resumes from the newest complete
    checkpoint in ``out``; on a CPU the result is bit-identical to an uninterrupted run. Training runs on the model's
    device. Nothing is written outside ``out``.

    Under ``accelerate launch --multi_gpu`` every process runs ``config.batch`` samples of each step. On CPUs the flag
    is the same; ``--cpu`` starts only one process, whatever ``--num_processes`` is.

    A view shares its tensors with the model it was made of: call :func:`lamella.train.own` first on the trained
    parameters, unless these are adapters or routers of its own.

    Args:
        model: a model or a view.
        samples: training samples, such as :func:`lamella.train.pairs` or :func:`lamella.train.blocks` make. They are
            reshuffled each epoch. A :class:`lamella.train.Feed` mixes in others.
        task: the loss, and the other parts of a step.
        config: steps, learning rates, batch sizes, seed, checkpoints and logging.
        out: the run's folder: checkpoints, ``log.json``, the run's settings and, if old samples are replayed,
            ``replay.json``, which lists each of them.
        trainable: from a parameter's name to whether it trains; None: those that require a gradient.
        optimizer: makes the optimizer and its parameter groups.
        held_out: held-out samples; or several sets by name, whose losses are the parts of a held-out point and their
            mean its loss.
        after: the folder of a finished run of the same parameters, whose optimizer state this one starts from.
        hooks: hooks such as fixed masks, in the order in which they are called.
        settings: further settings that determine the result, such as the weights of the loss's parts: a run with other
            settings is not resumed. JSON values.

    Returns:
        The log, also in ``out/log.json``. The newest checkpoint stays in ``out``.

    Raises:
        TrainingError: for an invalid argument, a folder with another run, or a loss or gradient that is not finite.
    """
    out = Path(out)
    feed = samples if isinstance(samples, Feed) else Feed(samples)
    config = config.with_steps(len(feed.samples), processes.count())
    sets = held_out if isinstance(held_out, Mapping) else {"": held_out}
    start = None if after is None else state_of(after)
    trained = choose(model, trainable)
    recorder = current_recorder()
    if recorder is not None:
        return record_run(recorder, model, feed, task, config, trained, optimizer, sets, out)
    arguments = _arguments(model, config, out)
    if config.shard:
        _check_splits(hooks, start)
    else:
        _check_device(model, arguments.device)
    if arguments.world_size > 1:
        atexit.unregister(_leave_group)  # once, however often fit is called
        atexit.register(_leave_group)
    record = {
        **config.as_dict(arguments.world_size),
        "loss": task.name,
        **(settings or {}),
        "model": model_digest(model, trained),
        **feed.as_dict(),
        **({} if optimizer is adamw else {"algorithm": factory_name(optimizer)}),
        "optimizer": start and hashlib.sha256(start.read_bytes()).hexdigest(),
        "eval_samples": {name: samples_digest(each) for name, each in sets.items()},
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"{out}: cannot be written ({error.strerror}): give another folder") from None
    changes = [name for hook in hooks for name in hook.changes]
    order = feed.order(arguments.max_steps, config.accumulate * config.batch * arguments.world_size, config.seed)
    with tracker("training", arguments.max_steps) as count, only(model, trained), torch.enable_grad():
        if config.shard:
            loop: Loop = ShardedLoop(model, task, config, trained, arguments, order, optimizer, changes)
        else:
            loop = Loop(Objective(model, task), task, config, trained, arguments, order, optimizer, start, changes)
        run = TrainingRun(loop, as_json(record))
        watch = Watch(loop, run, sets, config, hooks, count)
        loop.add_callback(watch)
        if config.tensorboard is not None:
            writer = require("torch.utils.tensorboard", "tensorboard", "a log for TensorBoard")
            loop.add_callback(TensorBoardCallback(writer.SummaryWriter(config.tensorboard)))
        checkpoint = watch.open(out)
        if checkpoint is not None and watch.done:
            loop.read(checkpoint)
        else:
            models = nn.ModuleList([cast(nn.Module, loop.model), *task.frozen])
            with recomputing(models, config.gradient_checkpointing):
                loop.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        for hook in hooks:
            hook.end(run)
    return run.log


def fit_policy(
    view: nn.Module,
    samples: Sequence[Any],
    loss: Loss,
    config: TrainConfig,
    *,
    out: str | Path,
    settings: Mapping[str, Any],
    hooks: Sequence[Hook] = (),
) -> TrainingLog:
    """Train the policy of a view, such as its routers, while the model is frozen; see :func:`fit`.

    Args:
        view: its ``lamella_policy`` is trained in place.
        samples: rows of text, or of images with text.
        loss: see :class:`lamella.train.Task`.
        config: see :func:`fit`.
        out: see :func:`fit`.
        settings: see :func:`fit`.
        hooks: see :func:`fit`.
    """
    task = Task(loss, collate=batching(samples))
    return fit(view, samples, task, config, out=out, trainable=of_policy, hooks=hooks, settings=settings)


def of_policy(name: str) -> bool:
    """Return whether a parameter of a view belongs to its policy."""
    return name.startswith("lamella_policy.")


def _arguments(model: nn.Module, config: TrainConfig, out: Path) -> TrainingArguments:
    """Return the arguments of Trainer."""
    rates = config.rates
    on_cpu = next(model.parameters()).device.type == "cpu"
    assert config.steps is not None
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=config.steps,
        learning_rate=rates.lr,
        lr_scheduler_type=rates.name,
        warmup_steps=rates.warmup,
        max_grad_norm=config.clip,
        bf16=config.bf16,
        per_device_train_batch_size=config.batch,
        gradient_accumulation_steps=config.accumulate,
        train_sampling_strategy="sequential",  # see Order
        seed=config.seed,
        save_steps=config.save_every,
        logging_strategy="no",  # see Watch
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to=[],
        remove_unused_columns=False,
        use_cpu=on_cpu and not (config.shard and torch.accelerator.is_available()),
        dataloader_pin_memory=False,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # without a launcher, Trainer would spread over all GPUs
    return arguments


def _check_splits(hooks: Sequence[Hook], start: Path | None) -> None:
    """Raise an error for what a sharded run does not support."""
    whole = [type(hook).__name__ for hook in hooks if not hook.splits]
    if whole:
        raise TrainingError(f"{whole[0]} needs whole parameters, which a sharded run splits: omit shard")
    if start is not None:
        raise TrainingError("a sharded run cannot start from an earlier optimizer state: omit after")


def _check_device(model: nn.Module, device: torch.device) -> None:
    """Raise an error if Trainer would move the model, and with its shared tensors the original."""
    current = next(model.parameters()).device
    if (current.type, current.index or 0) != (device.type, device.index or 0):
        raise TrainingError(f"the model is on {current}, this process trains on {device}: move the model there first")


def _leave_group() -> None:
    """End gloo's threads before the interpreter exits: one that is still running aborts a finished run."""
    gc.collect()  # a cycle in the wrapped model holds the group too; the threads end with its last reference
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
