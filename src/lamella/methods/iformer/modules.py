"""Replacement of attention in a layer of a trained vision transformer: fewer heads, and local paths.

    v = W_v x, of the replaced heads                                     [B, m d, H, W]
    Y_c = concat( DW_k(v) + b,  GELU(W_p MaxPool(v[:P]) + b_p),  remaining heads )
    Y = W_o (Y_c + DW3x3(Y_c)) + b_o

Tokens before those of the grid, such as a class token, only have the remaining heads; a constant replaces the
convolution and zeros replace the pooling. W_p and DW3x3 are initialised to zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, max_pool2d, scaled_dot_product_attention

from lamella.errors import MethodError


@dataclass(frozen=True)
class LayerPlan:
    """Plan for the attention of one layer.

    Attributes:
        kept: the heads to keep.
        conv: channels of the convolution: those of the replaced heads.
        pool: channels of the max-pooling.
    """

    kept: tuple[int, ...]
    conv: int
    pool: int


class LocalAttention(nn.Module):
    """Attention with local paths, with the interface of timm's attention, on tokens [B, prefix + H W, C].

    Args:
        dim: C.
        head_dim: d.
        layer: plan of the layer.
        grid: H and W.
        prefix: tokens before those of the grid.
        kernel: k.
        qkv_bias: whether the projections to Q, K and V have biases.
        norms: norms of Q and K, or None.
    """

    def __init__(
        self,
        dim: int,
        head_dim: int,
        layer: LayerPlan,
        grid: tuple[int, int],
        *,
        prefix: int,
        kernel: int,
        qkv_bias: bool = True,
        norms: tuple[nn.Module, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if kernel < 1 or kernel % 2 == 0:
            raise MethodError(f"kernel {kernel}: give an odd number")
        if not 0 <= layer.pool <= layer.conv or layer.conv % head_dim or not layer.conv:
            raise MethodError(
                f"{layer.pool} of {layer.conv} channels are pooled: give channels of whole heads, and pool at most all"
            )
        self.layer, self.grid, self.before, self.head_dim = layer, grid, prefix, head_dim
        attended = len(layer.kept) * head_dim
        width = attended + layer.conv + layer.pool
        self.qkv = nn.Linear(dim, 3 * attended, bias=qkv_bias) if attended else None
        self.q_norm, self.k_norm = norms or (nn.Identity(), nn.Identity())
        self.value = nn.Linear(dim, layer.conv, bias=qkv_bias)
        self.conv = nn.Conv2d(layer.conv, layer.conv, kernel, padding=kernel // 2, groups=layer.conv)
        self.pool = nn.Conv2d(layer.pool, layer.pool, 1) if layer.pool else None
        self.prefix = nn.Parameter(torch.zeros(prefix, layer.conv)) if prefix else None
        self.fuse = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.proj = nn.Linear(width, dim)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Mix tokens [B, prefix + H W, C].

        Args:
            x: tokens [B, prefix + H W, C].
            attn_mask: must be None, because convolution and pooling cannot follow a mask.
            is_causal: must be False.
        """
        if attn_mask is not None or is_causal:
            raise MethodError("a layer with local paths does not support masks")
        if x.shape[1] != self.before + self.grid[0] * self.grid[1]:
            raise MethodError(
                f"{x.shape[1]} tokens: these local paths are for a grid of {self.grid[0]} x {self.grid[1]}"
            )
        v = self.value(x[:, self.before :]).transpose(1, 2).unflatten(-1, self.grid)  # [B, m d, H, W]
        parts = [self.conv(v)]
        if self.pool is not None:
            parts.append(gelu(self.pool(max_pool2d(v[:, : self.layer.pool], 3, stride=1, padding=1))))
        attended = self.attended(x)  # [B, N, a d]
        parts.append(attended[:, self.before :].transpose(1, 2).unflatten(-1, self.grid))
        y = torch.cat(parts, dim=1)
        rows = (y + self.fuse(y)).flatten(2).transpose(1, 2)
        if self.prefix is not None:
            first = self.prefix.expand(len(x), -1, -1)
            nothing = first.new_zeros(len(x), self.before, self.layer.pool)
            rows = torch.cat([torch.cat([first, nothing, attended[:, : self.before]], -1), rows], dim=1)
        out: Tensor = self.proj(rows)
        return out

    def attended(self, x: Tensor) -> Tensor:
        """Compute the output of the remaining heads [B, N, a d]."""
        if self.qkv is None:
            return x.new_zeros(*x.shape[:2], 0)
        q, k, v = self.qkv(x).unflatten(-1, (3, len(self.layer.kept), self.head_dim)).permute(2, 0, 3, 1, 4)
        return scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v).transpose(1, 2).flatten(2)

    @torch.no_grad()
    def begin(self, attn: Any, weight: Tensor, bias: Tensor, prefix: Tensor | None, seed: int) -> None:
        """Initialise from an attention: the remaining heads are copied, the others become their fitted convolution.

        Args:
            attn: timm's attention with all heads.
            weight: weights of the fitted convolution [m d, 1, k, k], head by head.
            bias: bias of the fitted convolution [m d].
            prefix: mean output of the replaced heads for tokens before the grid [prefix, m d].
            seed: random seed of the projection columns of the pooling, whose gradient would vanish at zero.
        """
        heads, d = attn.num_heads, self.head_dim
        gone = [head for head in range(heads) if head not in self.layer.kept]
        rows = attn.qkv.weight.view(3, heads, d, -1)
        self.value.weight.copy_(rows[2, gone].flatten(0, 1))
        if self.qkv is not None:
            self.qkv.weight.copy_(rows[:, list(self.layer.kept)].flatten(0, 2))
        if attn.qkv.bias is not None:
            biases = attn.qkv.bias.view(3, heads, d)
            self.value.bias.copy_(biases[2, gone].flatten())
            if self.qkv is not None:
                self.qkv.bias.copy_(biases[:, list(self.layer.kept)].flatten())
        self.conv.weight.copy_(weight)
        self.conv.bias.copy_(bias)  # type: ignore[union-attr]
        if self.prefix is not None and prefix is not None:
            self.prefix.copy_(prefix)
        self.fuse.weight.zero_()
        columns = attn.proj.weight.view(-1, heads, d)
        drawn = torch.randn(len(columns), self.layer.pool, generator=torch.Generator().manual_seed(seed)) * 0.02
        if self.pool is not None:
            self.pool.weight.zero_()
            self.pool.bias.zero_()  # type: ignore[union-attr]
        parts = [columns[:, gone].flatten(1), drawn.to(columns), columns[:, list(self.layer.kept)].flatten(1)]
        self.proj.weight.copy_(torch.cat(parts, dim=1))
        self.proj.bias.copy_(torch.zeros_like(self.proj.bias) if attn.proj.bias is None else attn.proj.bias)


