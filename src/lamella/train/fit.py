"""The training loop: a thin layer over ``transformers.Trainer``.

What it adds: any loss function, only some parameters, the same batches however many processes share them, checkpoints
of what trains and nothing else, and a run that goes on by itself from its newest complete checkpoint, to the bit.
"""

from __future__ import annotations

import atexit
import gc
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from lamella.data.samples import Sample, collate
from lamella.errors import TrainingError
from lamella.files import sync
from lamella.progress import Tracker, tracker
from lamella.train.log import Point, TrainingLog
from lamella.train.loop import Loop, Loss, Objective, count_labels
from lamella.train.mixing import Order, Replay
from lamella.train.parameters import Choice, choose, only
from lamella.train.runs import LOG, check_same_run, model_digest, samples_digest, settled
from lamella.train.schedules import Schedule
from lamella.train.sharding import OPTIMIZER, ShardedLoop, whole

SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
MANIFEST = "replay.json"


def fit(
    model: nn.Module,
    samples: Sequence[Sample],
    loss: Loss,
    *,
    out: str | Path,
    steps: int,
    lr: float | None = None,
    schedule: str | Schedule = "cosine",
    warmup: float | None = None,
    batch: int = 4,
    accumulate: int = 1,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    seed: int = 0,
    trainable: Choice | None = None,
    replay: Replay | None = None,
    skip: int = 0,
    optimizer: Path | None = None,
    save_every: int = 100,
    log_every: int = 10,
    eval_every: int | None = None,
    eval_samples: Sequence[Sample] | Mapping[str, Sequence[Sample]] | None = None,
    settings: Mapping[str, Any] | None = None,
    after_step: Callable[[], None] | None = None,
    shard: bool = False,
    beside: Sequence[nn.Module] = (),
) -> TrainingLog:
    """Train some of a model's parameters, in place, with AdamW.

    Called again after a kill, with a model made in the same way, it goes on from the newest complete checkpoint in
    ``out``; on a CPU the result is the same to the bit as without the kill. Training runs where the model is. Nothing
    is written outside ``out``.

    Under ``accelerate launch --multi_gpu`` every process runs ``batch`` samples of each step. On CPUs the flag is the
    same; ``--cpu`` starts one process only, whatever ``--num_processes`` says.

    A view shares its tensors with the model it was made of: call :func:`lamella.train.own` first on what trains, unless
    that is adapters or routers of its own.

    Args:
        model: a model or a view.
        samples: training samples, such as :func:`lamella.train.pairs` or :func:`lamella.train.blocks` make. They are
            shuffled anew for each pass.
        loss: from the model and a batch to the mean loss over the batch's labels, alone or with named parts to log. It
            may call any part of the model.
        out: the run's folder: checkpoints, ``log.json`` and what the run is made of.
        steps: optimizer steps.
        lr: the highest learning rate.
        schedule: ``cosine``, ``linear`` (both down to 0) or ``constant``, after the warm-up; or a
            :class:`lamella.train.Schedule`, which has its own rates and warm-up.
        warmup: share of the steps over which the rate rises from 0; 0.03 when left out.
        batch: samples in one forward pass of one process.
        accumulate: forward passes for one step. Batches of a step weigh by their number of labels, so neither
            ``accumulate`` nor the number of processes changes what a mean over tokens is.
        weight_decay: of weight matrices; biases and norms have none.
        betas: of AdamW.
        seed: of the order of samples and of dropout; the global random state starts from it.
        trainable: from a parameter's name to whether it trains; None: those that require a gradient.
        replay: old samples that take the place of some new ones; what was replayed is listed in ``out/replay.json``.
        skip: how many samples of the order an earlier run with this seed has used.
        optimizer: the folder of a finished run of the same parameters, whose optimizer state this one begins with.
        save_every: steps from one checkpoint to the next.
        log_every: steps from one point of the log to the next.
        eval_every: steps from one held-out loss to the next; with each checkpoint when left out.
        eval_samples: held-out samples; or several sets by name, whose losses are the parts of a held-out point and
            their mean its loss.
        settings: what else decides the result, such as the weights of the loss's parts: a run with other settings is
            not resumed. JSON values.
        after_step: called after every change of the weights, such as one that keeps masked weights
            at zero.
        shard: split weights, gradients and optimizer state over the processes, for a model that does not fit one
            device; ``model`` itself stays where it is, best on the host, and gets the result.
        beside: frozen models that the loss reads, to be split too, in place.

    Returns:
        The log, also in ``out/log.json``. The newest checkpoint stays in ``out``.

    Raises:
        TrainingError: for a bad argument, a folder with another run, or a loss or gradient that is not finite.
    """
    out = Path(out)
    lr, warmup, known = _rates(schedule, lr, warmup)
    _check(
        samples,
        steps=steps,
        batch=batch,
        accumulate=accumulate,
        save_every=save_every,
        log_every=log_every,
        eval_every=eval_every or save_every,
    )
    held_out = eval_samples if isinstance(eval_samples, Mapping) else {"": eval_samples or ()}
    start = None if optimizer is None else _optimizer_file(optimizer)
    trained = choose(model, trainable)
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        learning_rate=lr,
        lr_scheduler_type=known,
        warmup_steps=math.ceil(warmup * steps),
        optim="adamw_torch",
        weight_decay=weight_decay,
        adam_beta1=betas[0],
        adam_beta2=betas[1],
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        train_sampling_strategy="sequential",  # the order is ours, see Order
        seed=seed,
        save_steps=save_every,
        logging_strategy="no",  # the log is ours
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to=[],
        remove_unused_columns=False,
        use_cpu=next(model.parameters()).device.type == "cpu" and not (shard and torch.accelerator.is_available()),
        dataloader_pin_memory=False,
    )
    if shard and (after_step is not None or start is not None):
        raise TrainingError("a sharded run has no after_step, and begins with no earlier optimizer: leave them out")
    if not shard:
        _check_device(model, arguments.device)
    if arguments.world_size > 1:
        atexit.unregister(_leave_group)  # once, however often fit is called
        atexit.register(_leave_group)
    arguments._n_gpu = min(arguments.n_gpu, 1)  # without a launcher, Trainer would spread over all GPUs
    run = {
        "steps": steps,
        **_described(schedule, lr, warmup),
        "batch": batch,
        "accumulate": accumulate,
        "processes": arguments.world_size,
        **({"shard": True} if shard else {}),
        "weight_decay": weight_decay,
        "betas": betas,
        "seed": seed,
        "loss": getattr(loss, "__qualname__", type(loss).__qualname__),
        **(settings or {}),
        "model": model_digest(model, trained),
        "samples": samples_digest(samples),
        "replay": _replay_digest(replay),
        "skip": skip,
        "optimizer": start and hashlib.sha256(start.read_bytes()).hexdigest(),
        "eval_every": eval_every,
        "eval_samples": {name: samples_digest(each) for name, each in held_out.items()},
    }
    order = Order(samples, steps, accumulate * batch * arguments.world_size, seed, replay, skip)
    with tracker("training", steps) as count, only(model, trained):
        if shard:
            loop: Loop = ShardedLoop(model, loss, trained, beside, arguments, order, schedule)
        else:
            loop = Loop(Objective(model, loss), trained, arguments, order, schedule, start)
        watch = Watch(loop, settled(run), held_out, log_every, eval_every, count, after_step)
        loop.add_callback(watch)
        checkpoint = watch.open(out)
        loop.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return watch.history


