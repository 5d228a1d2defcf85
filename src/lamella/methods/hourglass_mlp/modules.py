"""The module that a plan uses in place of a feed-forward sublayer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lamella.methods.hourglass_mlp.network import HourglassFFN
from lamella.plan import SiteModule
from lamella.stack import Position, Stack


class HourglassSublayer(SiteModule):
    """Narrow sub-blocks on the residual stream: h + HourglassFFN(h).

    Args:
        stack: the model.
        positions: the position of the sublayer.
        inner: inner width of each sub-block.
        eps: epsilon of the norms.
    """

    def __init__(self, stack: Stack, positions: Sequence[Position], *, inner: list[int], eps: float = 1e-6) -> None:
        super().__init__(stack, positions)
        self.ffn = HourglassFFN(stack.architecture.sizes_of(stack.config).hidden, inner, eps)

    def forward(self, h: Tensor, out: Tensor | None, call: dict[str, Any]) -> Tensor:
        """Add the output of the sub-blocks to the residual stream.

        Args:
            h: input of the sublayer [batch, tokens, hidden].
            out: residual stream to add to; None for ``h``.
            call: keyword arguments of the layer; unused.
        """
        added: Tensor = self.ffn(h.to(self.ffn.dtype)).to(h.dtype)
        return (h if out is None else out) + added
