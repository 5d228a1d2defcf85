"""Batched decoding in which finished rows leave their batch.

``generate`` keeps a finished row to the end of its batch and computes it at every step. Here its keys and values are
removed from the cache::

    step    1  2  3  4  5  6
    row a   x  x  .               rows of one batch have similar lengths (:func:`batches`), so that there is little
    row b   x  x  x  x  x  .      padding
    row c   x  x  x  .

Keys and values are appended in place, whereas ``generate`` copies all of them at every step.

Each row has its own random generator, so its result depends neither on its neighbours nor on their order.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from lamella.errors import NumericsError

LEAST = 32  # minimum spare capacity of a slot in tokens, in addition to a quarter of its length
LIKELIEST = 256  # tokens that are sorted first; the nucleus is nearly always within them


@dataclass(frozen=True)
class Sampling:
    """How tokens are sampled.

    Attributes:
        temperature: 0 takes the most likely token.
        top_p: nucleus sampling: sample from the most likely tokens whose probabilities add up to this.
    """

    temperature: Annotated[float, Ge(0)] = 0.7
    top_p: Annotated[float, Gt(0), Le(1)] = 0.9


class Prompt(NamedTuple):
    """A row to continue.

    Attributes:
        ids: the token ids of the prompt.
        max_tokens: the maximum number of new tokens.
        seed: random seed of the row.
    """

    ids: Sequence[int]
    max_tokens: int
    seed: int


class Row(NamedTuple):
    """A generated row.

    Attributes:
        ids: the new tokens, without the end token.
        finished: whether the row ended with an end token, not by the limit.
    """

    ids: list[int]
    finished: bool


def batches(prompts: Sequence[Prompt], size: int) -> list[list[int]]:
    """Group the indices of prompts into batches of similar length, the longest first.

    Args:
        prompts: the prompts.
        size: prompts in a batch.
    """
    order = sorted(range(len(prompts)), key=lambda n: (-len(prompts[n].ids), -prompts[n].max_tokens, n))
    return [order[start : start + size] for start in range(0, len(order), size)]


@torch.no_grad()
def decode(model: Any, prompts: Sequence[Prompt], sampling: Sampling, ends: set[int]) -> list[Row]:
    """Continue one batch of prompts; finished rows leave it.

    Args:
        model: a decoder, or a view of one with any plan.
        prompts: prompts of any lengths.
        sampling: how tokens are sampled.
        ends: tokens that end a row.

    Returns:
        The new tokens of each prompt, in their order.

    Raises:
        NumericsError: if logits are not finite.
    """
    generated: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    drawn = [random.Random(prompt.seed) for prompt in prompts]
    left = list(range(len(prompts)))  # the indices of the rows in the batch
    ids, mask = _padded([prompt.ids for prompt in prompts], model.device)
    cache = None
    while True:
        logits, cache = _step(model, ids, mask, cache)
        preallocate(cache)
        tokens = _choose(logits, [drawn[row] for row in left], sampling)
        for row, token in zip(left, tokens, strict=True):
            ended[row] = token in ends
            if not ended[row]:
                generated[row].append(token)
        stay = [n for n, row in enumerate(left) if not ended[row] and len(generated[row]) < prompts[row].max_tokens]
        if not stay:
            return [Row(each, done) for each, done in zip(generated, ended, strict=True)]
        if len(stay) < len(left):
            kept = torch.tensor(stay, device=mask.device)
            cache.reorder_cache(kept)
            mask, left, tokens = mask[kept], [left[n] for n in stay], [tokens[n] for n in stay]
        ids = torch.tensor(tokens, device=mask.device)[:, None]
        mask = torch.cat([mask, mask.new_ones(len(left), 1)], dim=1)


class PreallocatedSlot(DynamicLayer):
    """A cache slot with spare capacity after its keys and values, so that a step appends without copying."""

    keys: Tensor
    values: Tensor

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values
        self._buffers = [keys, values]  # keys and values are views of their beginning, unless rows have left since

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values [rows, heads, time, head size], and return all of the slot."""
        held, new = (self.keys, self.values), (key_states, value_states)
        stored = self.keys.shape[-2]
        end = stored + key_states.shape[-2]
        if self.keys.data_ptr() != self._buffers[0].data_ptr() or end > self._buffers[0].shape[-2]:
            self._buffers = [each.new_empty(*each.shape[:-2], end + end // 4 + LEAST, each.shape[-1]) for each in held]
            for buffer, each in zip(self._buffers, held, strict=True):
                buffer[..., :stored, :] = each
        for buffer, each in zip(self._buffers, new, strict=True):
            buffer[..., stored:end, :] = each
        self.keys, self.values = (buffer[..., :end, :] for buffer in self._buffers)
        return self.keys, self.values


def preallocate(cache: Any) -> None:
    """Make the dynamic slots of a cache grow in place; sliding-window slots and empty slots stay as they are."""
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.keys is not None and layer.values is not None:
            cache.layers[index] = PreallocatedSlot(layer.keys, layer.values)


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the rows left-padded [batch, time], and their attention mask."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def _step(model: Any, ids: Tensor, mask: Tensor, cache: Any) -> tuple[Tensor, Any]:
    """Run the model on new columns; return the logits after the last column [batch, vocabulary], and the cache."""
    options: dict[str, Any] = {"attention_mask": mask, "use_cache": True}
    if "position_ids" in inspect.signature(type(model).forward).parameters:
        options["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    if model._supports_logits_to_keep():
        options["logits_to_keep"] = 1
    out = model(input_ids=ids, cache=cache, **options)
    logits = out.logits[:, -1].float()
    if not torch.isfinite(logits).all():
        raise NumericsError("the writer's logits are not finite: open it in float32, and check its weights")
    return logits, out.cache


def _choose(logits: Tensor, drawn: Sequence[random.Random], sampling: Sampling) -> list[int]:
    """Choose a token for each row."""
    if sampling.temperature == 0:
        chosen: list[int] = logits.argmax(dim=-1).tolist()
        return chosen
    scaled = logits / sampling.temperature
    whole = scaled.logsumexp(dim=-1, keepdim=True)
    values, indices = scaled.topk(min(LIKELIEST, scaled.shape[1]), dim=-1)
    shares = (values - whole).exp()
    tokens = []
    for number, each in enumerate(drawn):
        nucleus, where = shares[number], indices[number]
        if float(nucleus.sum()) < sampling.top_p:  # a row with a very flat distribution
            nucleus, where = (scaled[number] - whole[number]).exp().sort(descending=True)
        reached = nucleus.cumsum(dim=0).double()
        last = min(int((reached < sampling.top_p).sum()), len(reached) - 1)  # the token that reaches top_p is included
        at = each.random() * float(reached[last])
        tokens.append(int(where[min(int((reached <= at).sum()), last)]))
    return tokens
