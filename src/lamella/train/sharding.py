"""Sharding of weights, gradients and optimizer state over processes, for models that do not fit one device.

Torch's ``fully_shard`` (FSDP2): the weights of a layer are gathered when it runs and freed afterwards. Every process
opens the model on its host and keeps its shard on its device.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from transformers import TrainingArguments

from lamella.errors import TrainingError
from lamella.stack import share
from lamella.train.config import TrainConfig
from lamella.train.loop import Loop, Objective, changing
from lamella.train.mixing import Order
from lamella.train.optimizers import OPTIMIZER, Factory
from lamella.train.recompute import repeated_blocks
from lamella.train.task import Task

SCHEDULER = "scheduler.pt"  # as Trainer names it
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def split(
    objective: Objective, trained: Collection[str], frozen: Sequence[nn.Module], device: torch.device
) -> dict[str, nn.Parameter]:
    """Shard the parameters of a model, and of frozen models that its loss uses, over all processes, in place.

    Args:
        objective: the model with its loss; its modules must be its own, its tensors may be shared.
        trained: names of the trained parameters.
        frozen: the frozen models.
        device: of this process.

    Returns:
        The trained parameters by name, each with this process's shard of it.

    Raises:
        TrainingError: for one process, or layers that share parameters.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        raise TrainingError("sharding needs several processes: start them with accelerate launch")
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    objective.frozen = nn.ModuleList(frozen)
    for model in (objective.model, *frozen):
        blocks = repeated_blocks(model)
        if len(set(nn.ModuleList(blocks).parameters())) < sum(len(set(block.parameters())) for block in blocks):
            raise TrainingError("layers that share parameters cannot be sharded: train this plan without shard")
        for block in blocks:
            fully_shard(block, mesh=mesh)
    fully_shard(objective, mesh=mesh)
    return {name: each for name, each in objective.model.named_parameters() if name in trained}


def gathered(tensor: Tensor) -> Tensor:
    """Return the whole tensor, gathered if it is sharded; then every process must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def replicated(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a tensor that can be combined with a parameter of a run, element by element, and copied to it.

    Args:
        tensor: the whole tensor, the same in all processes; it broadcasts with ``like``.
        like: a parameter, its gradient or its optimizer state, sharded or whole.
    """
    tensor = tensor.to(like.device)
    return DTensor.from_local(tensor, like.device_mesh, [Replicate()]) if isinstance(like, DTensor) else tensor


def sharded(tensor: Tensor, like: Tensor) -> Tensor:
    """Return this process's shard of a tensor, as a parameter is sharded; the tensor itself if that is whole.

    Args:
        tensor: the whole tensor in the shape of the parameter, the same in all processes.
        like: the parameter.
    """
    tensor = tensor.to(like.device)
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


class ShardedLoop(Loop):
    """The loop over sharded parameters. Its checkpoints are unsharded: any number of processes can read them.

    Args:
        model: the trained model; a copy of it is sharded, and it receives the result.
        task: its frozen models are sharded in place.
        config, trained, arguments, order, factory, changes: as of :class:`Loop`.
    """

    model: Any
    lr_scheduler: Any

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        config: TrainConfig,
        trained: dict[str, nn.Parameter],
        arguments: TrainingArguments,
        order: Order,
        factory: Factory,
        changes: Sequence[str],
    ) -> None:
        objective = Objective(share(model), task)
        parts = split(objective, trained, task.frozen, arguments.device)
        super().__init__(objective, task, config, parts, arguments, order, factory, changes=changes)
        self.is_distributed_loading_by_transformers = True  # so that Trainer does not shard again
        self.target = changing(model, trained, changes)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, then copy the result to the original model."""
        result = super().train(*args, **kwargs)
        self._gather()
        return result

    def read(self, checkpoint: Path) -> None:
        """Read a checkpoint, and copy it to the original model."""
        super().read(checkpoint)
        self._gather()

    def _gather(self) -> None:
        """Copy what training changes to the original model."""
        for name, each in self.state_tensors.items():
            self.target[name].data.copy_(gathered(each.detach()))

    def _move_model_to_device(self, *_: Any) -> None:
        """Do nothing: the model is on its device."""

    def _defer_fsdp_gradient_reduction(self) -> Any:
        return nullcontext()  # deferred reduction would keep whole gradients

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors that training changes, gathered on the host."""
        return {name: gathered(tensor).cpu() for name, tensor in super().tensors().items()}

    def put(self, name: str, tensor: Tensor) -> None:
        """Overwrite this process's shard of a tensor that training changes.

        Args:
            name: name of the tensor in the state.
            tensor: the new values of the whole tensor, the same in all processes.
        """
        ours = self.state_tensors[name]
        ours.copy_(replicated(tensor, ours))

    def evaluated(self) -> None:
        """Free weights gathered by forward passes."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # the root keeps gathered weights until a backward pass

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        state = get_optimizer_state_dict(self.model, self._torch_optimizer, options=WHOLE)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            state = torch.load(Path(checkpoint) / OPTIMIZER, weights_only=True)
            set_optimizer_state_dict(self.model, self._torch_optimizer, state, options=WHOLE)
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER, weights_only=True))

    @property
    def _torch_optimizer(self) -> Any:
        return getattr(self.optimizer, "optimizer", self.optimizer)
