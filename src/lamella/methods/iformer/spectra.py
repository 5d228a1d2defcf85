"""Spectra of feature maps: how much of a layer's output varies from position to position, and how fast.

    Delta(f) = log(|F(f)| + e) - log(|F(0)| + e)         F: 2-D Fourier transform of a channel, averaged over radii

f ranges from 0 to pi, which is a change of sign from each position to the next. In addition, the fraction of the energy
beyond pi / 2 is measured, relative to all energy including the mean's.
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
    """The spectrum of the channels of a map.

    Attributes:
        frequencies: of the bins, in radians per position, from 0 to pi.
        delta: relative log amplitude of each bin, a mean over images and channels; the first is 0.
        high: fraction of the energy beyond pi / 2.
    """

    frequencies: list[float]
    delta: list[float]
    high: float


class Spectra:
    """Accumulate the spectra of maps of one size, batch by batch.

    Args:
        grid: height and width of the maps, at least two positions each.

    Raises:
        MethodError: for a smaller grid.
    """

    def __init__(self, grid: tuple[int, int]) -> None:
        if min(grid) < 2:
            raise MethodError(f"a map of {grid[0]} x {grid[1]} positions has no spectrum: give larger images")
        y, x = (2 * math.pi * torch.fft.fftfreq(side, dtype=torch.float64).abs() for side in grid)
        radius = (y[:, None].square() + x.square()).sqrt()
        self.bins = max(grid) // 2 + 1  # resolution of the longer side, so F(0) is alone in its bin
        bin_index = (radius / math.pi * (self.bins - 1)).round().long()
        inside = torch.nn.functional.one_hot(bin_index.clamp(max=self.bins), self.bins + 1)[..., :-1].double()
        self._average = inside / inside.sum((0, 1))  # [H, W, bins]; frequencies beyond pi are ignored
        self._beyond = radius > math.pi / 2 + 1e-9
        self._delta = torch.zeros(self.bins, dtype=torch.float64)
        self._energy = torch.zeros(2, dtype=torch.float64)
        self._maps = 0

    @torch.no_grad()
    def add(self, z: Tensor) -> None:
        """Add maps [B, C, H, W]."""
        size = torch.fft.fft2(z.double()).abs()
        average, beyond = self._average.to(z.device), self._beyond.to(z.device)
        logs = (torch.einsum("bchw,hwf->bcf", size, average) + EPS).log()
        self._delta += (logs - logs[..., :1]).sum((0, 1)).cpu()
        power = size.square()
        self._energy += torch.stack([power[..., beyond].sum(), power.sum()]).cpu()
        self._maps += z.shape[0] * z.shape[1]

    def result(self) -> Spectrum:
        """The accumulated spectrum."""
        frequencies = [math.pi * each / (self.bins - 1) for each in range(self.bins)]
        high, whole = self._energy.tolist()
        return Spectrum(frequencies, (self._delta / max(self._maps, 1)).tolist(), high / whole if whole else 0.0)


def spectrum(z: Tensor) -> Spectrum:
    """Compute the spectrum of maps [B, C, H, W]."""
    found = Spectra((z.shape[-2], z.shape[-1]))
    found.add(z)
    return found.result()
