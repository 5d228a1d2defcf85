"""The training loop: a thin layer over ``transformers.Trainer``.

What it adds: any loss function, only some parameters, the same batches however many processes share them, checkpoints
of what trains and nothing else, and a run that goes on by itself from its newest complete checkpoint, to the bit.
"""

from __future__ import annotations

import atexit
import gc
import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from accelerate.utils import send_to_device
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from lamella import processes
from lamella.errors import TrainingError
from lamella.files import sync
from lamella.progress import Tracker, tracker
from lamella.train.config import TrainConfig
from lamella.train.log import Point, TrainingLog
from lamella.train.loop import Loop, Objective
from lamella.train.mixing import Feed
from lamella.train.parameters import Choice, choose, only
from lamella.train.runs import LOG, check_same_run, model_digest, samples_digest, settled
from lamella.train.sharding import OPTIMIZER, ShardedLoop, whole
from lamella.train.task import Task

MANIFEST = "replay.json"


def fit(
    model: nn.Module,
    samples: Sequence[Any] | Feed,
    task: Task,
    config: TrainConfig,
    *,
    out: str | Path,
    trainable: Choice | None = None,
    held_out: Sequence[Any] | Mapping[str, Sequence[Any]] = (),
    after: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    after_step: Callable[[], None] | None = None,
) -> TrainingLog:
    """Train some of a model's parameters, in place, with AdamW.

    Called again after a kill, with a model made in the same way, it goes on from the newest complete checkpoint in
    ``out``; on a CPU the result is the same to the bit as without the kill. Training runs where the model is. Nothing
    is written outside ``out``.

    Under ``accelerate launch --multi_gpu`` every process runs ``config.batch`` samples of each step. On CPUs the flag
    is the same; ``--cpu`` starts one process only, whatever ``--num_processes`` says.

    A view shares its tensors with the model it was made of: call :func:`lamella.train.own` first on what trains, unless
    that is adapters or routers of its own.

    Args:
        model: a model or a view.
        samples: training samples, such as :func:`lamella.train.pairs` or :func:`lamella.train.blocks` make. They are
            shuffled anew for each pass. A :class:`lamella.train.Feed` mixes others in.
        task: the loss, and what else a step does.
        config: steps, rates, batches, seed, and what is kept on the way.
        out: the run's folder: checkpoints, ``log.json``, what the run is made of and, where old samples were replayed,
            ``replay.json`` with each of them.
        trainable: from a parameter's name to whether it trains; None: those that require a gradient.
        held_out: held-out samples; or several sets by name, whose losses are the parts of a held-out point and their
            mean its loss.
        after: the folder of a finished run of the same parameters, whose optimizer state this one begins with.
        settings: what else decides the result, such as the weights of the loss's parts: a run with other settings is
            not resumed. JSON values.
        after_step: called after every change of the weights, such as one that keeps masked weights
            at zero.

    Returns:
        The log, also in ``out/log.json``. The newest checkpoint stays in ``out``.

    Raises:
        TrainingError: for a bad argument, a folder with another run, or a loss or gradient that is not finite.
    """
    out = Path(out)
    feed = samples if isinstance(samples, Feed) else Feed(samples)
    config = config.lasting(len(feed.samples), processes.count())
    sets = held_out if isinstance(held_out, Mapping) else {"": held_out}
    start = None if after is None else _optimizer_file(after)
    trained = choose(model, trainable)
    arguments = _arguments(model, config, out)
    if config.shard and (after_step is not None or start is not None):
        raise TrainingError("a sharded run has no after_step, and begins with no earlier optimizer: leave them out")
    if not config.shard:
        _check_device(model, arguments.device)
    if arguments.world_size > 1:
        atexit.unregister(_leave_group)  # once, however often fit is called
        atexit.register(_leave_group)
    run = {
        **config.as_dict(arguments.world_size),
        "loss": task.name,
        **(settings or {}),
        "model": model_digest(model, trained),
        **feed.as_dict(),
        "optimizer": start and hashlib.sha256(start.read_bytes()).hexdigest(),
        "eval_samples": {name: samples_digest(each) for name, each in sets.items()},
    }
    order = feed.order(arguments.max_steps, config.accumulate * config.batch * arguments.world_size, config.seed)
    with tracker("training", arguments.max_steps) as count, only(model, trained):
        if config.shard:
            loop: Loop = ShardedLoop(model, task, config, trained, arguments, order)
        else:
            loop = Loop(Objective(model, task), task, config, trained, arguments, order, start)
        watch = Watch(loop, settled(run), sets, config, count, after_step)
        loop.add_callback(watch)
        checkpoint = watch.open(out)
        loop.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return watch.history


def _arguments(model: nn.Module, config: TrainConfig, out: Path) -> TrainingArguments:
    """What Trainer is told."""
    rates = config.rates
    on_cpu = next(model.parameters()).device.type == "cpu"
    assert config.steps is not None
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=config.steps,
        learning_rate=rates.lr,
        lr_scheduler_type=rates.name,
        warmup_steps=rates.warmup,
        optim="adamw_torch",
        weight_decay=config.weight_decay,
        adam_beta1=config.betas[0],
        adam_beta2=config.betas[1],
        max_grad_norm=config.clip,
        per_device_train_batch_size=config.batch,
        gradient_accumulation_steps=config.accumulate,
        train_sampling_strategy="sequential",  # the order is ours, see Order
        seed=config.seed,
        save_steps=config.save_every,
        logging_strategy="no",  # the log is ours
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to=[],
        remove_unused_columns=False,
        use_cpu=on_cpu and not (config.shard and torch.accelerator.is_available()),
        dataloader_pin_memory=False,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # without a launcher, Trainer would spread over all GPUs
    return arguments


