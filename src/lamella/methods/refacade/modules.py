"""The control branch: copies of a transformer's blocks at chosen layers, whose hints it adds to the frozen original.

    a, r  = patch(c), patch(c_r)                         video control and reference
    block   a, r <- W_a a + x_video, W_r r + x_ref       before the first one; W_a and W_r begin at zero
            [r | a] attend to one another                q, k, v and their norms apart, positions of one grid
            a reads the text                             r does not
            a, r <- feed-forward maps apart              both with shifts, scales and gates of their own times
    hint    W_after [r | a]                              begins at zero
    main    x <- block_i(x) + scale * hint               at the chosen layers i

Nothing of the original is changed: hooks add the hints while it runs, and go when the branch is removed. The branch is
of float32 whatever the original is of, since it trains: what it reads is cast at its border, and so are its hints.
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
    """Two streams that attend to one another: projections and norms apart, one softmax, one output.

    Args:
        attention: of a Wan block, of which each stream gets a copy.
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
        """What both take from both.

        Args:
            a: video control [batch, L_a, d].
            r: reference [batch, L_r, d].
            rotary: cosines and sines of the grid, the reference first [1, L_r + L_a, 1, d_head].
        """
        parts = [self._projected(self.reference, r), self._projected(self.video, a)]
        q, k, v = (torch.cat(each, dim=1).unflatten(2, (self.heads, -1)) for each in zip(*parts, strict=True))
        q, k = rotated(q, *rotary), rotated(k, *rotary)  # [batch, L_r + L_a, heads, d_head]
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        for part in self.to_out:
            seen = part(seen)
        return seen[:, r.shape[1] :], seen[:, : r.shape[1]]

    @staticmethod
    def _projected(stream: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return stream["norm_q"](stream["to_q"](x)), stream["norm_k"](stream["to_k"](x)), stream["to_v"](x)


def rotated(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotary positions as Wan has them: pairs of neighbouring channels turn together."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cosines[..., 0::2], sines[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).type_as(x)


class ControlBlock(nn.Module):
    """A block of two streams, begun as a copy of one of the original's.

    Args:
        block: of Wan.
        first: whether what the original reads joins the streams here.
        hidden: width of the feed-forward maps; the original's when left out, else they begin anew.
    """

    def __init__(self, block: Any, *, first: bool, hidden: int | None = None) -> None:
        super().__init__()
        dim = block.scale_shift_table.shape[-1]
        self.attention = JointStreamAttention(block.attn1)
        self.cross, self.norm_text = copy.deepcopy(block.attn2), copy.deepcopy(block.norm2)
        self.norm = copy.deepcopy(block.norm1)  # without numbers of its own
        self.feed_forward = nn.ModuleDict({stream: _feed_forward(block, dim, hidden) for stream in STREAMS})
        self.tables = nn.ParameterDict(
            {stream: nn.Parameter(block.scale_shift_table.detach().clone()) for stream in STREAMS}
        )
        self.joining = nn.ModuleDict({stream: silent(dim) for stream in STREAMS}) if first else None
        self.after = silent(dim)

    def forward(
        self, a: Tensor, r: Tensor, text: Tensor, times: tuple[Tensor, Tensor], rotary: Any
    ) -> tuple[Tensor, Tensor]:
        """Both streams behind the block; the times of both are [batch, 6, d]."""
        (a1, a2, a3, a4, a5, a6), (r1, r2, r3, r4, r5, r6) = (
            (self.tables[stream] + time.float()).chunk(6, dim=1) for stream, time in zip(STREAMS, times, strict=True)
        )
        seen = self.attention(self._modulated(a, a1, a2), self._modulated(r, r1, r2), rotary)
        a, r = (_gated(x, each, gate) for x, each, gate in zip((a, r), seen, (a3, r3), strict=True))
        a = a + self.cross(self.norm_text(a.float()).type_as(a), text, None, None)
        a = _gated(a, self.feed_forward["video"](self._modulated(a, a4, a5)), a6)
        r = _gated(r, self.feed_forward["reference"](self._modulated(r, r4, r5)), r6)
        return a, r

    def hint(self, a: Tensor, r: Tensor) -> Tensor:
        """What the original gets [batch, L_r + L_a, d]."""
        hint: Tensor = self.after(torch.cat([r, a], dim=1))
        return hint

    def _modulated(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        normed: Tensor = self.norm(x.float()) * (1 + scale) + shift
        return normed.type_as(x)


def _gated(x: Tensor, more: Tensor, gate: Tensor) -> Tensor:
    return (x.float() + more.float() * gate).type_as(x)


def silent(dim: int) -> nn.Linear:
    """A linear map that begins at zero."""
    made = nn.Linear(dim, dim)
    nn.init.zeros_(made.weight)
    nn.init.zeros_(made.bias)
    return made


def _feed_forward(block: Any, dim: int, hidden: int | None) -> nn.Module:
    if hidden is None:
        made: nn.Module = copy.deepcopy(block.ffn)
        return made
    attention = require("diffusers.models.attention", "vision", "a control branch")
    fresh: nn.Module = attention.FeedForward(dim, inner_dim=hidden, activation_fn="gelu-approximate")
    return fresh


class ControlBranch(nn.Module):
    """Control blocks for some layers of a video transformer, which stays as it is.

    Args:
        network: a ``WanTransformer3DModel``.
        layers: at which hints are added, in any order.
        in_channels: of c.
        ref_channels: of c_r.
        hidden: width of the feed-forward maps; the original's when left out.

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
            raise MethodError(f"layers {listed(layers)}: give some of 0 to {depth - 1}")
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
            ControlBlock(network.blocks[layer], first=number == 0, hidden=hidden)
            for number, layer in enumerate(self.layers)
        )
        self.float().requires_grad_(True)  # copies of what may be frozen, and of any precision

    @contextmanager
    def attached(self, network: Any, c: Tensor, c_r: Tensor, scale: float = 1.0) -> Iterator[None]:
        """Let a network have the hints while it runs in here, on [reference | video] as frames; then it is as before.

        Args:
            network: whose layers these are for.
            c: [batch, channels, F', h, w].
            c_r: [batch, channels, 1, h, w].
            scale: of the hints; at 0 there are none.
        """
        if scale == 0:
            yield
            return
        told: dict[str, Any] = {}
        hints: dict[int, Tensor] = {}

        def note_time(module: Any, given: Any) -> None:
            told["time"] = module.timesteps_proj(given[0])

        def compute(module: Any, given: Any) -> None:
            x, text, _, rotary = given
            hints.update(zip(self.layers, self.hints(x, c, c_r, told["time"], text, rotary), strict=True))

        def add(layer: int) -> Any:
            return lambda module, given, out: out + (scale * hints[layer]).type_as(out)

        handles = [
            network.condition_embedder.register_forward_pre_hook(note_time),
            network.blocks[0].register_forward_pre_hook(compute),
            *(network.blocks[layer].register_forward_hook(add(layer)) for layer in self.layers),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def hints(self, x: Tensor, c: Tensor, c_r: Tensor, time: Tensor, text: Tensor, rotary: Any) -> list[Tensor]:
        """The hint for each layer [batch, L_r + L_a, d], before the original has run.

        Args:
            x: what its first block reads, the reference's tokens first.
            time: sinusoids of the time [batch, frequencies].
            text: [batch, tokens, d].
        """
        x, c, c_r, text = (each.float() for each in (x, c, c_r, text))
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
