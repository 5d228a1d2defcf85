"""The control branch: copies of a transformer's blocks at chosen layers, whose hints are added to the frozen original.

    a, r  = patch(c), patch(c_r)                         video control and reference
    block   a, r <- W_a a + x_video, W_r r + x_ref       before the first one; W_a and W_r are initialised to zero
            [r | a] attend to each other                 separate q, k, v and norms, positions of one grid
            a attends to the text                        r does not
            a, r <- separate feed-forward layers         both with shifts, scales and gates from their own times
    hint    W_after [r | a]                              initialised to zero
    main    x <- block_i(x) + scale * hint               at the chosen layers i

The original is not changed: hooks add the hints during the forward pass, and are removed with the branch. A new branch
is in float32 whatever the original's precision, since it is trained; a trained one runs in the original's. Its inputs
and hints are cast.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamella.errors import MethodError, listed
from lamella.extras import require

STREAMS = ("video", "reference")


class JointStreamAttention(nn.Module):
    """Joint attention of two streams: separate projections and norms, one softmax, one output projection.

    Args:
        attention: attention of a Wan block, of which each stream gets a copy.
    """

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.heads = attention.heads
        for stream in STREAMS:
            parts = {name: copy.deepcopy(getattr(attention, name)) for name in ("to_q", "to_k", "to_v")}
            parts |= {name: copy.deepcopy(getattr(attention, name)) for name in ("norm_q", "norm_k")}
            setattr(self, stream, nn.ModuleDict(parts))
        self.to_out = copy.deepcopy(attention.to_out)

    def forward(self, a: Tensor, r: Tensor, rotary: Any) -> tuple[Tensor, Tensor]:
        """Return the attention outputs of both streams.

        Args:
            a: video control [batch, L_a, d].
            r: reference [batch, L_r, d].
            rotary: cosines and sines of the grid, the reference first [1, L_r + L_a, 1, d_head].
        """
        parts = [self._projected(self.reference, r), self._projected(self.video, a)]
        q, k, v = (torch.cat(each, dim=1).unflatten(2, (self.heads, -1)) for each in zip(*parts, strict=True))
        q, k = apply_rotary(q, *rotary), apply_rotary(k, *rotary)  # [batch, L_r + L_a, heads, d_head]
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        for part in self.to_out:
            attended = part(attended)
        return attended[:, r.shape[1] :], attended[:, : r.shape[1]]

    @staticmethod
    def _projected(stream: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return stream["norm_q"](stream["to_q"](x)), stream["norm_k"](stream["to_k"](x)), stream["to_v"](x)


def apply_rotary(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Apply Wan's rotary position embedding, which rotates pairs of adjacent channels.

    Args:
        x: queries or keys [..., channels].
        cosines: cosines of the angles, each twice [..., channels].
        sines: sines of the angles, each twice [..., channels].
    """
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cosines[..., 0::2], sines[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).type_as(x)


