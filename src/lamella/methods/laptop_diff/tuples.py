"""What a network is measured on: pictures, times, noise and conditions, the same ones for every question."""

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
        timesteps: t [rows], spread evenly over all of them, so that each stretch has its share.
        noise: as ``clean``.
        conditions: what the network is told, by name; a row for each.
    """

    clean: Tensor
    timesteps: Tensor
    noise: Tensor
    conditions: Mapping[str, Tensor]

    @classmethod
    def of(cls, denoiser: Denoiser, pictures: CaptionedImages, count: int, seed: int = 0) -> Tuples:
        """Draw so many of them; pictures come again where there are fewer."""
        drawn = torch.Generator().manual_seed(seed)
        rows = [pictures.items[number % len(pictures)] for number in range(count)]
        clean = denoiser.clean(rows)
        even = (torch.arange(count) + torch.rand(count, generator=drawn)) / count * denoiser.timesteps
        timesteps = even.long()[torch.randperm(count, generator=drawn)]
        return cls(clean, timesteps, torch.randn(clean.shape, generator=drawn), denoiser.conditions(rows))

    def __len__(self) -> int:
        return len(self.clean)

    def batches(self, size: int) -> Iterator[Tuples]:
        """All rows, so many at once."""
        for start in range(0, len(self), size):
            chosen = slice(start, start + size)
            conditions = {name: each[chosen] for name, each in self.conditions.items()}
            yield Tuples(self.clean[chosen], self.timesteps[chosen], self.noise[chosen], conditions)

    def to(self, device: torch.device) -> Tuples:
        """All of it on a device."""
        conditions = {name: each.to(device) for name, each in self.conditions.items()}
        return Tuples(self.clean.to(device), self.timesteps.to(device), self.noise.to(device), conditions)

    def bins(self, denoiser: Denoiser, count: int) -> Tensor:
        """Which of so many equal stretches of time each row lies in [rows]."""
        return self.timesteps * count // denoiser.timesteps


@torch.no_grad()
def predictions(denoiser: Denoiser, network: object, tuples: Tuples, batch: int) -> Tensor:
    """What a network says of all rows [rows, channels, height, width]."""
    return torch.cat([predicted(denoiser, network, each) for each in tuples.batches(batch)])


def predicted(denoiser: Denoiser, network: object, tuples: Tuples) -> Tensor:
    """What a network says of some rows at once, on its device; the answer comes back from there."""
    rows = tuples.to(denoiser.network.device)
    noisy = denoiser.noising.add_noise(rows.clean, rows.noise, rows.timesteps)
    return denoiser.predict(network, noisy, rows.timesteps, rows.conditions).cpu()


def targets(denoiser: Denoiser, tuples: Tuples) -> Tensor:
    """What it should say."""
    return denoiser.target(tuples.clean, tuples.noise, tuples.timesteps)


def error(one: Tensor, other: Tensor) -> Tensor:
    """The mean squared difference of each row [rows]."""
    return (one.double() - other.double()).square().flatten(1).mean(dim=1)
