"""Locality of attention heads: their attention distance, and how well a small convolution approximates their output.

    O_h ~ DW_k(V_h) + b          for each channel, the k x k weights and the bias from a ridge regression

A head with a good fit can be replaced by a depthwise convolution of its V.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import unfold


@torch.no_grad()
def heads_of(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute a timm attention head by head.

    Args:
        attn: timm's attention.
        x: tokens [B, N, C].

    Returns:
        Attention weights [B, n, N, N], V and the output before the projection [B, n, N, d].
    """
    q, k, v = attn.qkv(x).unflatten(-1, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4)
    weights = (attn.q_norm(q) * attn.scale @ attn.k_norm(k).transpose(-2, -1)).softmax(-1)
    return weights, v, weights @ v


def distances(grid: tuple[int, int]) -> Tensor:
    """Distances between all positions of a grid, in grid steps [hw, hw]."""
    y, x = torch.meshgrid(*(torch.arange(side, dtype=torch.float32) for side in grid), indexing="ij")
    positions = torch.stack([y, x], -1).flatten(0, 1)
    return (positions[:, None] - positions).square().sum(-1).sqrt()


def attention_distance(weights: Tensor, grid: tuple[int, int]) -> Tensor:
    """Compute the mean attention distance of each head [n], in grid steps.

    Args:
        weights: [B, n, N, N]; tokens before those of the grid are ignored.
        grid: rows and columns of tokens.
    """
    count = grid[0] * grid[1]
    among = weights[..., -count:, -count:].float()
    among = among / among.sum(-1, keepdim=True).clamp(min=1e-12)
    return (among * distances(grid).to(weights)).sum(-1).mean((0, 2))


def on_grid(rows: Tensor, grid: tuple[int, int]) -> Tensor:
    """Arrange the tokens of heads [B, n, N, d] as maps [B, n d, H, W], without the tokens before the grid.

    Args:
        rows: the tokens.
        grid: rows and columns of tokens.
    """
    count = grid[0] * grid[1]
    return rows[:, :, -count:].permute(0, 1, 3, 2).flatten(1, 2).unflatten(-1, grid)


@dataclass
class Moments:
    """Sums from which the convolution of every channel is fitted or evaluated.

    Attributes:
        gram: of the k x k neighbours and the constant, by channel [D, k k + 1, k k + 1].
        cross: of these with the output [D, k k + 1].
        square, total: sums of the squared output and of the output [D].
        count: number of positions.
    """

    gram: Tensor
    cross: Tensor
    square: Tensor
    total: Tensor
    count: int = 0

    @classmethod
    def empty(cls, channels: int, kernel: int) -> Moments:
        """Create empty sums.

        Args:
            channels: number of channels.
            kernel: side of the convolution.
        """
        taps = kernel * kernel + 1

        def zeros(*rest: int) -> Tensor:
            return torch.zeros(channels, *rest, dtype=torch.float64)

        return cls(zeros(taps, taps), zeros(taps), zeros(), zeros())

    @torch.no_grad()
    def add(self, v: Tensor, out: Tensor, kernel: int) -> None:
        """Add maps of inputs and outputs; beyond the border are zeros, as in a convolution.

        Args:
            v: inputs [B, D, H, W].
            out: outputs [B, D, H, W].
            kernel: side of the convolution.
        """
        batch, channels = v.shape[:2]
        near = unfold(v.double(), kernel, padding=kernel // 2).unflatten(1, (channels, -1))  # [B, D, k k, hw]
        near = near.permute(1, 0, 3, 2).flatten(1, 2)  # [D, positions, k k]
        near = torch.cat([near, near.new_ones(*near.shape[:2], 1)], -1)
        y = out.double().flatten(2).permute(1, 0, 2).flatten(1)  # [D, positions]
        self.gram += (near.transpose(1, 2) @ near).cpu()
        self.cross += torch.einsum("dpt,dp->dt", near, y).cpu()
        self.square += y.square().sum(1).cpu()
        self.total += y.sum(1).cpu()
        self.count += batch * out.shape[-2] * out.shape[-1]

    def solve(self, ridge: float) -> Tensor:
        """Solve for the weights of each channel, its bias last [D, k k + 1].

        Args:
            ridge: penalty on the weights, relative to the mean square of the input.
        """
        penalty = self.gram.diagonal(dim1=1, dim2=2)[:, :-1].mean(1, keepdim=True).clamp(min=1e-12) * ridge
        diagonal = torch.cat([penalty.expand(-1, self.gram.shape[1] - 1), torch.zeros_like(penalty)], 1)
        whole = self.gram + torch.diag_embed(diagonal)  # singular for a channel that is always 0
        return (torch.linalg.pinv(whole, hermitian=True) @ self.cross[..., None])[..., 0]

    def explained(self, weights: Tensor, heads: int) -> list[float]:
        """R^2 of convolutions by head: the fraction of the variance around each channel's mean that they explain.

        Args:
            weights: [D, k k + 1].
            heads: number of heads, with equal numbers of channels.
        """
        fit_convolutions = torch.einsum("dt,dtu,du->d", weights, self.gram, weights)
        errors = self.square - 2 * (weights * self.cross).sum(1) + fit_convolutions
        variance = self.square - self.total.square() / max(self.count, 1)
        both = [each.view(heads, -1).sum(1) for each in (errors, variance)]
        return (1 - both[0] / both[1].clamp(min=1e-300)).tolist()


def kernels(weights: Tensor, kernel: int, channels: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Extract a depthwise convolution of some channels: weights [D, 1, k, k] and biases [D].

    Args:
        weights: fitted weights with bias of all channels.
        kernel: side of the convolution.
        channels: the channels.
    """
    chosen = weights[list(channels)]
    return chosen[:, :-1].reshape(-1, 1, kernel, kernel).float(), chosen[:, -1].float()