class ControlBlock(nn.Module):
    """A block of two streams, initialised as a copy of one of the original's.

    Args:
        block: a Wan block.
        first: whether the original's inputs are added to the streams here.
        hidden: intermediate size of the feed-forward layers; if None, that of the original; otherwise they are
            initialised at random.
    """

    def __init__(self, block: Any, *, first: bool, hidden: int | None = None) -> None:
        super().__init__()
        dim = block.scale_shift_table.shape[-1]
        self.attention = JointStreamAttention(block.attn1)
        self.cross, self.norm_text = copy.deepcopy(block.attn2), copy.deepcopy(block.norm2)
        self.norm = copy.deepcopy(block.norm1)  # without parameters
        self.feed_forward = nn.ModuleDict({stream: _feed_forward(block, dim, hidden) for stream in STREAMS})
        self.tables = nn.ParameterDict(
            {stream: nn.Parameter(block.scale_shift_table.detach().clone()) for stream in STREAMS}
        )
        self.joining = nn.ModuleDict({stream: zero_linear(dim) for stream in STREAMS}) if first else None
        self.after = zero_linear(dim)

    def forward(
        self, a: Tensor, r: Tensor, text: Tensor, times: tuple[Tensor, Tensor], rotary: Any
    ) -> tuple[Tensor, Tensor]:
        """Return both streams after the block.

        Args:
            a: video control [batch, L_a, d].
            r: reference [batch, L_r, d].
            text: [batch, tokens, d].
            times: time projections of both streams, each [batch, 6, d].
            rotary: cosines and sines of the grid.
        """
        (a1, a2, a3, a4, a5, a6), (r1, r2, r3, r4, r5, r6) = (
            (self.tables[stream] + time.float()).chunk(6, dim=1) for stream, time in zip(STREAMS, times, strict=True)
        )
        attended = self.attention(self._modulated(a, a1, a2), self._modulated(r, r1, r2), rotary)
        a, r = (_gated(x, each, gate) for x, each, gate in zip((a, r), attended, (a3, r3), strict=True))
        a = a + self.cross(self.norm_text(a.float()).type_as(a), text, None, None)
        a = _gated(a, self.feed_forward["video"](self._modulated(a, a4, a5)), a6)
        r = _gated(r, self.feed_forward["reference"](self._modulated(r, r4, r5)), r6)
        return a, r

    def hint(self, a: Tensor, r: Tensor) -> Tensor:
        """Return the hint to add to the original's hidden states [batch, L_r + L_a, d].

        Args:
            a: video control after the block [batch, L_a, d].
            r: reference after the block [batch, L_r, d].
        """
        hint: Tensor = self.after(torch.cat([r, a], dim=1))
        return hint

    def _modulated(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        normed: Tensor = self.norm(x.float()) * (1 + scale) + shift
        return normed.type_as(x)


def _gated(x: Tensor, more: Tensor, gate: Tensor) -> Tensor:
    return (x.float() + more.float() * gate).type_as(x)


def zero_linear(dim: int) -> nn.Linear:
    """Return a linear layer initialised to zero."""
    linear = nn.Linear(dim, dim)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def _feed_forward(block: Any, dim: int, hidden: int | None) -> nn.Module:
    if hidden is None:
        linear: nn.Module = copy.deepcopy(block.ffn)
        return linear
    attention = require("diffusers.models.attention", "vision", "a control branch")
    fresh: nn.Module = attention.FeedForward(dim, inner_dim=hidden, activation_fn="gelu-approximate")
    return fresh


class ControlBranch(nn.Module):
    """Control blocks for some layers of a frozen video transformer.

    Args:
        network: a ``WanTransformer3DModel``.
        layers: indices of the layers at which hints are added, in any order.
        in_channels: channels of c.
        ref_channels: channels of c_r.
        hidden: intermediate size of the feed-forward layers; defaults to the original's.

    Raises:
        MethodError: for layers that the network does not have.
    """

    def __init__(
        self, network: Any, layers: Sequence[int], in_channels: int, ref_channels: int, hidden: int | None = None
    ) -> None:
        super().__init__()
        depth = len(network.blocks)
        self.layers = sorted(set(layers))
        if not self.layers or not 0 <= self.layers[0] <= self.layers[-1] < depth:
            raise MethodError(f"layers {listed(layers)}: give layers from 0 to {depth - 1}")
        patch, dim = network.patch_embedding.kernel_size, network.patch_embedding.out_channels
        self.patches = nn.ModuleDict(
            {
                stream: nn.Conv3d(channels, dim, kernel_size=patch, stride=patch)
                for stream, channels in zip(STREAMS, (in_channels, ref_channels), strict=True)
            }
        )
        time = network.condition_embedder
        self.times = nn.ModuleDict(
            {
                stream: nn.ModuleDict(
                    {"embedder": copy.deepcopy(time.time_embedder), "projection": copy.deepcopy(time.time_proj)}
                )
                for stream in STREAMS
            }
        )
        self.blocks = nn.ModuleList(
            ControlBlock(network.blocks[layer], first=index == 0, hidden=hidden)
            for index, layer in enumerate(self.layers)
        )
        self.float().requires_grad_(True)  # the copied modules may be frozen, and of any precision

    @contextmanager
    def attached(self, network: Any, c: Tensor, c_r: Tensor, scale: float = 1.0) -> Iterator[None]:
        """Add the hints to a network within a context, on frames [reference | video]; then restore the network.

        Args:
            network: the network of these layers.
            c: [batch, channels, F', h, w].
            c_r: [batch, channels, 1, h, w].
            scale: factor on the hints; at 0 there are none.
        """
        if scale == 0:
            yield
            return
        inputs: dict[str, Any] = {}
        hints: dict[int, Tensor] = {}

        def record_time(module: Any, args: Any) -> None:
            inputs["time"] = module.timesteps_proj(args[0])

        def compute(module: Any, args: Any) -> None:
            x, text, _, rotary = args
            hints.update(zip(self.layers, self.hints(x, c, c_r, inputs["time"], text, rotary), strict=True))

        def add(layer: int) -> Any:
            return lambda module, args, out: out + (scale * hints[layer]).type_as(out)

        handles = [
            network.condition_embedder.register_forward_pre_hook(record_time),
            network.blocks[0].register_forward_pre_hook(compute),
            *(network.blocks[layer].register_forward_hook(add(layer)) for layer in self.layers),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def hints(self, x: Tensor, c: Tensor, c_r: Tensor, time: Tensor, text: Tensor, rotary: Any) -> list[Tensor]:
        """Return the hint of each layer [batch, L_r + L_a, d], computed before the original runs.

        Args:
            x: input of the original's first block, the reference's tokens first.
            c: [batch, channels, F', h, w].
            c_r: [batch, channels, 1, h, w].
            time: sinusoidal embedding of the time [batch, frequencies].
            text: [batch, tokens, d].
            rotary: cosines and sines of the grid.
        """
        precision = next(self.parameters()).dtype
        x, c, c_r, text = (each.to(precision) for each in (x, c, c_r, text))
        a, r = (self.patches[s](each).flatten(2).transpose(1, 2) for s, each in zip(STREAMS, (c, c_r), strict=True))
        blocks: Any = self.blocks
        first = blocks[0].joining
        a, r = first["video"](a) + x[:, r.shape[1] :], first["reference"](r) + x[:, : r.shape[1]]
        times = (self._time("video", time, x), self._time("reference", time, x))
        found = []
        for block in blocks:
            a, r = block(a, r, text, times, rotary)
            found.append(block.hint(a, r))
        return found

    def _time(self, stream: str, time: Tensor, like: Tensor) -> Tensor:
        parts: Any = self.times[stream]
        embedded = parts["embedder"](time.to(next(parts["embedder"].parameters()).dtype)).type_as(like)
        projected: Tensor = parts["projection"](F.silu(embedded)).unflatten(1, (6, -1))
        return projected
