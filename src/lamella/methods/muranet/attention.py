"""Relation attention over feature maps: a position is weighted by its relation to its neighbourhood.

    q, k, v = Wq x, Wk x, Wv x          1 x 1 convolutions [C -> C]
    u = GELU(q / |q| * k / |k|)         the relation, element by element; |.| is the root mean square over channels
    r_1 = DW3(u), r_s = DW3(r_{s-1})    chained 3 x 3 depthwise convolutions with receptive fields of 3, 5, 7 pixels
    a = W_m (u + sum_s r_s)             several scales in one map
    y = W_o (a * v)

There is no softmax over all pairs of positions, so the cost is linear in their number. The norms limit the relation, so
that the output grows linearly with the input. A product of q, k and v would grow with its cube: a value that is large
for one image would grow from block to block until it overflows.

The paper's own formula was not available; three interpretations are implemented, the first being the default:

    gate            the above
    msca            u = GELU(Wq x), a = W_m sum_s r_s, y = W_o (a * u), as in SegNeXt with 3 x 3 chains; grows with the
                    square of the input
    local_softmax   at each scale, softmax over the nine neighbours at distance s of q_i . k_j / sqrt(d), applied to v

``depthwise`` is the baseline: one 3 x 3 depthwise convolution, and a wider feed-forward part, so that a block has the
same number of parameters as with ``gate``.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, pad, rms_norm, unfold

Variant = Literal["gate", "msca", "local_softmax", "depthwise"]
Paths = Literal["chained", "parallel"]
Norm = Literal["batch", "group"]
HEAD = 32  # channels per head of the local softmax
SCALE = 1e-2  # initial scale of a block's residual updates
EPS = 1e-3  # of norms, as in YOLOX; its momentum of 0.03 is too slow for short trainings


def normed(channels: int, norm: Norm) -> nn.Module:
    """Create a batch norm, or a group norm for batches of one or two images.

    Args:
        channels: number of channels.
        norm: ``batch``, or ``group`` for at most 8 groups that divide the channels.
    """
    if norm == "batch":
        return nn.BatchNorm2d(channels, eps=EPS)
    return nn.GroupNorm(next(groups for groups in (8, 4, 2, 1) if channels % groups == 0), channels)


def rms_norm2d(x: Tensor) -> Tensor:
    """Divide each position of x [B, C, H, W] by the root mean square of its channels."""
    return rms_norm(x.movedim(1, -1), x.shape[1:2], eps=EPS).movedim(-1, 1)


class RelationAttention2d(nn.Module):
    """Relation attention on feature maps [B, C, H, W]; the shape does not change.

    Args:
        channels: C.
        variant: interpretation of the paper's block.
        scales: S, number of 3 x 3 paths.
        paths: ``chained``, or ``parallel``: each path is applied to u, with dilation s.
    """

    def __init__(self, channels: int, variant: Variant = "gate", scales: int = 3, paths: Paths = "chained") -> None:
        super().__init__()
        self.variant, self.scales, self.chained = variant, scales, paths == "chained"
        self.heads = max(1, channels // HEAD) if channels % HEAD == 0 else 1
        if variant == "depthwise":
            self.local = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
            return
        self.q = nn.Conv2d(channels, channels, 1)
        if variant != "msca":
            self.k, self.v = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)
        if variant != "local_softmax":
            dilations = [1 if self.chained else s for s in range(1, scales + 1)]
            self.paths = nn.ModuleList(
                nn.Conv2d(channels, channels, 3, padding=s, dilation=s, groups=channels) for s in dilations
            )
            self.mix = nn.Conv2d(channels, channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the attention to x [B, C, H, W]."""
        found: Tensor
        if self.variant == "depthwise":
            found = self.local(x)
        elif self.variant == "local_softmax":
            found = self.out(self._softmax(self.q(x), self.k(x), self.v(x)))
        elif self.variant == "msca":
            u = gelu(self.q(x))
            found = self.out(self.mix(self._related(u)) * u)
        else:
            u = gelu(rms_norm2d(self.q(x)) * rms_norm2d(self.k(x)))
            found = self.out(self.mix(u + self._related(u)) * self.v(x))
        return found

    def _related(self, u: Tensor) -> Tensor:
        """Return sum_s r_s."""
        total, r = torch.zeros_like(u), u
        for path in self.paths:
            r = path(r if self.chained else u)
            total = total + r
        return total

    def _softmax(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return each position as a weighted mean over its nine neighbours at every scale, without padding."""
        b, c, h, w = q.shape
        d = c // self.heads
        inside = torch.ones(1, 1, h, w, dtype=q.dtype, device=q.device)
        total = torch.zeros_like(q)
        for s in range(1, self.scales + 1):
            # [B, heads, d, 9, H W]
            keys, values = (unfold(each, 3, s, s).view(b, self.heads, d, 9, h * w) for each in (k, v))
            weights = (q.view(b, self.heads, d, 1, h * w) * keys).sum(2) / d**0.5
            weights = weights.masked_fill(unfold(pad(inside, (s,) * 4), 3, s)[:, None] == 0, -torch.inf)
            total = total + (weights.softmax(2)[:, :, None] * values).sum(3).view(b, c, h, w)
        return total


class RelationBlock(nn.Module):
    """Relation attention and a feed-forward part, each with a residual connection, on maps [B, C, H, W].

    Args:
        channels: C.
        variant: see :class:`RelationAttention2d`.
        scales: see :class:`RelationAttention2d`.
        paths: see :class:`RelationAttention2d`.
        expand: expansion factor of the feed-forward part.
        scale: initial scale of both residual updates; at 0 the output is bitwise equal to the input.
        norm: normalisation before each part.
    """

    def __init__(
        self,
        channels: int,
        variant: Variant = "gate",
        scales: int = 3,
        paths: Paths = "chained",
        *,
        expand: int = 4,
        scale: float = SCALE,
        norm: Norm = "batch",
    ) -> None:
        super().__init__()
        hidden = expand * channels
        if variant == "depthwise":  # gate has 5 C^2 + (10 S - 5) C more parameters, and a hidden channel 2 C + 11
            hidden += round((5 * channels**2 + (10 * scales - 5) * channels) / (2 * channels + 11))
        self.attention = nn.Sequential()
        self.attention.add_module("norm", normed(channels, norm))
        self.attention.add_module("relation", RelationAttention2d(channels, variant, scales, paths))
        self.forward_part = nn.Sequential()
        self.forward_part.add_module("norm", normed(channels, norm))
        self.forward_part.add_module("widen", nn.Conv2d(channels, hidden, 1))
        self.forward_part.add_module("local", nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden))
        self.forward_part.add_module("act", nn.GELU())
        self.forward_part.add_module("narrow", nn.Conv2d(hidden, channels, 1))
        self.g1 = nn.Parameter(torch.full((channels,), scale))  # no weight decay on vectors
        self.g2 = nn.Parameter(torch.full((channels,), scale))

    def forward(self, x: Tensor) -> Tensor:
        """Apply both parts to x [B, C, H, W]."""
        x = x + self.g1[:, None, None] * self.attention(x)
        return x + self.g2[:, None, None] * self.forward_part(x)
