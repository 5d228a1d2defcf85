"""How local the heads of an attention are: how far they look, and how much of what they give is a small convolution.

    O_h ~ DW_k(V_h) + b          for each channel, the k x k weights and the bias that a ridge regression finds

A head with a good fit can be a depthwise convolution of its V: that is what takes its place.
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
    """What a timm attention does for tokens x [B, N, C], head by head.

    Returns:
        Its weights [B, n, N, N], V and the output before the projection [B, n, N, d].
    """
    q, k, v = attn.qkv(x).unflatten(-1, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4)
    weights = (attn.q_norm(q) * attn.scale @ attn.k_norm(k).transpose(-2, -1)).softmax(-1)
    return weights, v, weights @ v


def distances(grid: tuple[int, int]) -> Tensor:
    """From each place of a grid to each other, in places [hw, hw]."""
    y, x = torch.meshgrid(*(torch.arange(side, dtype=torch.float32) for side in grid), indexing="ij")
    places = torch.stack([y, x], -1).flatten(0, 1)
    return (places[:, None] - places).square().sum(-1).sqrt()


def attention_distance(weights: Tensor, grid: tuple[int, int]) -> Tensor:
    """How far each head looks on the grid, a mean over pictures and places [n], in places.

    Args:
        weights: [B, n, N, N]; tokens before those of the grid play no part.
    """
    count = grid[0] * grid[1]
    among = weights[..., -count:, -count:].float()
    among = among / among.sum(-1, keepdim=True).clamp(min=1e-12)
    return (among * distances(grid).to(weights)).sum(-1).mean((0, 2))


def on_grid(rows: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tokens of heads [B, n, N, d] as maps [B, n d, H, W], without those that stand before the grid."""
    count = grid[0] * grid[1]
    return rows[:, :, -count:].permute(0, 1, 3, 2).flatten(1, 2).unflatten(-1, grid)


@dataclass
class Moments:
    """Sums from which the convolution of every channel is found, or judged.

    Attributes:
        gram: of the k x k neighbours and the constant, by channel [D, k k + 1, k k + 1].
        cross: of these with the output [D, k k + 1].
        square, total: of the output [D].
        count: places.
    """

    gram: Tensor
    cross: Tensor
    square: Tensor
    total: Tensor
    count: int = 0

    @classmethod
    def empty(cls, channels: int, kernel: int) -> Moments:
        """Nothing seen yet."""
        taps = kernel * kernel + 1

        def zeros(*rest: int) -> Tensor:
            return torch.zeros(channels, *rest, dtype=torch.float64)

        return cls(zeros(taps, taps), zeros(taps), zeros(), zeros())

    @torch.no_grad()
    def add(self, v: Tensor, out: Tensor, kernel: int) -> None:
        """Maps of what goes in and what comes out [B, D, H, W]; beyond the border are zeros, as a convolution has."""
        batch, channels = v.shape[:2]
        near = unfold(v.double(), kernel, padding=kernel // 2).unflatten(1, (channels, -1))  # [B, D, k k, hw]
        near = near.permute(1, 0, 3, 2).flatten(1, 2)  # [D, places, k k]
        near = torch.cat([near, near.new_ones(*near.shape[:2], 1)], -1)
        y = out.double().flatten(2).permute(1, 0, 2).flatten(1)  # [D, places]
        self.gram += (near.transpose(1, 2) @ near).cpu()
        self.cross += torch.einsum("dpt,dp->dt", near, y).cpu()
        self.square += y.square().sum(1).cpu()
        self.total += y.sum(1).cpu()
        self.count += batch * out.shape[-2] * out.shape[-1]

    def solve(self, ridge: float) -> Tensor:
        """The weights of each channel, its bias last [D, k k + 1].

        Args:
            ridge: the penalty on weights, in the mean square of what goes in.
        """
        penalty = self.gram.diagonal(dim1=1, dim2=2)[:, :-1].mean(1, keepdim=True).clamp(min=1e-12) * ridge
        diagonal = torch.cat([penalty.expand(-1, self.gram.shape[1] - 1), torch.zeros_like(penalty)], 1)
        whole = self.gram + torch.diag_embed(diagonal)  # of a channel that is always 0 it has no inverse
        return (torch.linalg.pinv(whole, hermitian=True) @ self.cross[..., None])[..., 0]

    def explained(self, weights: Tensor, heads: int) -> list[float]:
        """R^2 of convolutions by head: the share of the variance around each channel's mean that they explain.

        Args:
            weights: [D, k k + 1].
            heads: of as many channels each.
        """
        fits = torch.einsum("dt,dtu,du->d", weights, self.gram, weights)
        errors = self.square - 2 * (weights * self.cross).sum(1) + fits
        variance = self.square - self.total.square() / max(self.count, 1)
        both = [each.view(heads, -1).sum(1) for each in (errors, variance)]
        return (1 - both[0] / both[1].clamp(min=1e-300)).tolist()


def kernels(weights: Tensor, kernel: int, channels: Sequence[int]) -> tuple[Tensor, Tensor]:
    """What a depthwise convolution of some channels has: weights [D, 1, k, k] and biases [D]."""
    chosen = weights[list(channels)]
    return chosen[:, :-1].reshape(-1, 1, kernel, kernel).float(), chosen[:, -1].float()
