"""Flow matching: noisy latents, the velocity loss, and the training task of an unconditional network of clips.

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


def add_noise(z_0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return z_t, t and the target velocity of clean latents [rows, ...], from torch's global random state."""
    t = torch.rand(len(z_0), device=z_0.device)
    eps = torch.randn_like(z_0)
    noise_level = t.view(-1, *[1] * (z_0.ndim - 1))
    return (1 - noise_level) * z_0 + noise_level * eps, t, eps - z_0


def flow_loss(velocity: Velocity, z_0: Tensor) -> Tensor:
    """Return the flow-matching loss: the mean squared error of a velocity at random times and noise.

    Args:
        velocity: returns v from z_t [rows, C, F', h, w] and t [rows].
        z_0: clean latents [rows, C, F', h, w].
    """
    z_t, t, target = add_noise(z_0)
    return (velocity(z_t, t) - target).square().mean()


def count_clips(batch: Mapping[str, Tensor]) -> int:
    """Return the number of clips of a batch."""
    return len(next(iter(batch.values())))


def task(loss: Any, frozen: Sequence[nn.Module] = ()) -> Task:
    """Return the training task of a loss over stacked clips.

    Args:
        loss: the loss of a batch.
        frozen: modules that the loss uses without training them.
    """
    return Task(loss, collate=stacked, weight=count_clips, frozen=frozen)


@dataclass(frozen=True)
class Length:
    """Draws the number of frames of each batch.

    Attributes:
        alone: fraction of the batches that contain the first frame only, so that a network of clips also generates
            images.
    """

    alone: float = 0.0

    def __call__(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the batch, of tensors [rows, channels, F', h, w], with all frames or the first only."""
        one = self.alone > 0 and float(torch.rand(())) < self.alone
        return {name: each[:, :, :1] if one else each for name, each in batch.items()}


WHOLE = Length()  # always all frames


class BaseLoss:
    """The loss of an unconditional video transformer.

    A white frame takes the position of the reference, as in the unconditional pass of guidance.

    Args:
        velocity: velocity of the transformer, from z_t, t and the frame before them to v.
        length: draws the number of frames of a batch.
    """

    def __init__(self, velocity: Callable[[Tensor, Tensor, Tensor], Tensor], length: Length) -> None:
        self.velocity, self.length = velocity, length

    def __call__(self, network: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of a batch."""
        clean = self.length(batch)["clean"]
        white = torch.ones_like(clean[:, :, :1])
        return flow_loss(lambda z, t: self.velocity(z, t, white), clean)
