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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from lamella.errors import TrainingError
from lamella.progress import Tracker, tracker
from lamella.train.data import NO_LOSS, Sample, collate
from lamella.train.log import Point, TrainingLog
from lamella.train.parameters import Choice, choose

Loss = Callable[[Any, dict[str, Tensor]], Tensor | tuple[Tensor, Mapping[str, Tensor]]]

SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
TENSORS, LOG = "trained.safetensors", "log.json"


def fit(
    model: nn.Module,
    samples: Sequence[Sample],
    loss: Loss,
    *,
    out: str | Path,
    steps: int,
    lr: float,
    schedule: str = "cosine",
    warmup: float = 0.03,
    batch: int = 4,
    accumulate: int = 1,
    weight_decay: float = 0.0,
    seed: int = 0,
    trainable: Choice | None = None,
    save_every: int = 100,
    log_every: int = 10,
    eval_samples: Sequence[Sample] | None = None,
    settings: Mapping[str, Any] | None = None,
    after_step: Callable[[], None] | None = None,
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
        schedule: ``cosine``, ``linear`` (both down to 0) or ``constant``, after the warm-up.
        warmup: share of the steps over which the rate rises from 0.
        batch: samples in one forward pass of one process.
        accumulate: forward passes for one step. Batches of a step weigh by their number of labels, so neither
            ``accumulate`` nor the number of processes changes what a mean over tokens is.
        weight_decay: of weight matrices; biases and norms have none.
        seed: of the order of samples and of dropout; the global random state starts from it.
        trainable: from a parameter's name to whether it trains; None: those that require a gradient.
        save_every: steps from one checkpoint, and one held-out loss, to the next.
        log_every: steps from one point of the log to the next.
        eval_samples: held-out samples.
        settings: what else decides the result, such as the weights of the loss's parts: a run with other settings is
            not resumed. JSON values.
        after_step: called after every change of the weights, such as :func:`lamella.train.holding`, which keeps masked
            weights at zero.

    Returns:
        The log, also in ``out/log.json``.

    Raises:
        TrainingError: for a bad argument, a folder with another run, or a loss or gradient that is not finite.
    """
    out = Path(out)
    _check(
        samples,
        schedule,
        steps=steps,
        batch=batch,
        accumulate=accumulate,
        save_every=save_every,
        log_every=log_every,
    )
    trained = choose(model, trainable)
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        learning_rate=lr,
        lr_scheduler_type=SCHEDULES[schedule],
        warmup_steps=math.ceil(warmup * steps),
        optim="adamw_torch",
        weight_decay=weight_decay,
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
        use_cpu=next(model.parameters()).device.type == "cpu",
        dataloader_pin_memory=False,
    )
    _check_device(model, arguments.device)
    if arguments.world_size > 1:
        atexit.unregister(_leave_group)  # once, however often fit is called
        atexit.register(_leave_group)
    arguments._n_gpu = min(arguments.n_gpu, 1)  # without a launcher, Trainer would spread over all GPUs
    run = {
        "steps": steps,
        "lr": lr,
        "schedule": schedule,
        "warmup": warmup,
        "batch": batch,
        "accumulate": accumulate,
        "processes": arguments.world_size,
        "weight_decay": weight_decay,
        "seed": seed,
        "loss": getattr(loss, "__qualname__", type(loss).__qualname__),
        **(settings or {}),
        "model": _model_digest(model, trained),
        "samples": _samples_digest(samples),
        "eval_samples": _samples_digest(eval_samples or ()),
    }
    order = Order(samples, steps * accumulate * batch * arguments.world_size, seed)
    with tracker("training", steps) as count, _only(model, trained):
        loop = Loop(Objective(model, loss), trained, arguments, order)
        watch = Watch(loop, _settled(run), eval_samples or (), log_every, count, after_step)
        loop.add_callback(watch)
        checkpoint = watch.open(out)
        loop.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return watch.history


class Order(Dataset[Sample]):
    """All samples of a run in their order, pass after pass, each pass shuffled anew.

    With one long epoch of full batches, the samples of a step depend neither on the number of processes nor on where
    the run was interrupted.
    """

    def __init__(self, samples: Sequence[Sample], length: int, seed: int) -> None:
        self.samples = samples
        generator = torch.Generator().manual_seed(seed)
        passes = [torch.randperm(len(samples), generator=generator) for _ in range(math.ceil(length / len(samples)))]
        self.numbers = torch.cat(passes)[:length].tolist()

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[self.numbers[index]]


class Objective(nn.Module):
    """The model with its loss.

    What wraps a model for several processes wraps this, so a loss sees the model itself and may call any part of it.
    """

    accepts_loss_kwargs = True  # asks Trainer to count the labels of a whole step, over all processes

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model = model
        self.loss = partial(loss, model)

    def forward(self, **batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        result = self.loss(batch)
        return (result, {}) if isinstance(result, Tensor) else (result[0], dict(result[1]))


class Loop(Trainer):
    """Trainer with our loss, and checkpoints of what trains alone."""

    def __init__(
        self, objective: Objective, trained: dict[str, nn.Parameter], arguments: TrainingArguments, order: Order
    ) -> None:
        super().__init__(objective, arguments, collate, order)
        self.remove_callback(PrinterCallback)
        self.trained = trained
        self.order = order
        self.names: tuple[str, ...] = ()
        self.values: list[Tensor] = []  # loss and parts of each batch since the last point of the log

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, parts = model(**inputs)
        processes = self.accelerator.num_processes
        # Trainer adds up over the batches of a step and averages over processes: this makes it the mean over labels.
        share = _count(inputs) * processes / num_items_in_batch
        self.names = ("loss", *parts)
        values = torch.stack([loss, *parts.values()]).detach().float() * share / processes
        self.values.append(self.accelerator.reduce(values, "sum"))  # so all processes agree on whether to stop
        for name, value in zip(self.names, self.values[-1], strict=True):
            self.stop_unless_finite(value, name)
        return loss * share

    def stop_unless_finite(self, value: Tensor, what: str) -> None:
        if torch.isfinite(value).all():
            return
        step, size = self.state.global_step, len(self.order) // self.args.max_steps
        numbers = self.order.numbers[step * size : (step + 1) * size]
        raise TrainingError(
            f"non-finite {what} at step {step + 1} of {self.args.max_steps}, with samples {_short(numbers)}: lower lr, "
            f"or look at these samples; the last good checkpoint is kept in {self.args.output_dir}"
        )

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            save_file({name: each.detach().contiguous() for name, each in self.trained.items()}, folder / TENSORS)

    @torch.no_grad()
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        for name, tensor in load_file(Path(resume_from_checkpoint) / TENSORS).items():
            self.trained[name].copy_(tensor)


class Watch(TrainerCallback):
    """Keeps the log, and says which checkpoints are complete: those with the log in them, which is written last."""

    def __init__(
        self,
        loop: Loop,
        settings: dict[str, Any],
        held_out: Sequence[Sample],
        log_every: int,
        count: Tracker,
        after_step: Callable[[], None] | None,
    ) -> None:
        self.loop = loop
        self.history = TrainingLog(settings)
        self.held_out = held_out
        self.log_every = log_every
        self.count = count
        self.after_step = after_step
        self.lr = 0.0

    def open(self, out: Path) -> Path | None:
        """The newest complete checkpoint of this run, if any; the log goes on from there.

        Raises:
            TrainingError: when the folder holds something else.
        """
        if out.exists() and any(out.iterdir()):
            self._check_same_run(out)
        checkpoints = {int(path.name.split("-")[1]): path for path in out.glob("checkpoint-*")}
        complete = {step: path for step, path in checkpoints.items() if (path / LOG).exists()}
        self.loop.accelerator.wait_for_everyone()  # all have looked before one writes
        if complete:
            self.history = TrainingLog.read(complete[max(complete)] / LOG)
        if self.loop.args.should_save:
            for step in checkpoints.keys() - complete.keys():
                shutil.rmtree(checkpoints[step])
            self.history.write(out / LOG)
        return complete[max(complete)] if complete else None

    def _check_same_run(self, out: Path) -> None:
        try:
            theirs = TrainingLog.read(out / LOG).settings
        except (OSError, ValueError, KeyError, TypeError):
            raise TrainingError(f"{out} is not the folder of a training run: give a new folder") from None
        ours = self.history.settings
        differ = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
        if differ:
            what = ", ".join(f"{key} {_short(theirs.get(key))}, not {_short(ours.get(key))}" for key in differ)
            raise TrainingError(f"{out} holds a run with {what}: give a new folder, or remove this one")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.count(state.global_step)
        if state.global_step == 0:
            self._evaluate(0)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        gradients = [each.grad for each in self.loop.trained.values() if each.grad is not None]
        self.loop.stop_unless_finite(torch.nn.utils.get_total_norm(gradients), "gradient")
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
        if saves:
            self._evaluate(step)
        if self.loop.args.should_save and not self.loop.values:
            self.history.write(Path(args.output_dir) / LOG)
        self.count(note=f"loss {self.history.train[-1].loss:.4g}" if self.history.train else "")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.loop.accelerator.wait_for_everyone()
        if self.loop.args.should_save:
            newest = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            self.history.write(newest / LOG)
            for path in newest.parent.glob("checkpoint-*"):  # at every moment one is complete
                if path != newest:
                    shutil.rmtree(path)

    @torch.no_grad()
    def _evaluate(self, step: int) -> None:
        """Add a point on the held-out samples; every process computes all of it, so none waits for another."""
        if not self.held_out:
            return
        objective: Any = self.loop.model
        objective.eval()  # Trainer puts it back before the next step
        size = self.loop.args.per_device_train_batch_size
        values, labels = [], 0
        for start in range(0, len(self.held_out), size):
            batch = collate(self.held_out[start : start + size])
            loss, parts = objective(**{name: each.to(self.loop.args.device) for name, each in batch.items()})
            values.append(torch.stack([loss, *parts.values()]).float() * _count(batch))
            labels += _count(batch)
        mean = torch.stack(values).sum(dim=0) / labels
        self.loop.stop_unless_finite(mean, "held-out loss")
        loss, *rest = mean.tolist()
        self.history.held_out.append(Point(step, loss, dict(zip(parts, rest, strict=True))))


@contextmanager
def _only(model: nn.Module, trained: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Let only these parameters require gradients; afterwards flags and modes are as they were."""
    flags = [(each, each.requires_grad) for each in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    chosen = set(trained.values())
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(parameter in chosen)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            if parameter in chosen:
                parameter.grad = None
        for module, training in modes:
            module.training = training


def _check(samples: Sequence[Sample], schedule: str, **counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise TrainingError(f"{name}={count}: give at least 1")
    if schedule not in SCHEDULES:
        raise TrainingError(f"schedule='{schedule}': choose one of {', '.join(SCHEDULES)}")
    if len(samples) == 0:
        raise TrainingError("there are no training samples: give some")


def _count(batch: Mapping[str, Tensor]) -> int:
    """How many labels carry loss."""
    return int((batch["labels"] != NO_LOSS).sum())


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


def _samples_digest(samples: Sequence[Sample]) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        for name in sorted(sample):
            digest.update(f"{name} {list(sample[name].shape)} {sample[name].dtype};".encode())
            digest.update(sample[name].cpu().numpy().tobytes())
    return digest.hexdigest()


def _model_digest(model: nn.Module, trained: Mapping[str, nn.Parameter]) -> str:
    """Of all names and shapes, and of a few values of each frozen tensor (those that train change)."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {list(parameter.shape)} {parameter.dtype} {name in trained};".encode())
        if name not in trained:
            values = parameter.detach().flatten()
            digest.update(values[:: max(1, len(values) // 64)].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _settled(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings as JSON gives them back, so that they compare equal to those of a file."""
    return json.loads(json.dumps(settings))


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
