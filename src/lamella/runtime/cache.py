"""The key-value cache of plans that treat prompt and generated tokens differently."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import LongTensor, Tensor
from transformers.cache_utils import DynamicCache

from lamella.errors import CacheError
from lamella.plan import Plan
from lamella.stack import Placeholder


@dataclass(frozen=True)
class Phase:
    """Which tokens of one call are generated, not prompt.

    Attributes:
        response: [batch, time] bool, or None where the whole call is of one phase.
        any_prompt, any_response: whether the call holds tokens of that phase.
        prompt_done: whether no prompt token can come after this call.
    """

    response: Tensor | None
    any_prompt: bool
    any_response: bool
    prompt_done: bool

    @classmethod
    def of(cls, response: Tensor, prompt_done: bool = True) -> Phase:
        """The phase of a call from its mask [batch, time], True where a token is generated."""
        some, every = bool(response.any()), bool(response.all())
        return cls(None if every or not some else response, not every, some, prompt_done)


class PlanCache(DynamicCache):
    """Keys and values under one plan, with what the plan must remember about each row.

    A slot whose layer only prompts run through is freed as soon as the prompt is done. From then on such a slot has
    holes, so the cache can neither go back into the prompt nor take a new prompt: a second turn starts over.

    Args:
        config: the view's config.
        plan: the plan that the cache belongs to; other plans refuse it.
        prompt_lengths: columns of the prompt, padding included: one number, or one per row [batch]. When left out,
            the first call is the prompt.
    """

    def __init__(self, config: Any, plan: Plan, prompt_lengths: int | Tensor | None = None) -> None:
        super().__init__(config=config)
        self._config = config
        self.lamella_stamp = plan.digest
        self.prompt_lengths = prompt_lengths

    def phase(self, tokens: int) -> Phase:
        """The phase of the next ``tokens`` columns."""
        seen = self.get_seq_length()
        if self.prompt_lengths is None:
            self.prompt_lengths = seen + tokens
        end = seen + tokens
        if isinstance(self.prompt_lengths, int):
            if end <= self.prompt_lengths:
                return Phase(None, True, False, prompt_done=end == self.prompt_lengths)
            if seen >= self.prompt_lengths:
                return Phase(None, False, True, prompt_done=True)
        lengths = torch.as_tensor(self.prompt_lengths).reshape(-1, 1)
        columns = torch.arange(seen, end, device=lengths.device)
        return Phase.of(columns >= lengths, prompt_done=end >= int(lengths.max()))

    @property
    def longest_prompt(self) -> int:
        return 0 if self.prompt_lengths is None else int(torch.as_tensor(self.prompt_lengths).max())

    @property
    def has_holes(self) -> bool:
        return any(isinstance(layer, Placeholder) for layer in self.layers)

    def free(self, slot: int) -> None:
        """Let go of a slot's keys and values; it only counts from now on."""
        layer: Any = self.layers[slot]
        if not isinstance(layer, Placeholder):
            window = getattr(layer, "sliding_window", None)
            self.layers[slot] = Placeholder(window, layer.get_seq_length())

    def new_turn(self) -> None:
        """Say that the next call is a new prompt.

        Raises:
            CacheError: when tokens were generated at reduced depth, since the full-depth layers lack their keys.
        """
        if self.has_holes:
            raise CacheError(
                "this cache has holes where layers were skipped, so it cannot take a new prompt: "
                "encode the whole conversation again with an empty cache (generate does this by itself)"
            )
        self.prompt_lengths = None

    def crop(self, tokens_to_remove: int) -> None:
        left = self.get_seq_length() - abs(tokens_to_remove)
        if self.has_holes and left < self.longest_prompt:
            raise CacheError(
                "this cache freed the prompt's keys of skipped layers, so it cannot be cropped into the prompt"
            )
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        self.layers = DynamicCache(config=self._config).layers
        self.prompt_lengths = None

    def _map_rows(self, rows: Tensor) -> None:
        if isinstance(self.prompt_lengths, Tensor):
            self.prompt_lengths = self.prompt_lengths[rows.to(self.prompt_lengths.device)]

    def reorder_cache(self, beam_idx: LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._map_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._map_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if isinstance(self.prompt_lengths, Tensor):
            self.prompt_lengths = self.prompt_lengths.repeat_interleave(repeats)
