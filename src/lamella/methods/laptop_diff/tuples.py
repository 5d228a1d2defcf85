"""Measurement samples: images, timesteps, noise and conditions, the same for all measurements."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lamella.data import CaptionedImages
from lamella.methods.laptop_diff.denoiser import Denoiser


@dataclass(frozen=True)
class Tuples:
    """Rows of (x_0, t, noise, condition).

    Attributes:
        clean: x_0 [rows, channels, height, width].
        timesteps: t [rows], spread evenly, so that all intervals are represented equally.
        noise: in the shape of ``clean``.
        conditions: conditioning inputs by name, with one row per sample.
    """

    clean: Tensor
    timesteps: Tensor
    noise: Tensor
    conditions: Mapping[str, Tensor]

    @classmethod
    def of(cls, denoiser: Denoiser, images: CaptionedImages, count: int, seed: int = 0) -> Tuples:
        """Sample rows; images are repeated if there are too few.

        Args:
            denoiser: the model.
            images: the images.
            count: number of rows.
            seed: random seed.
        """
        generator = torch.Generator().manual_seed(seed)
        rows = [images.items[number % len(images)] for number in range(count)]
        clean = denoiser.clean(rows)
        even = (torch.arange(count) + torch.rand(count, generator=generator)) / count * denoiser.timesteps
        timesteps = even.long()[torch.randperm(count, generator=generator)]
        return cls(clean, timesteps, torch.randn(clean.shape, generator=generator), denoiser.conditions(rows))

    def __len__(self) -> int:
        return len(self.clean)

    def batches(self, size: int) -> Iterator[Tuples]:
        """Split the rows into batches of ``size``."""
        for start in range(0, len(self), size):
            chosen = slice(start, start + size)
            conditions = {name: each[chosen] for name, each in self.conditions.items()}
            yield Tuples(self.clean[chosen], self.timesteps[chosen], self.noise[chosen], conditions)

    def to(self, device: torch.device) -> Tuples:
        """Move all tensors to a device."""
        conditions = {name: each.to(device) for name, each in self.conditions.items()}
        return Tuples(self.clean.to(device), self.timesteps.to(device), self.noise.to(device), conditions)

    def bins(self, denoiser: Denoiser, count: int) -> Tensor:
        """Index of the timestep interval of each row [rows].

        Args:
            denoiser: the model.
            count: number of equal intervals.
        """
        return self.timesteps * count // denoiser.timesteps


@torch.no_grad()
def predictions(denoiser: Denoiser, network: object, tuples: Tuples, batch: int) -> Tensor:
    """Compute a network's predictions for all rows, in batches [rows, channels, height, width].

    Args:
        denoiser: the model.
        network: the network.
        tuples: the rows.
        batch: batch size.
    """
    return torch.cat([predicted(denoiser, network, each) for each in tuples.batches(batch)])


def predicted(denoiser: Denoiser, network: object, tuples: Tuples) -> Tensor:
    """Compute a network's predictions for some rows at once, on its device; the result is on the CPU.

    Args:
        denoiser: the model.
        network: the network.
        tuples: the rows.
    """
    rows = tuples.to(denoiser.network.device)
    noisy = denoiser.noising.add_noise(rows.clean, rows.noise, rows.timesteps)
    return denoiser.predict(network, noisy, rows.timesteps, rows.conditions).cpu()


def targets(denoiser: Denoiser, tuples: Tuples) -> Tensor:
    """Return the training targets of rows.

    Args:
        denoiser: the noise prediction network.
        tuples: the rows.
    """
    return denoiser.target(tuples.clean, tuples.noise, tuples.timesteps)


def error(one: Tensor, other: Tensor) -> Tensor:
    """Mean squared difference of each row [rows].

    Args:
        one: [rows, ...].
        other: [rows, ...].
    """
    return (one.double() - other.double()).square().flatten(1).mean(dim=1)
