"""Many answers from one decoder: rows of one length together, and a row that is done leaves its batch.

``generate`` keeps a finished row to the end of its batch, and computes it at every step. Here its keys leave the
cache::

    step    1  2  3  4  5  6
    row a   x  x  .               rows that stand together are of nearly one length (:func:`batches`), so that little
    row b   x  x  x  x  x  .      is padding
    row c   x  x  x  .

Keys and values are appended to in place, where ``generate`` copies all of them at every step.

A row draws with numbers of its own, so that neither its neighbours nor their order decide what it says.
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

LEAST = 32  # tokens that there is room for, beyond a quarter of what is held
LIKELIEST = 256  # tokens that are sorted first: those that sampling draws from are nearly always among them


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_p: draw from the likeliest tokens that make up this share.
    """

    temperature: Annotated[float, Ge(0)] = 0.7
    top_p: Annotated[float, Gt(0), Le(1)] = 0.9


class Prompt(NamedTuple):
    """What a row is to continue.

    Attributes:
        ids: its tokens.
        most: new tokens, at most.
        seed: of what it draws.
    """

    ids: Sequence[int]
    most: int
    seed: int


class Row(NamedTuple):
    """What a row said.

    Attributes:
        ids: its new tokens, without the one that ended it.
        finished: whether it ended by itself, not by its limit.
    """

    ids: list[int]
    finished: bool


def batches(prompts: Sequence[Prompt], size: int) -> list[list[int]]:
    """Numbers of prompts, those of nearly one length together, the longest first."""
    order = sorted(range(len(prompts)), key=lambda n: (-len(prompts[n].ids), -prompts[n].most, n))
    return [order[start : start + size] for start in range(0, len(order), size)]


@torch.no_grad()
def decode(model: Any, prompts: Sequence[Prompt], sampling: Sampling, ends: set[int]) -> list[Row]:
    """Continue one batch of prompts, from which rows leave when they are done.

    Args:
        model: a decoder, or a view of one with any plan.
        prompts: of any lengths.
        sampling: how tokens are drawn.
        ends: tokens that end a row.

    Raises:
        NumericsError: for logits that are not finite.
    """
    said: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    drawn = [random.Random(prompt.seed) for prompt in prompts]
    left = list(range(len(prompts)))  # the numbers of the rows in the batch
    ids, mask = _padded([prompt.ids for prompt in prompts], model.device)
    cache = None
    while True:
        logits, cache = _step(model, ids, mask, cache)
        preallocate(cache)
        tokens = _choose(logits, [drawn[row] for row in left], sampling)
        for row, token in zip(left, tokens, strict=True):
            ended[row] = token in ends
            if not ended[row]:
                said[row].append(token)
        stay = [n for n, row in enumerate(left) if not ended[row] and len(said[row]) < prompts[row].most]
        if not stay:
            return [Row(each, done) for each, done in zip(said, ended, strict=True)]
        if len(stay) < len(left):
            kept = torch.tensor(stay, device=mask.device)
            cache.reorder_cache(kept)
            mask, left, tokens = mask[kept], [left[n] for n in stay], [tokens[n] for n in stay]
        ids = torch.tensor(tokens, device=mask.device)[:, None]
        mask = torch.cat([mask, mask.new_ones(len(left), 1)], dim=1)


class PreallocatedSlot(DynamicLayer):
    """A slot of the cache with room behind its keys and values, so that a step writes its own and copies nothing."""

    keys: Tensor
    values: Tensor

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values
        self._room = [keys, values]  # what keys and values are the front of, unless rows have left since

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        held, new = (self.keys, self.values), (key_states, value_states)
        stored = self.keys.shape[-2]
        end = stored + key_states.shape[-2]
        if self.keys.data_ptr() != self._room[0].data_ptr() or end > self._room[0].shape[-2]:
            self._room = [each.new_empty(*each.shape[:-2], end + end // 4 + LEAST, each.shape[-1]) for each in held]
            for room, each in zip(self._room, held, strict=True):
                room[..., :stored, :] = each
        for room, each in zip(self._room, new, strict=True):
            room[..., stored:end, :] = each
        self.keys, self.values = (room[..., :end, :] for room in self._room)
        return self.keys, self.values


def preallocate(cache: Any) -> None:
    """Let plain slots of a cache grow in place; those that forget, or hold no keys, stay as they are."""
    for place, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.keys is not None and layer.values is not None:
            cache.layers[place] = PreallocatedSlot(layer.keys, layer.values)


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows that all end in the last column [batch, time], and their mask."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def _step(model: Any, ids: Tensor, mask: Tensor, cache: Any) -> tuple[Tensor, Any]:
    """The logits behind the last column [batch, vocabulary], and the cache with these columns in it."""
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
    """A token for each row."""
    if sampling.temperature == 0:
        chosen: list[int] = logits.argmax(dim=-1).tolist()
        return chosen
    scaled = logits / sampling.temperature
    whole = scaled.logsumexp(dim=-1, keepdim=True)
    values, places = scaled.topk(min(LIKELIEST, scaled.shape[1]), dim=-1)
    shares = (values - whole).exp()
    tokens = []
    for number, each in enumerate(drawn):
        likely, where = shares[number], places[number]
        if float(likely.sum()) < sampling.top_p:  # a row that is undecided among very many
            likely, where = (scaled[number] - whole[number]).exp().sort(descending=True)
        reached = likely.cumsum(dim=0).double()
        last = min(int((reached < sampling.top_p).sum()), len(reached) - 1)  # the one that reaches top_p is in
        at = each.random() * float(reached[last])
        tokens.append(int(where[min(int((reached <= at).sum()), last)]))
    return tokens