class Watch(TrainerCallback):
    """Keeps the log, and says which checkpoints are complete: those with the log in them, which is written last."""

    def __init__(
        self,
        loop: Loop,
        settings: dict[str, Any],
        held_out: Mapping[str, Sequence[Sample]],
        log_every: int,
        eval_every: int | None,
        count: Tracker,
        after_step: Callable[[], None] | None,
    ) -> None:
        self.loop = loop
        self.history = TrainingLog(settings)
        self.held_out = {name: samples for name, samples in held_out.items() if samples}
        self.log_every = log_every
        self.eval_every = eval_every
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
        if step % self.log_every == 0 or saves:  # so that no window of the log is open in a checkpoint
            before = self.history.train[-1].step if self.history.train else 0
            loss, *parts = (torch.stack(self.loop.values).sum(dim=0) / (step - before)).tolist()
            names = self.loop.names[1:]
            self.history.train.append(Point(step, loss, dict(zip(names, parts, strict=True)), self.lr))
            self.loop.values.clear()
        if saves if self.eval_every is None else step % self.eval_every == 0 or step == args.max_steps:
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
    def _held_out_point(self, step: int, samples: Sequence[Sample]) -> Point:
        objective: Any = self.loop.model
        objective.eval()  # Trainer puts it back before the next step
        size = self.loop.args.per_device_train_batch_size
        values, labels = [], 0
        for start in range(0, len(samples), size):
            batch = collate(samples[start : start + size])
            loss, parts = objective(**{name: each.to(self.loop.args.device) for name, each in batch.items()})
            values.append(torch.stack([loss, *parts.values()]).float() * count_labels(batch))
            labels += count_labels(batch)
        self.loop.evaluated()
        mean = torch.stack(values).sum(dim=0) / labels
        self.loop.stop_unless_finite(mean, "held-out loss")
        loss, *rest = mean.tolist()
        return Point(step, loss, dict(zip(parts, rest, strict=True)))


def _rates(schedule: str | Schedule, lr: float | None, warmup: float | None) -> tuple[float, float, str]:
    """The highest rate, the share of warm-up and Trainer's name for the schedule."""
    if isinstance(schedule, Schedule):
        if lr is not None or warmup is not None:
            raise TrainingError("this schedule has its own rates and warm-up: leave lr and warmup out")
        return 1.0, 0.0, "constant"  # its rates are multiples of 1
    if schedule not in SCHEDULES:
        raise TrainingError(f"schedule='{schedule}': choose one of {', '.join(SCHEDULES)}")
    if lr is None:
        raise TrainingError(f"schedule='{schedule}' needs lr, its highest learning rate")
    return lr, 0.03 if warmup is None else warmup, SCHEDULES[schedule]


def _described(schedule: str | Schedule, lr: float, warmup: float) -> dict[str, Any]:
    if isinstance(schedule, Schedule):
        return {"schedule": schedule.as_dict()}
    return {"schedule": schedule, "lr": lr, "warmup": warmup}


def _check(samples: Sequence[Sample], **counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise TrainingError(f"{name}={count}: give at least 1")
    if len(samples) == 0:
        raise TrainingError("there are no training samples: give some")


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


def _replay_digest(replay: Replay | None) -> dict[str, Any] | None:
    if replay is None:
        return None
    content = {name: [samples_digest(each), replay.indices(name)] for name, each in replay.samples.items()}
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return {"fraction": replay.fraction, "mixture": replay.shares, "seed": replay.seed, "samples": digest}
