"""Gathering of some tokens of each row, or some experts of each token, so that nothing is computed for the others."""

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
    """Some tokens of each row of a call, in order.

    Rows with fewer tokens than others have empty entries in front, as in :class:`SparseSlot`.

    Attributes:
        which: the tokens [rows, time] bool.
        index: their positions in the call [rows, most].
        held: which entries hold a token [rows, most] bool.
    """

    which: Tensor
    index: Tensor
    held: Tensor

    @classmethod
    def of(cls, which: Tensor) -> Gathering:
        """Return the gathering of the tokens ``which`` [rows, time] bool."""
        most = int(which.sum(dim=1).max())
        index = which.long().argsort(dim=1, stable=True)[:, which.shape[1] - most :]
        return cls(which, index, which.gather(1, index))

    def gather(self, h: Tensor) -> Tensor:
        """Return the hidden states of the tokens: [rows, time, hidden] -> [rows, most, hidden]."""
        return h.gather(1, self.index.unsqueeze(-1).expand(-1, -1, h.shape[-1]))

    def scatter(self, h: Tensor, out: Tensor) -> Tensor:
        """Return ``h`` [rows, time, hidden] with ``out`` [rows, most, hidden] at the gathered tokens.

        Args:
            h: hidden states of all tokens.
            out: hidden states of the gathered tokens.
        """
        return h.masked_scatter(self.which.unsqueeze(-1), out[self.held])

    def visible(self, mask: Tensor) -> Tensor:
        """Return which gathered tokens see one another, according to a model's mask over all tokens.

        Args:
            mask: [rows or 1, 1, time, time], bool (True is visible) or added to scores.

        Returns:
            [rows, 1, most, most] bool
        """
        seen = torch.take_along_dim(visible(mask), self.index[:, None, :, None], dim=2)
        return torch.take_along_dim(seen, self.index[:, None, None, :], dim=3) & self.held[:, None, None, :]


def inputs_at(given: Mapping[str, Any], index: Tensor) -> dict[str, Any]:
    """Return the position-dependent arguments of a layer at some positions [rows, some] of its time axis.

    Args:
        given: arguments of the layer.
        index: positions along the time axis [rows, some].

    Raises:
        ArchitectureError: if the layer takes other arguments per token than its position.
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
            every = value.expand(
                len(index), -1, -1, -1
            )  # added to scores [rows, heads, time, time], all tokens of a call
            every = torch.take_along_dim(every, index[:, None, :, None], dim=2)
            found[name] = torch.take_along_dim(every, index[:, None, None, :], dim=3)
        elif isinstance(value, Tensor) and value.ndim > 1 and name != "attention_mask":
            raise ArchitectureError(f"tokens cannot be gathered in layers that take '{name}' per token")
    return found


class PositionInputs:
    """The position-dependent arguments of a stack's layers at any position.

    Tokens that move up when others are skipped need them.

    Args:
        stack: the stack.
    """

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._calls: tuple[dict[str, Any], ...] = ()
        self._known = 0
        self._limit = int(getattr(stack.config, "max_position_embeddings", None) or 0)

    def __call__(self, layer: int, at: Tensor) -> dict[str, Any]:
        """Return the position-dependent arguments of a layer for tokens at these positions [rows, some]."""
        if at.numel() and (needed := int(at.max()) + 1) > self._known:
            ahead = min(2 * self._known, self._limit)  # a position table has a limited length
            self._known = max(needed, ahead)
            with torch.no_grad():
                self._calls = self._stack.context(torch.full((1, self._known), 3, device=self._stack.device)).calls
        return inputs_at(self._calls[layer], at)


@contextmanager
def sparsely(experts: nn.Module, keep: Keep) -> Iterator[None]:
    """Make a module of experts compute, for each token, only the experts that ``keep`` selects.

    Args:
        experts: the module that receives the router's choice; its output for a token is a sum over the chosen experts.
        keep: returns which experts run, as bool, given the experts chosen for each token [tokens, used] and their
            weights.
    """
    own, before = experts.forward, experts.__dict__.get("forward")

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        given = [*args, *kwargs.values()]
        ids, weights = _chosen(given)
        kept = keep(ids, weights)
        if kept.all():
            return own(*args, **kwargs)
        token, choice = kept.nonzero(as_tuple=True)

        def of_pair(each: Any) -> Any:
            """Return the entries of a chosen expert and its token, as if no other had been chosen."""
            if each is ids or each is weights:
                return each[token, choice].unsqueeze(1)
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
    """Return the experts that were chosen for each token, and their weights [tokens, used]."""
    pairs = [each for each in given if isinstance(each, Tensor) and each.ndim == 2]
    for ids in (each for each in pairs if each.dtype in (torch.int64, torch.int32)):
        for weights in pairs[::-1]:
            if weights.is_floating_point() and weights.shape == ids.shape:
                return ids, weights
    raise PlanError("experts can be skipped only if their module takes the choice for each token and its weights")
