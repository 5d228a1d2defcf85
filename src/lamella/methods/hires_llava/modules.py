"""The modules that HiRes-LLaVA adds: an adapter that mixes slices across seams, and a sampler that reduces tokens.

Before training, the adapter is the identity and the sampler is average pooling.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, scaled_dot_product_attention

from lamella.methods.hires_llava.slicing import TileLayout, cut, merge

Branches = Literal["both", "local", "global"]
Scope = Literal["window", "slice"]
HEAD = 64  # channels per attention head


class SliceRestore(nn.Module):
    """SliceRestore adapter: merge the slices of an image into one feature map, mix it, and cut it again.

        F  = merge(slices)                        [rows * h, columns * w, D]
        F' = F + local(LN F) + global(LN F)       local: depthwise 3 x 3 over the whole map, across its seams
        slices' = cut(F')                         global: the map shrunk to h x w, self-attention, enlarged again

    Args:
        width: D of the encoder.
        branches: ``local``, ``global`` or ``both``.
        confined: process each slice separately, as a control: as many parameters, but nothing crosses a seam.
        kernel: kernel size of the local branch; odd.
        ratio: reduction of the width in the global branch.
    """

    def __init__(
        self, width: int, branches: Branches = "both", *, confined: bool = False, kernel: int = 3, ratio: int = 4
    ) -> None:
        super().__init__()
        self.confined = confined
        self.norm = nn.LayerNorm(width)
        self.local = LocalMixing(width, kernel) if branches != "global" else None
        self.overall = GlobalMixing(width, max(width // ratio, 1)) if branches != "local" else None

    def forward(self, h: Tensor, slices: TileLayout) -> Tensor:
        """Mix the slices of each image; views and images of one slice stay bitwise equal.

        Args:
            h: hidden states [tiles, tokens, width]; tokens that are not patches come first and stay unchanged.
            slices: layout of the tiles.

        Returns:
            The hidden states with mixed slices, in the shape of ``h``.
        """
        across = slices.slicing.across
        beside = h.shape[1] - across**2
        for (rows, columns), tiles, real in slices.groups:
            if rows * columns == 1 and not self.confined:
                continue
            which, real = tiles.to(h.device), real.to(h.device)
            if self.confined:
                which, real, rows, columns = which.view(-1, 1), real.flatten(0, 1)[:, None], 1, 1
            x = h[which.flatten(), beside:].view(*which.shape, across, across, -1)
            mixed = self.mixed(merge(x, rows, columns), merge(real, rows, columns), rows, columns)
            patches = cut(mixed, rows, columns).flatten(0, 1).flatten(1, 2)
            h = h.index_copy(0, which.flatten(), torch.cat([h[which.flatten(), :beside], patches], dim=1))
        return h

    def mixed(self, f: Tensor, real: Tensor, rows: int, columns: int) -> Tensor:
        """Compute F'.

        Args:
            f: maps [images, rows * h, columns * w, width].
            real: which patches belong to the image, bool in the shape of the map.
            rows: rows of slices.
            columns: columns of slices.
        """
        mask = real[..., None].to(f.dtype)
        normed = self.norm(f) * mask
        for branch in (self.local, self.overall):
            if branch is not None:
                f = f + branch(normed, mask, rows, columns) * mask
        return f


class LocalMixing(nn.Module):
    """Depthwise convolution over the whole feature map, with a gate per channel that is initialised to zero.

    Args:
        width: channels of the feature map.
        kernel: kernel size; odd.
    """

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width)
        self.gate = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, mask: Tensor, rows: int, columns: int) -> Tensor:
        """Mix feature maps.

        Args:
            x: feature maps [images, rows * h, columns * w, width].
            mask: unused; the arguments are those of :class:`GlobalMixing`.
            rows: unused.
            columns: unused.

        Returns:
            The gated result of the convolution, in the shape of ``x``.
        """
        return self.gate * self.mix(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class GlobalMixing(nn.Module):
    """Self-attention over the map reduced to the size of one slice; the output projection is initialised to zero.

    Args:
        width: channels of the map.
        narrow: channels of the attention.
    """

    def __init__(self, width: int, narrow: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, narrow)
        self.norm = nn.LayerNorm(narrow)
        self.attention = Attention(narrow)
        self.up = nn.Linear(narrow, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor, mask: Tensor, rows: int, columns: int) -> Tensor:
        """Mix feature maps.

        Args:
            x: feature maps [images, rows * h, columns * w, width].
            mask: which patches belong to the image, bool in the shape of the map.
            rows: rows of slices.
            columns: columns of slices.
        """
        share = _pooled(mask, rows, columns)  # fraction of each position of the small map that is image
        small = self.down(_pooled(x, rows, columns) / share.clamp_min(torch.finfo(x.dtype).eps))
        h, w = small.shape[1:3]
        tokens = self.norm(small).flatten(1, 2)
        seen = (share > 0).flatten(1)  # [images, h * w]
        small = small + self.attention(tokens, tokens, seen).unflatten(1, (h, w))
        there = (share > 0).float()  # positions outside the image do not contribute to their neighbours
        large = _enlarged(small.float() * there, x) / _enlarged(there, x).clamp_min(torch.finfo(torch.float32).eps)
        return self.up(large.to(x.dtype))


def _pooled(x: Tensor, down: int, along: int) -> Tensor:
    """Average over blocks of ``down`` x ``along`` patches [images, h, w, width]."""
    return avg_pool2d(x.permute(0, 3, 1, 2), (down, along)).permute(0, 2, 3, 1)


def _enlarged(small: Tensor, like: Tensor) -> Tensor:
    """Enlarge a small map to the size of ``like`` [images, rows * h, columns * w, width], bilinear."""
    large = interpolate(small.permute(0, 3, 1, 2), like.shape[1:3], mode="bilinear", align_corners=False)
    return large.permute(0, 2, 3, 1)


class Attention(nn.Module):
    """Multi-head cross-attention with a mask.

    Args:
        width: channels of queries and context; heads have 64 channels, or the nearest size that divides the width.
        zero: initialise the output projection to zero.
    """

    def __init__(self, width: int, zero: bool = False) -> None:
        super().__init__()
        self.heads = next(heads for heads in range(max(1, width // HEAD), 0, -1) if width % heads == 0)
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        if zero:
            nn.init.zeros_(self.out.weight)
            nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, context: Tensor, seen: Tensor) -> Tensor:
        """Attend from queries to a context.

        Args:
            x: queries [rows, n, width].
            context: context [rows, m, width].
            seen: visible context positions [rows, m] bool; a row without any attends to all positions.

        Returns:
            [rows, n, width].
        """
        q = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = (
            each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in self.key_value(context).chunk(2, dim=-1)
        )
        mask = (seen | ~seen.any(-1, keepdim=True))[:, None, None]
        return self.out(scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


class SelfMiningSampler(nn.Module):
    """Self-Mining Sampler: the queries are the means of windows and attend to their window.

        Q = pool(X);   O = Q + CrossAttention(LN Q, LN X);   O = O + FFN(LN O)

    Both residual branches are initialised to zero, so that it starts as average pooling.

    Args:
        width: feature size of input and output.
        window: k: one token of k x k patches.
        scope: context of a query: its window, or the whole slice.
    """

    def __init__(self, width: int, window: int, scope: Scope = "window") -> None:
        super().__init__()
        self.window, self.scope = window, scope
        self.norm_query, self.norm_value, self.norm = (nn.LayerNorm(width) for _ in range(3))
        self.attention = Attention(width, zero=True)
        self.ffn = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        nn.init.zeros_(self.ffn[2].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.ffn[2].bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """Reduce slices to tokens.

        Args:
            x: slices [slices, h, w, width].
            real: which patches belong to the image [slices, h, w] bool.

        Returns:
            Tokens [slices, h / k, w / k, width].
        """
        k = self.window
        queries = pooled(x, real, k)
        slices, rows, columns, width = queries.shape
        if self.scope == "window":
            q, context, seen = queries.reshape(-1, 1, width), windows(x, k), windows(real[..., None], k)[..., 0]
        else:
            q, context, seen = queries.flatten(1, 2), x.flatten(1, 2), real.flatten(1)
        o = q + self.attention(self.norm_query(q), self.norm_value(context), seen)
        o = o + self.ffn(self.norm(o))
        return o.view(slices, rows, columns, width)


def windows(x: Tensor, k: int) -> Tensor:
    """Split slices into windows [slices * h / k * w / k, k * k, width].

    Args:
        x: slices [slices, h, w, width].
        k: side of a window in patches.
    """
    x = x.unflatten(2, (-1, k)).unflatten(1, (-1, k)).transpose(2, 3)  # [slices, h / k, w / k, k, k, width]
    return x.flatten(3, 4).flatten(0, 2)


def pooled(x: Tensor, real: Tensor, k: int) -> Tensor:
    """Average the image patches of each window; a window without any averages all of its patches.

    Args:
        x: slices [slices, h, w, width].
        real: which patches belong to the image [slices, h, w] bool.
        k: side of a window in patches.
    """
    mask = real[..., None].to(x.dtype)
    mask = torch.where(windows(mask, k).any(1, keepdim=True), windows(mask, k), 1.0)
    means = (windows(x, k) * mask).sum(1) / mask.sum(1)
    return means.view(len(x), x.shape[1] // k, x.shape[2] // k, -1)
