"""The loop: ``transformers.Trainer`` with custom losses, process-independent batches and partial checkpoints.

Batches are the same for any number of processes, and checkpoints contain only what is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from lamella.errors import TrainingError
from lamella.train.attention import fast_attention
from lamella.train.config import TrainConfig
from lamella.train.mixing import Order
from lamella.train.optimizers import Factory, load_optimizer_state
from lamella.train.parameters import batch_norm_statistics
from lamella.train.runs import short
from lamella.train.task import LossAndParts, Task

TENSORS = "trained.safetensors"


class Objective(nn.Module):
    """The model with its loss.

    Distributed wrappers wrap this module, so that a loss sees the model itself and may call any part of it.
    """

    def __init__(self, model: nn.Module, task: Task) -> None:
        super().__init__()
        self.model = model
        self.loss = partial(task.loss, model)
        self.dropout = task.dropout

    def forward(self, **batch: Any) -> LossAndParts:
        """Return the loss of a batch and its named parts."""
        result = self.loss(batch)
        return (result, {}) if isinstance(result, Tensor) else (result[0], dict(result[1]))

    def train(self, mode: bool = True) -> Objective:
        """Set training mode, unless the task disables dropout."""
        return super().train(mode and self.dropout)


def changing(model: nn.Module, trained: Mapping[str, Tensor], changes: Sequence[str]) -> dict[str, Tensor]:
    """Return all tensors that training changes, by name.

    Args:
        model: the trained model.
        trained: its trained parameters by name.
        changes: names of frozen parameters that hooks change.
    """
    return {**trained, **batch_norm_statistics(model), **{name: model.get_parameter(name) for name in changes}}


class Loop(Trainer):
    """Trainer with a :class:`Task`, and checkpoints of only what training changes."""

    def __init__(
        self,
        objective: Objective,
        task: Task,
        config: TrainConfig,
        trained: dict[str, nn.Parameter],
        arguments: TrainingArguments,
        order: Order,
        factory: Factory,
        start: Path | None = None,
        changes: Sequence[str] = (),
    ) -> None:
        super().__init__(objective, arguments, task.collate, order)  # type: ignore[arg-type]
        self.remove_callback(PrinterCallback)
        self.task = task
        self.trained = trained
        self.state_tensors = changing(objective.model, trained, changes)
        self.order = order
        self.config = config
        self.schedule = config.rates.schedule
        self.factory = factory
        self.start = start
        self.batches: list[Any] = []  # of the current step
        self.weight = torch.tensor(0)  # of all of them, over all processes
        self.names: tuple[str, ...] = ()
        self.values: list[Tensor] = []  # loss and parts of each batch since the last log point
        self.gradients_computed: Callable[[], None] = lambda: None  # called once in a step, before they are clipped

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """Return the batches of a step and their total weight over all processes."""
        self.batches = list(islice(epoch_iterator, num_batches))
        weight = torch.tensor(sum(map(self.task.weight, self.batches)), device=device)
        self.weight = self.accelerator.reduce(weight, "sum")
        return self.batches, self.weight

    def weigh(self, values: Sequence[Tensor]) -> Tensor:
        """Return the mean over all batches of a step, given one value per batch of this process."""
        if len(values) == self.accelerator.num_processes == 1:
            return values[0]
        shares = [self.task.weight(batch) / self.weight for batch in self.batches]
        local = torch.stack([value * share for value, share in zip(values, shares, strict=True)]).sum(dim=0)
        mean: Tensor = self.accelerator.reduce(local, "sum")
        return mean

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Run the passes of one batch, and return its weighted loss."""
        model.train()
        batch = self._prepare_inputs(inputs)
        processes = self.accelerator.num_processes
        # Trainer sums over the batches of a step and averages over processes: this makes it a mean over all.
        share = self.task.weight(batch) * processes / num_items_in_batch

        def backward(loss: Tensor, **options: Any) -> None:
            self.accelerator.backward(loss * share, **options)

        with fast_attention(batch, self.config.bf16):
            loss, parts = self.task.passes(lambda given: model(**given), batch, backward)
        self.names = ("loss", *parts)
        values = torch.stack([loss, *parts.values()]).detach().float() * share / processes
        self.values.append(
            self.accelerator.reduce(values, "sum")
        )  # so that all processes take the same decision to stop
        for name, value in zip(self.names, self.values[-1], strict=True):
            self.stop_unless_finite(value, name)
        if self.accelerator.sync_gradients:
            self.gradients_computed()
        return loss.detach() * share

    def create_optimizer(self, model: Any = None) -> Any:
        """Create the factory's optimizer, with this run's learning rates and, if given, the state of an earlier run."""
        if self.optimizer is None:
            objective: Any = self.model
            self.optimizer = optimizer = self.factory(objective.model, self.trained, self.config)
            for group in optimizer.param_groups:
                group["lr"] *= self.args.learning_rate
            if self.start is not None:
                load_optimizer_state(self.start, optimizer, self.args.device)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Create the scheduler of a :class:`Schedule`, or else Trainer's own."""
        schedule = self.schedule
        if schedule is None:
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None:
            chosen: Any = optimizer or self.optimizer
            self.lr_scheduler = LambdaLR(chosen, lambda done: schedule(done + 1))
        return self.lr_scheduler

    def stop_unless_finite(self, value: Tensor, what: str) -> None:
        """Raise an error that names the step and samples, unless all values are finite.

        Args:
            value: values of any shape.
            what: their name in the message.
        """
        if torch.isfinite(value).all():
            return
        step, size = self.state.global_step, self.order.size
        picks = self.order.picks[step * size : (step + 1) * size]
        raise TrainingError(
            f"non-finite {what} at step {step + 1} of {self.args.max_steps}, with samples {short(picks)}: lower lr, "
            f"or inspect these samples; the last good checkpoint is in {self.args.output_dir}"
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return the current values of all tensors that training changes."""
        return {name: each.detach() for name, each in self.state_tensors.items()}

    def put(self, name: str, tensor: Tensor) -> None:
        """Overwrite one of the tensors that training changes.

        Args:
            name: name of the tensor in the state.
            tensor: the new values, in the same shape.
        """
        self.state_tensors[name].copy_(tensor)

    def evaluated(self) -> None:
        """Called after forward passes without a backward pass."""

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        tensors = self.tensors()
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            save_file({name: each.contiguous() for name, each in tensors.items()}, folder / TENSORS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.read(Path(resume_from_checkpoint))

    @torch.no_grad()
    def read(self, checkpoint: Path) -> None:
        """Set all tensors that training changes to the values of a checkpoint.

        Raises:
            TrainingError: if it contains others.
        """
        tensors = load_file(checkpoint / TENSORS)
        if tensors.keys() != self.state_tensors.keys():
            raise TrainingError(f"{checkpoint} contains other tensors than this run changes: remove it and train again")
        for name, tensor in tensors.items():
            self.put(name, tensor)
