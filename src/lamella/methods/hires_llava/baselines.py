"""Baseline samplers for comparison at an equal number of tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lamella.methods.hires_llava.modules import Attention, pooled, windows


class PooledSampler(nn.Module):
    """Average each window, without learned parameters.

    Args:
        width: feature size; unused.
        window: k: one token per window of k x k patches.
    """

    def __init__(self, width: int, window: int) -> None:
        super().__init__()
        self.window = window

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """Reduce slices to tokens [slices, h / k, w / k, width].

        Args:
            x: slices [slices, h, w, width].
            real: which patches belong to the image [slices, h, w] bool.
        """
        return pooled(x, real, self.window)


class PixelShuffleSampler(nn.Module):
    """Concatenate the features of a window and apply an MLP (pixel shuffle, as in InternVL).

    Args:
        width: feature size.
        window: k: one token per window of k x k patches.
    """

    def __init__(self, width: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.mlp = nn.Sequential(nn.Linear(window**2 * width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """Reduce slices to tokens [slices, h / k, w / k, width].

        Args:
            x: slices [slices, h, w, width].
            real: unused; patches outside the image are reduced as well.
        """
        out = self.mlp(windows(x, self.window).flatten(1))
        return out.view(len(x), x.shape[1] // self.window, x.shape[2] // self.window, -1)


class ConvolutionSampler(nn.Module):
    """Convolution, pooling, convolution (C-Abstractor without its squeeze-and-excitation blocks).

    Args:
        width: feature size.
        window: k: one token per window of k x k patches.
    """

    def __init__(self, width: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.before, self.after = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """Reduce slices to tokens [slices, h / k, w / k, width].

        Args:
            x: slices [slices, h, w, width].
            real: which patches belong to the image [slices, h, w] bool.
        """
        mixed = x + torch.relu(self.before(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        small = pooled(mixed, real, self.window)
        return small + torch.relu(self.after(small.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)


class LearntQueries(nn.Module):
    """Resampler: learned queries, the same for every slice, attend to the whole slice.

    Args:
        width: feature size.
        tokens: queries per side of a slice.
    """

    def __init__(self, width: int, tokens: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(0.02 * torch.randn(tokens, tokens, width))
        self.norm_query, self.norm_value, self.norm = (nn.LayerNorm(width) for _ in range(3))
        self.attention = Attention(width)
        self.ffn = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """Reduce slices to tokens, one per query [slices, tokens, tokens, width].

        Args:
            x: slices [slices, h, w, width].
            real: which patches belong to the image [slices, h, w] bool.
        """
        q = self.queries.flatten(0, 1).expand(len(x), -1, -1)
        o = q + self.attention(self.norm_query(q), self.norm_value(x.flatten(1, 2)), real.flatten(1))
        o = o + self.ffn(self.norm(o))
        return o.view(len(x), *self.queries.shape)


WINDOWED: dict[str, Any] = {"pool": PooledSampler, "shuffle": PixelShuffleSampler, "convolution": ConvolutionSampler}
