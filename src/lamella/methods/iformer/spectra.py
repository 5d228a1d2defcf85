"""Spectra of feature maps: how much of what a layer gives changes from place to place, and how fast.

    Delta(f) = log(|F(f)| + e) - log(|F(0)| + e)         F: 2-D Fourier transform of a channel, averaged over radii

f goes from 0 to pi, which is a change of sign from each place to the next. Beside it stands the share of the energy
beyond pi / 2, of all energy, the mean's included.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lamella.errors import MethodError

EPS = 1e-6


@dataclass(frozen=True)
class Spectrum:
    """Of the channels of one map.

    Attributes:
        frequencies: of the bins, in radians from one place to the next, from 0 to pi.
        delta: relative log amplitude in each of them, a mean over pictures and channels; 0 at first.
        high: share of the energy beyond pi / 2.
    """

    frequencies: list[float]
    delta: list[float]
    high: float


class Spectra:
    """Adds up the spectra of maps of one size, batch by batch.

    Args:
        grid: height and width of the maps, two places or more.

    Raises:
        MethodError: for a grid in which nothing can change.
    """

    def __init__(self, grid: tuple[int, int]) -> None:
        if min(grid) < 2:
            raise MethodError(f"a map of {grid[0]} x {grid[1]} places has no spectrum: give larger pictures")
        y, x = (2 * math.pi * torch.fft.fftfreq(side, dtype=torch.float64).abs() for side in grid)
        radius = (y[:, None].square() + x.square()).sqrt()
        self.bins = max(grid) // 2 + 1  # as far apart as what the longer side tells apart, so F(0) is alone in its bin
        place = (radius / math.pi * (self.bins - 1)).round().long()
        inside = torch.nn.functional.one_hot(place.clamp(max=self.bins), self.bins + 1)[..., :-1].double()
        self._average = inside / inside.sum((0, 1))  # [H, W, bins]; what is beyond pi counts nowhere
        self._beyond = radius > math.pi / 2 + 1e-9
        self._delta = torch.zeros(self.bins, dtype=torch.float64)
        self._energy = torch.zeros(2, dtype=torch.float64)
        self._maps = 0

    @torch.no_grad()
    def add(self, z: Tensor) -> None:
        """Maps [B, C, H, W]."""
        size = torch.fft.fft2(z.double()).abs()
        average, beyond = self._average.to(z.device), self._beyond.to(z.device)
        logs = (torch.einsum("bchw,hwf->bcf", size, average) + EPS).log()
        self._delta += (logs - logs[..., :1]).sum((0, 1)).cpu()
        power = size.square()
        self._energy += torch.stack([power[..., beyond].sum(), power.sum()]).cpu()
        self._maps += z.shape[0] * z.shape[1]

    def result(self) -> Spectrum:
        """What has come together."""
        frequencies = [math.pi * each / (self.bins - 1) for each in range(self.bins)]
        high, whole = self._energy.tolist()
        return Spectrum(frequencies, (self._delta / max(self._maps, 1)).tolist(), high / whole if whole else 0.0)


def spectrum(z: Tensor) -> Spectrum:
    """The spectrum of maps [B, C, H, W]."""
    found = Spectra((z.shape[-2], z.shape[-1]))
    found.add(z)
    return found.result()