class AttentionCost(NamedTuple):
    """Cost of an attention sublayer.

    Attributes:
        parameters: number of parameters.
        flops: multiply-adds per image.
    """

    parameters: int
    flops: int


def cost_of(attn: Any, tokens: int, positions: int) -> AttentionCost:
    """Compute the cost of an attention, timm's or one with local paths.

    Args:
        attn: the attention.
        tokens: N, the inputs of linear layers.
        positions: H W, the inputs of convolutions.
    """
    flops = 0
    for part in attn.modules():
        if isinstance(part, nn.Linear):
            rows = positions if part is getattr(attn, "value", None) else tokens
            flops += rows * part.weight.numel()
        elif isinstance(part, nn.Conv2d):
            flops += positions * part.weight.numel()
    kept = len(attn.layer.kept) if isinstance(attn, LocalAttention) else attn.num_heads
    flops += 2 * tokens * tokens * kept * attn.head_dim
    return AttentionCost(sum(each.numel() for each in attn.parameters()), flops)


def plan_layer(heads: int, head_dim: int, kept: Sequence[int], pool: float) -> LayerPlan:
    """Plan a layer that keeps some heads: the channels of the others are convolved, and a fraction of them pooled.

    Args:
        heads: number of heads.
        head_dim: channels per head.
        kept: the heads to keep.
        pool: pooled fraction of the replaced channels.
    """
    conv = (heads - len(kept)) * head_dim
    return LayerPlan(tuple(kept), conv, round(pool * conv))
