"""AdamW with a separate state for each vector: each row of A and column of B has its own step count.

    m = b1 m + (1 - b1) g      v = b2 v + (1 - b2) g^2      p -= lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

t is a column vector for A and a row vector for B, so that a vector whose state was reset starts with the bias
correction of its first step. Other parameters have a single t, which is plain AdamW.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lamella.train import TrainConfig
from lamella.train.sharding import replicated

ROWS, COLUMNS, WHOLE = 0, 1, None  # the axis of the vectors of a group's parameters


class VectorAdamW(torch.optim.Optimizer):
    """AdamW without weight decay and with step counts per vector.

    Args:
        groups: dictionaries with ``params``, ``lr`` and ``axis``.
        lr: learning rate.
        betas: as in :class:`torch.optim.AdamW`.
        eps: as in :class:`torch.optim.AdamW`.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "axis": WHOLE})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Perform an optimizer step."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            first, second = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    shape = _steps_shape(parameter, group["axis"])
                    state["step"] = parameter.new_zeros(shape, dtype=torch.float32)  # whole in a sharded run
                    state["mean"], state["square"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
                step = state["step"].add_(1)
                mean = state["mean"].lerp_(parameter.grad, 1 - first)
                square = state["square"].mul_(second).addcmul_(parameter.grad, parameter.grad, value=1 - second)
                corrections = [(1 - beta ** step.double()).to(parameter.dtype) for beta in (first, second)]
                parameter.addcdiv_(
                    mean / corrections[0], (square / corrections[1]).sqrt_().add_(group["eps"]), value=-group["lr"]
                )
        return loss


def _steps_shape(parameter: Tensor, axis: int | None) -> list[int]:
    return [size if dimension == axis else 1 for dimension, size in enumerate(parameter.shape)]


@torch.no_grad()
def reset_state(optimizer: torch.optim.Optimizer, parameter: Tensor, vectors: Tensor, axis: int) -> None:
    """Reset the state of some vectors; does nothing before their first step.

    Args:
        optimizer: the optimizer.
        parameter: the parameter.
        vectors: the indices of the vectors `[count]`.
        axis: the axis along which they are indexed.
    """
    mask = torch.zeros(_steps_shape(parameter, axis), dtype=torch.bool)
    mask.index_fill_(axis, vectors, True)
    for each in optimizer.state.get(parameter, {}).values():
        each.masked_fill_(replicated(mask, each), 0)


def per_vector(rest: float) -> Any:
    """Return the optimizer factory for :func:`lamella.train.fit`.

    Args:
        rest: the learning rate of other parameters, relative to that of the adapters.
    """
    return partial(_optimizer, rest=rest)


def _optimizer(
    model: nn.Module, trained: Mapping[str, nn.Parameter], config: TrainConfig, *, rest: float
) -> VectorAdamW:
    groups: dict[int | None, list[nn.Parameter]] = {ROWS: [], COLUMNS: [], WHOLE: []}
    for name, parameter in trained.items():
        axis = ROWS if ".lora_A." in name else COLUMNS if ".lora_B." in name else WHOLE
        groups[axis].append(parameter)
    return VectorAdamW(
        [{"params": each, "axis": axis, "lr": rest if axis is WHOLE else 1.0} for axis, each in groups.items() if each],
        betas=config.betas,
    )
