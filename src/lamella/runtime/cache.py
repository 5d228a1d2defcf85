"""The key-value cache of views whose tokens do not all run the same layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import LongTensor, Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from lamella.errors import CacheError
from lamella.plan import Plan
from lamella.stack import Placeholder

RESTART = (
    "encode the whole conversation again with an empty cache, as generate does, and generate without "
    "assistant_model and prompt_lookup_num_tokens"
)


@dataclass(frozen=True)
class Phase:
    """Which tokens of one call are generated rather than prompt, decided by column and never by the shape of the call.

    Attributes:
        start: first column of the call, including padding.
        end: column after the last one of the call.
        lengths: number of columns of the prompt: one number, or one per row [batch, 1].
        shortest: minimum of the lengths.
        longest: maximum of the lengths.
    """

    start: int
    end: int
    lengths: int | Tensor
    shortest: int
    longest: int

    @classmethod
    def of(cls, start: int, tokens: int, lengths: int | Tensor) -> Phase:
        """Return the phase of a call, given the lengths of the prompts.

        Args:
            start: first column of the call, including padding.
            tokens: number of columns of the call.
            lengths: number of columns of the prompt: one number for all rows, or one per row [batch].
        """
        if isinstance(lengths, int):
            return cls(start, start + tokens, lengths, lengths, lengths)
        return cls(start, start + tokens, lengths.reshape(-1, 1), int(lengths.min()), int(lengths.max()))

    @property
    def any_prompt(self) -> bool:
        """Whether the call contains prompt tokens."""
        return self.start < self.longest

    @property
    def any_response(self) -> bool:
        """Whether the call contains generated tokens."""
        return self.end > self.shortest

    @property
    def prompt_done(self) -> bool:
        """Whether no prompt token can follow this call."""
        return self.end >= self.longest

    def order(self, device: torch.device) -> Tensor:
        """Return the index of each column in its row's answer, from 1 on, or 0 in the prompt [batch or 1, time]."""
        columns = torch.arange(self.start, self.end, device=device)[None]
        lengths = self.lengths if isinstance(self.lengths, int) else self.lengths.to(device)
        return (columns - lengths + 1).clamp(min=0)

    def response(self, device: torch.device) -> Tensor:
        """Return which tokens are generated [batch or 1, time] bool."""
        return self.order(device) > 0


