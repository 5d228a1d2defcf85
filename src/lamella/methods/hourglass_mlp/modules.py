"""What a plan puts in place of a feed-forward sublayer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lamella.methods.hourglass_mlp.network import HourglassFFN
from lamella.plan import SiteModule
from lamella.stack import Position, Stack


class Sublayer(SiteModule):
    """Narrow sub-blocks on the stream: h + HourglassFFN(h).

    Args:
        stack, positions: where it stands.
        inner: the inner width of each sub-block.
        eps: of their norms.
    """

    def __init__(self, stack: Stack, positions: Sequence[Position], *, inner: list[int], eps: float = 1e-6) -> None:
        super().__init__(stack, positions)
        self.ffn = HourglassFFN(stack.architecture.sizes_of(stack.config).hidden, inner, eps)

    def forward(self, h: Tensor, out: Tensor | None, call: dict[str, Any]) -> Tensor:
        added: Tensor = self.ffn(h.to(self.ffn.dtype)).to(h.dtype)
        return (h if out is None else out) + added
