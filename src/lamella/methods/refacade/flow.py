"""Flow matching: noisy latents, the loss of a velocity, and the task of a network that learns what clips look like.

z_t = (1 - t) z_0 + t eps,  t ~ U(0, 1)        L = | v(z_t, t, ...) - (eps - z_0) |^2, a mean over elements
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lamella.train import Task
from lamella.train.supervised import stacked

Velocity = Callable[[Tensor, Tensor], Tensor]  # from z_t [batch, ...] and t [batch] to v


def noised(z_0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """z_t, t and the velocity to be learnt, of clean latents [rows, ...]; by torch's own state."""
    t = torch.rand(len(z_0), device=z_0.device)
    eps = torch.randn_like(z_0)
    share = t.view(-1, *[1] * (z_0.ndim - 1))
    return (1 - share) * z_0 + share * eps, t, eps - z_0


def flow_loss(velocity: Velocity, z_0: Tensor) -> Tensor:
    """The mean squared error of a velocity at times and noise by chance."""
    z_t, t, target = noised(z_0)
    return (velocity(z_t, t) - target).square().mean()


def count_clips(batch: Mapping[str, Tensor]) -> int:
    return len(next(iter(batch.values())))


def task(loss: Any, frozen: Sequence[nn.Module] = ()) -> Task:
    """A loss over stacked clips."""
    return Task(loss, collate=stacked, weight=count_clips, frozen=frozen)


@dataclass(frozen=True)
class Length:
    """How many frames of its clips a batch has.

    Attributes:
        alone: share of the batches that see the first frame alone, so that a network of clips draws pictures, too.
    """

    alone: float = 0.0

    def __call__(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A batch of which every tensor [rows, channels, F', h, w] has as many frames as this time is drawn."""
        one = self.alone > 0 and float(torch.rand(())) < self.alone
        return {name: each[:, :, :1] if one else each for name, each in batch.items()}


WHOLE = Length()  # all frames, always


class BaseLoss:
    """A video transformer without any condition: it learns what clips look like.

    A white frame stands where the reference will be, as it does in the pass that guidance leads away from.

    Args:
        velocity: of the transformer, from z_t, t and the frame that is seen before them to v.
        length: how many frames a batch has.
    """

    def __init__(self, velocity: Callable[[Tensor, Tensor, Tensor], Tensor], length: Length) -> None:
        self.velocity, self.length = velocity, length

    def __call__(self, network: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        clean = self.length(batch)["clean"]
        white = torch.ones_like(clean[:, :, :1])
        return flow_loss(lambda z, t: self.velocity(z, t, white), clean)