class Watch(TrainerCallback):
    """Keeps the log, and says which checkpoints are complete: those with the log in them, which is written last."""

    def __init__(
        self,
        loop: Loop,
        settings: dict[str, Any],
        held_out: Mapping[str, Sequence[Any]],
        config: TrainConfig,
        count: Tracker,
        after_step: Callable[[], None] | None,
    ) -> None:
        self.loop = loop
        self.history = TrainingLog(settings)
        self.held_out = {name: samples for name, samples in held_out.items() if samples}
        self.config = config
        self.count = count
        self.after_step = after_step
        self.lr = 0.0

    def open(self, out: Path) -> Path | None:
        """The newest complete checkpoint of this run, if any; the log goes on from there.

        Raises:
            TrainingError: when the folder holds something else.
        """
        check_same_run(out, self.history.settings)
        checkpoints = {int(path.name.split("-")[1]): path for path in out.glob("checkpoint-*")}
        complete = {step: path for step, path in checkpoints.items() if (path / LOG).exists()}
        self.loop.accelerator.wait_for_everyone()  # all have looked before one writes
        if complete:
            self.history = TrainingLog.read(complete[max(complete)] / LOG)
        if self.loop.args.should_save:
            for step in checkpoints.keys() - {max(complete, default=None)}:  # half-written, or half-deleted
                shutil.rmtree(checkpoints[step])
            self.history.write(out / LOG)
            if self.loop.order.old:
                self.loop.order.write_manifest(out / MANIFEST)
        return complete[max(complete)] if complete else None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.count(state.global_step)
        if state.global_step == 0:
            self._evaluate(0)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        gradients = [each.grad for each in self.loop.trained.values() if each.grad is not None]
        self.loop.stop_unless_finite(whole(torch.nn.utils.get_total_norm(gradients)), "gradient")
        self.lr = float(kwargs["lr_scheduler"].get_last_lr()[0])

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.after_step is not None:
            self.after_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        saves = step % args.save_steps == 0 or step == args.max_steps
        if step % self.config.log_every == 0 or saves:  # so that no window of the log is open in a checkpoint
            before = self.history.train[-1].step if self.history.train else 0
            loss, *parts = (torch.stack(self.loop.values).sum(dim=0) / (step - before)).tolist()
            names = self.loop.names[1:]
            self.history.train.append(Point(step, loss, dict(zip(names, parts, strict=True)), self.lr))
            self.loop.values.clear()
        if saves if self.config.eval_every is None else step % self.config.eval_every == 0 or step == args.max_steps:
            self._evaluate(step)
        if self.loop.args.should_save and not self.loop.values:
            self.history.write(Path(args.output_dir) / LOG)
        self.count(note=f"loss {self.history.train[-1].loss:.4g}" if self.history.train else "")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.loop.accelerator.wait_for_everyone()
        if self.loop.args.should_save:
            newest = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            sync(newest)  # before the log, which says that the checkpoint is complete
            self.history.write(newest / LOG)
            for path in newest.parent.glob("checkpoint-*"):  # at every moment one is complete
                if path != newest:
                    shutil.rmtree(path)

    def _evaluate(self, step: int) -> None:
        """Add a point on the held-out samples; every process computes all of it, so none waits for another."""
        if not self.held_out:
            return
        points = {name: self._held_out_point(step, samples) for name, samples in self.held_out.items()}
        if "" in points:
            self.history.held_out.append(points[""])
        else:
            losses = {name: point.loss for name, point in points.items()}
            self.history.held_out.append(Point(step, sum(losses.values()) / len(losses), losses))

    @torch.no_grad()
    def _held_out_point(self, step: int, samples: Sequence[Any]) -> Point:
        objective: Any = self.loop.model
        objective.eval()  # Trainer puts it back before the next step
        size = self.loop.args.per_device_train_batch_size
        values, total, task = [], 0, self.loop.task
        for start in range(0, len(samples), size):
            batch = send_to_device(task.collate(samples[start : start + size]), self.loop.args.device)
            loss, parts = objective(**batch)
            values.append(torch.stack([loss, *parts.values()]).float() * task.weight(batch))
            total += task.weight(batch)
        self.loop.evaluated()
        mean = torch.stack(values).sum(dim=0) / total
        self.loop.stop_unless_finite(mean, "held-out loss")
        loss, *rest = mean.tolist()
        return Point(step, loss, dict(zip(parts, rest, strict=True)))


def _check_device(model: nn.Module, device: torch.device) -> None:
    """Trainer would move the model, and with its shared tensors the original."""
    theirs = next(model.parameters()).device
    if (theirs.type, theirs.index or 0) != (device.type, device.index or 0):
        raise TrainingError(f"the model is on {theirs}, this process trains on {device}: move the model there first")


def _leave_group() -> None:
    """End the threads of gloo before the interpreter ends: one that outlives it aborts a finished run."""
    gc.collect()  # the wrapped model holds the group too, in a cycle; only the last reference ends the threads
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _optimizer_file(run: Path) -> Path:
    """The optimizer state in the newest checkpoint of a finished run."""
    checkpoints = sorted(run.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    if not checkpoints or not (checkpoints[-1] / OPTIMIZER).exists():
        raise TrainingError(f"{run} holds no checkpoint with an optimizer state: give the folder of a finished run")
    return checkpoints[-1] / OPTIMIZER