class SparseSlot(DynamicLayer):
    """A slot that stores the keys and values of different columns in each row, at their own positions.

    Rows with fewer columns than others have empty entries in front::

        columns   -1  4  5      keys and values have the same layout; what an
                   3  4  5      empty entry contains is never read

    Args:
        rows: number of rows.
        device: device of the slot.

    Attributes:
        columns: column of each entry, in ascending order, -1 for an empty one [rows, stored].
        ragged: whether there may be empty entries.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        super().__init__()
        self.columns = torch.empty(rows, 0, dtype=torch.long, device=device)
        self.ragged = False

    def columns_with(self, start: int, tokens: int) -> Tensor:
        """Return the columns of the stored entries, followed by those of new tokens [rows, stored + tokens].

        Args:
            start: column of the first new token.
            tokens: number of new tokens.
        """
        new = torch.arange(start, start + tokens, device=self.columns.device)
        return torch.cat([self.columns, new.expand(len(self.columns), -1)], dim=1)

    def keep(self, which: Tensor) -> None:
        """Keep only these of the last entries [rows, last] bool, and all entries before them."""
        assert self.keys is not None and self.values is not None
        last = self.columns.shape[1] - which.shape[1]
        self.columns[:, last:].masked_fill_(~which, -1)
        held = self.columns >= 0
        count = held.sum(dim=1)
        longest = int(count.max())
        self.ragged = int(count.min()) < longest
        order = held.long().argsort(dim=1, stable=True)[:, held.shape[1] - longest :]  # empty entries come first
        self.columns = self.columns.gather(1, order)
        self.keys, self.values = (
            each.gather(2, order[:, None, :, None].expand(-1, each.shape[1], -1, each.shape[3]))
            for each in (self.keys, self.values)
        )

    def batch_select_indices(self, indices: Tensor) -> None:
        """Select rows of the slot."""
        self.columns = self.columns[indices.to(self.columns.device)]
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[indices], self.values[indices]


class PlanCache(DynamicCache):
    """Keys and values under one plan, with the state that the plan needs for each row.

    A slot may hold less than the model has seen: nothing (``free``), some rows (``keep_rows``), or some columns of each
    row (``make_sparse``). A cache with such holes can neither be cropped into the prompt nor take a new one: a second
    turn starts from an empty cache.

    Args:
        config: config of the view.
        plan: the plan that the cache belongs to; other plans refuse it.
        prompt_lengths: number of columns of the prompt, including padding: one number, or one per row [batch]. If None,
            the first call is the prompt.

    Attributes:
        seen: number of columns that have passed, whatever each slot stores of them.
        state: tensors [batch, ...] that a policy keeps between calls; they follow their rows.
        rows: for slots that hold some rows only, the indices of these rows [kept].
        clocked: whether the plan counts steps, which cannot be undone.
    """

    def __init__(self, config: Any, plan: Plan, prompt_lengths: int | Tensor | None = None) -> None:
        if plan.is_static:
            raise CacheError("this plan treats all tokens alike and runs with a plain DynamicCache: omit this cache")
        super().__init__(config=config)
        self._config = config
        self._windows = [getattr(layer, "sliding_window", None) for layer in self.layers]
        self.lamella_stamp = plan.digest
        self.prompt_lengths = prompt_lengths
        self._forget()

    def _forget(self) -> None:
        self.seen = 0
        self.batch = 0
        self.state: dict[str, Tensor] = {}
        self.rows: dict[int, Tensor] = {}
        self.clocked = False

    def phase(self, tokens: int) -> Phase:
        """Return the phase of the next ``tokens`` columns."""
        if self.prompt_lengths is None:
            self.prompt_lengths = self.seen + tokens
        return Phase.of(self.seen, tokens, self.prompt_lengths)

    @property
    def longest_prompt(self) -> int:
        """The length of the longest prompt."""
        return 0 if self.prompt_lengths is None else int(torch.as_tensor(self.prompt_lengths).max())

    @property
    def has_holes(self) -> bool:
        """Whether some slot holds less than the model has seen."""
        is_freed = any(isinstance(layer, Placeholder) for layer in self.layers)
        stored = [layer.columns for layer in self.layers if isinstance(layer, SparseSlot)]
        return is_freed or bool(self.rows) or any(bool(((c >= 0).sum(dim=1) < self.seen).any()) for c in stored)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of columns that have passed."""
        return self.seen

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return the number of key columns and their offset for a mask of ``query_length`` tokens."""
        return Placeholder(self.window(layer_idx), self.seen).get_mask_sizes(query_length)

    def window(self, slot: int) -> int | None:
        """Return the sliding window of a slot in tokens; None for full attention."""
        return self._windows[slot] if slot < len(self._windows) else None

    def _layer(self, slot: int) -> Any:
        while len(self.layers) <= slot:
            self.layers.append(DynamicLayer())
        return self.layers[slot]

    def free(self, slot: int) -> None:
        """Free a slot permanently, because no token reads or writes it any more."""
        if not isinstance(self._layer(slot), Placeholder):
            self.layers[slot] = Placeholder(self.window(slot))
        self.rows.pop(slot, None)

    def keep_rows(self, slot: int, kept: Tensor) -> None:
        """Keep a slot's keys and values of some rows only; from now on, only these rows run its layer.

        Args:
            slot: index of the slot.
            kept: which rows of the batch to keep [batch] bool.
        """
        if kept.all():
            return
        rows = kept.nonzero().flatten()
        if len(rows) == 0:
            self.free(slot)
            return
        self._layer(slot).batch_select_indices(rows)
        self.rows[slot] = rows

    def rows_of(self, slot: int) -> Tensor | None:
        """Return the rows that a slot holds [kept]; None if it holds all."""
        if isinstance(self._layer(slot), Placeholder):
            return torch.empty(0, dtype=torch.long)
        return self.rows.get(slot)

    def make_sparse(self, slot: int, device: torch.device) -> None:
        """Make an empty slot store different columns for each row; its attention gets a mask computed from them.

        Args:
            slot: index of the slot.
            device: device of the columns' indices.
        """
        self._layer(slot)
        self.layers[slot] = sparse = SparseSlot(
            self.batch, device
        )  # a sliding slot would evict by count, not by column
        sparse.is_sliding = self.window(slot) is not None  # models use this to find the layer for a mask's size

    def sparse(self, slot: int) -> SparseSlot | None:
        """Return the slot if it holds some columns only, else None."""
        layer = self._layer(slot)
        return layer if isinstance(layer, SparseSlot) else None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store keys and values of the next columns."""
        sparse = self.sparse(layer_idx)  # also creates the slot if the config counts an encoder's layers
        if sparse is not None:
            sparse.columns = sparse.columns_with(self.seen, key_states.shape[-2])
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def new_turn(self) -> None:
        """Declare that the next call is a new prompt.

        Raises:
            CacheError: if tokens were generated at reduced depth, since the skipped layers lack their keys.
        """
        if self.has_holes:
            raise CacheError(
                f"this cache has holes where layers were skipped, so it cannot take a new prompt: {RESTART}"
            )
        self.prompt_lengths = None

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last columns.

        Raises:
            CacheError: if the plan counts steps, or keys of the prompt were freed that would be needed.
        """
        left = self.seen - abs(tokens_to_remove)
        if self.clocked and left < self.seen:
            raise CacheError(f"this plan counts its steps, so its cache cannot be cropped: {RESTART}")
        if self.has_holes and left < self.longest_prompt:
            raise CacheError(
                "this cache freed the prompt's keys of skipped layers, so it cannot be cropped into the prompt: "
                f"{RESTART}"
            )
        layers: list[Any] = self.layers
        for layer in layers:
            if not isinstance(layer, SparseSlot):
                layer.crop(tokens_to_remove)
            elif layer.is_initialized:
                layer.keep(layer.columns < left)
        self.seen = left

    def reset(self) -> None:
        """Empty the cache."""
        self.layers = DynamicCache(config=self._config).layers
        self.prompt_lengths = None
        self._forget()

    def reorder_cache(self, beam_idx: LongTensor) -> None:
        """Reorder the rows for beam search."""
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Select rows."""
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self._select(torch.arange(self.batch).repeat_interleave(repeats))

    def _select(self, rows: Tensor) -> None:
        """Make these rows the batch; a row may be selected several times."""
        layers: list[Any] = self.layers
        for slot, layer in enumerate(layers):
            if slot not in self.rows:
                layer.batch_select_indices(rows)
        for slot, kept in tuple(self.rows.items()):
            index = torch.full((self.batch,), -1, device=kept.device)
            index[kept] = torch.arange(len(kept), device=kept.device)
            taken = index[rows.to(kept.device)]
            self.rows[slot] = (taken >= 0).nonzero().flatten()
            if len(self.rows[slot]) == 0:
                self.free(slot)
            else:
                layers[slot].batch_select_indices(taken[self.rows[slot]])
        self.state = {name: value[rows.to(value.device)] for name, value in self.state.items()}
        if isinstance(self.prompt_lengths, Tensor):
            self.prompt_lengths = self.prompt_lengths[rows.to(self.prompt_lengths.device)]
        self.batch = len(rows)
