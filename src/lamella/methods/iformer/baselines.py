"""Baseline of the conversion: attention heads that are removed without a replacement."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from lamella.methods.iformer.geometry import Geometry
from lamella.methods.iformer.vision import Vision


class FewerHeads(nn.Module):
    """A timm attention with a subset of its heads, one or more, and the same interface.

    Args:
        attn: timm's attention.
        kept: the heads to keep.
    """

    def __init__(self, attn: Any, kept: Sequence[int]) -> None:
        super().__init__()
        self.heads, d, chosen = len(kept), attn.head_dim, list(kept)
        dim = attn.qkv.in_features
        self.qkv = nn.Linear(dim, 3 * self.heads * d, bias=attn.qkv.bias is not None)
        self.proj = nn.Linear(self.heads * d, attn.proj.out_features, bias=attn.proj.bias is not None)
        self.q_norm, self.k_norm, self.head_dim = attn.q_norm, attn.k_norm, d
        with torch.no_grad():
            self.qkv.weight.copy_(attn.qkv.weight.view(3, attn.num_heads, d, -1)[:, chosen].flatten(0, 2))
            if attn.qkv.bias is not None:
                self.qkv.bias.copy_(attn.qkv.bias.view(3, attn.num_heads, d)[:, chosen].flatten())
            self.proj.weight.copy_(attn.proj.weight.view(-1, attn.num_heads, d)[:, chosen].flatten(1))
            if attn.proj.bias is not None:
                self.proj.bias.copy_(attn.proj.bias)

    @property
    def num_heads(self) -> int:
        """Number of heads."""
        return self.heads

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attend over tokens [B, N, C].

        Args:
            x: tokens [B, N, C].
            attn_mask: mask of :func:`torch.nn.functional.scaled_dot_product_attention`.
            is_causal: attend only to earlier tokens.
        """
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        out = scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, attn_mask, is_causal=is_causal)
        logits: Tensor = self.proj(out.transpose(1, 2).flatten(2))
        return logits


def nothing(layer: int, v: Tensor, out: Tensor) -> Tensor:
    """Replacement of a removed head: zeros.

    Args:
        layer: index of the layer.
        v: values of its heads.
        out: output of its heads.
    """
    return torch.zeros_like(out)


def least_cut(worth: npt.NDArray[np.float64], count: int) -> list[tuple[int, ...]]:
    """Select the heads that remain when the least important heads of all layers are removed, at least one per layer.

    Args:
        worth: importance of each head [L, n].
        count: number of heads to remove.

    Returns:
        The remaining heads of each layer.
    """
    kept = [set(range(worth.shape[1])) for _ in worth]
    for flat in np.argsort(worth, axis=None, kind="stable"):
        layer, head = divmod(int(flat), worth.shape[1])
        if count and len(kept[layer]) > 1:
            kept[layer].remove(head)
            count -= 1
    return [tuple(sorted(each)) for each in kept]


def cut(vision: Vision, geometry: Geometry, kept: Sequence[tuple[int, ...]]) -> Vision:
    """Copy a vision transformer with a subset of its heads.

    Args:
        vision: the vision transformer.
        geometry: its geometry.
        kept: the heads to keep in each layer.
    """
    built = copy.deepcopy(vision.model)
    for block, heads in zip(built.blocks, kept, strict=True):
        if len(heads) < geometry.heads:
            block.attn = FewerHeads(block.attn, heads)
    return Vision(built.eval(), vision.name, vision.size, vision.channels, vision.mean, vision.std, vision.crop)
