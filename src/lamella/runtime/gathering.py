"""What gathers some tokens of each row, or some experts of each token, so that nothing is computed for the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lamella.errors import ArchitectureError, PlanError
from lamella.runtime.masks import visible
from lamella.stack import Stack

Keep = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Gathering:
    """Some tokens of each row of a call, in their order.

    Rows that have fewer than others have empty places in front, as in :class:`SparseSlot`.

    Attributes:
        which: the tokens [rows, time] bool.
        index: their places in the call [rows, most].
        held: which of these hold a token at all [rows, most] bool.
    """

    which: Tensor
    index: Tensor
    held: Tensor

    @classmethod
    def of(cls, which: Tensor) -> Gathering:
        most = int(which.sum(dim=1).max())
        index = which.long().argsort(dim=1, stable=True)[:, which.shape[1] - most :]
        return cls(which, index, which.gather(1, index))

    def gather(self, h: Tensor) -> Tensor:
        """[rows, time, hidden] -> [rows, most, hidden]"""
        return h.gather(1, self.index.unsqueeze(-1).expand(-1, -1, h.shape[-1]))

    def scatter(self, h: Tensor, out: Tensor) -> Tensor:
        """``h`` [rows, time, hidden], but for the gathered tokens, which take ``out`` [rows, most, hidden]."""
        return h.masked_scatter(self.which.unsqueeze(-1), out[self.held])

    def visible(self, mask: Tensor) -> Tensor:
        """What the gathered tokens see of each other, by a model's mask over all of them.

        Args:
            mask: [rows or 1, 1, time, time], bool (True is visible) or added to scores.

        Returns:
            [rows, 1, most, most] bool
        """
        seen = torch.take_along_dim(visible(mask), self.index[:, None, :, None], dim=2)
        return torch.take_along_dim(seen, self.index[:, None, None, :], dim=3) & self.held[:, None, None, :]


def inputs_at(given: Mapping[str, Any], index: Tensor) -> dict[str, Any]:
    """What a layer is called with that says positions, at these places [rows, some] of its time axis.

    Raises:
        ArchitectureError: where it is called with more for every token than its position.
    """
    found: dict[str, Any] = {}
    for name, value in given.items():
        if name == "position_ids" and value is not None:  # [(axes,) rows or 1, time]
            found[name] = torch.take_along_dim(value, index, dim=-1)
        elif name.startswith("position_embeddings") and value is not None:  # each [(axes,) rows or 1, time, size]
            one = isinstance(value, Tensor)
            each = tuple(torch.take_along_dim(part, index[..., None], dim=-2) for part in ((value,) if one else value))
            found[name] = each[0] if one else each
        elif name == "position_bias" and value is not None and value.shape[-1] == value.shape[-2] >= index.shape[1]:
            every = value.expand(len(index), -1, -1, -1)  # of scores [rows, heads, time, time], all tokens of a call
            every = torch.take_along_dim(every, index[:, None, :, None], dim=2)
            found[name] = torch.take_along_dim(every, index[:, None, None, :], dim=3)
        elif isinstance(value, Tensor) and value.ndim > 1 and name != "attention_mask":
            raise ArchitectureError(f"tokens cannot be taken out of layers that are called with '{name}' for each")
    return found


class PositionInputs:
    """What the layers of a stack are called with at any position: for tokens that move up where others are left out."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._calls: tuple[dict[str, Any], ...] = ()
        self._known = 0
        self._most = int(getattr(stack.config, "max_position_embeddings", None) or 0)

    def __call__(self, layer: int, at: Tensor) -> dict[str, Any]:
        """What says positions in a call of this layer, for tokens at these positions [rows, some]."""
        if at.numel() and (needed := int(at.max()) + 1) > self._known:
            ahead = min(2 * self._known, self._most)  # a table of positions ends somewhere
            self._known = max(needed, ahead)
            with torch.no_grad():
                self._calls = self._stack.context(torch.full((1, self._known), 3, device=self._stack.device)).calls
        return inputs_at(self._calls[layer], at)


@contextmanager
def sparsely(experts: nn.Module, keep: Keep) -> Iterator[None]:
    """Let a module of experts compute, for each token, only those that ``keep`` says.

    Args:
        experts: what a router's choice is given to; its output for a token is the sum over what was chosen for it.
        keep: given the experts chosen for each token [tokens, used] and their weights, which to run, as bool.
    """
    own, before = experts.forward, experts.__dict__.get("forward")

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        given = [*args, *kwargs.values()]
        ids, weights = _chosen(given)
        kept = keep(ids, weights)
        if kept.all():
            return own(*args, **kwargs)
        token, place = kept.nonzero(as_tuple=True)

        def of_pair(each: Any) -> Any:
            """Of a chosen expert and its token alone, as if no other had been chosen."""
            if each is ids or each is weights:
                return each[token, place].unsqueeze(1)
            return each[token] if isinstance(each, Tensor) and each.shape[:1] == ids.shape[:1] else each

        states = next(each for each in given if isinstance(each, Tensor) and each.is_floating_point())
        total = torch.zeros_like(states)
        if len(token) > 0:
            out = own(*map(of_pair, args), **{name: of_pair(each) for name, each in kwargs.items()})
            total.index_add_(0, token, out)
        return total

    experts.forward = forward
    try:
        yield
    finally:
        del experts.forward
        if before is not None:
            experts.forward = before


def _chosen(given: list[Any]) -> tuple[Tensor, Tensor]:
    """The experts that were chosen for each token, and their weights [tokens, used]."""
    pairs = [each for each in given if isinstance(each, Tensor) and each.ndim == 2]
    for ids in (each for each in pairs if each.dtype in (torch.int64, torch.int32)):
        for weights in pairs[::-1]:
            if weights.is_floating_point() and weights.shape == ids.shape:
                return ids, weights
    raise PlanError("experts can be skipped where they are told which were chosen for each token, with what weight")
