"""Batched decoding in which finished rows leave their batch.

``generate`` keeps a finished row to the end of its batch and computes it at every step. Here its keys and values are
removed from the cache::

    step    1  2  3  4  5  6
    row a   x  x  .               rows of one batch have similar lengths (:func:`batches`), so that there is little
    row b   x  x  x  x  x  .      padding
    row c   x  x  x  .

Keys and values are appended in place, whereas ``generate`` copies all of them at every step.

Each row has its own random generator, so its result depends neither on its neighbours nor on their order.

With prompt lookup, a step verifies several proposed tokens of each row in one pass. Rows keep different numbers of
them: the others stay in the cache, masked. Every token is still chosen from the model's distribution with the next
random number of its row, so the texts are those of decoding without it, unless rounding decides.
"""

from __future__ import annotations

import inspect
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor
from transformers.cache_utils import DynamicLayer
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from lamella.errors import NumericsError
from lamella.runtime.drafting import ENOUGH, PROBE, TOKENS, Passes

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


class Lookup:
    """Prompt lookup for some batches: it proposes what followed the most recent tokens of a row before.

    It ends where a pass with proposals takes longer than the passes without them that it replaces.

    Attributes:
        is_on: whether it proposes tokens.
    """

    def __init__(self) -> None:
        self.is_on = True
        self._plain = Passes()
        self._wide = Passes()
        self._find = PromptLookupCandidateGenerator(num_output_tokens=TOKENS, max_length=sys.maxsize)

    def propose(self, rows: Sequence[Sequence[int]], most: Sequence[int]) -> list[list[int]]:
        """Return proposed tokens of each row.

        Args:
            rows: token ids of the rows so far.
            most: maximum number of tokens of each row.
        """
        if not self.is_on or self._plain.passes < PROBE:  # what a pass costs without proposals is measured first
            return [[] for _ in rows]
        found = [self._find.get_candidates(torch.tensor([row]))[0][0, len(row) :].tolist() for row in rows]
        return [each[:longest] for each, longest in zip(found, most, strict=True)]

    def note(self, proposed: int, tokens: int, seconds: float) -> None:
        """Note a pass after the prompt.

        Args:
            proposed: number of tokens that were proposed.
            tokens: number of tokens that it gave.
            seconds: its duration.
        """
        found = Passes(1, tokens, proposed, seconds=seconds)
        if not proposed:
            self._plain += found
            return
        self._wide += found
        plain = self._plain.seconds / max(self._plain.tokens, 1)  # of a token
        if self._wide.tokens >= ENOUGH and self._wide.tokens * plain < self._wide.seconds:
            self.is_on = False


@torch.no_grad()
def decode(
    model: Any, prompts: Sequence[Prompt], sampling: Sampling, ends: set[int], lookup: Lookup | None = None
) -> list[Row]:
    """Continue one batch of prompts; finished rows leave it.

    Args:
        model: a decoder, or a view of one with any plan.
        prompts: prompts of any lengths.
        sampling: how tokens are sampled.
        ends: tokens that end a row.
        lookup: proposes tokens; the model must attend to all earlier tokens, and decide nothing at run time.

    Returns:
        The new tokens of each prompt, in their order.

    Raises:
        NumericsError: if logits are not finite.
    """
    generated: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    drawn = [random.Random(prompt.seed) for prompt in prompts]
    left = list(range(len(prompts)))  # the indices of the rows in the batch
    proposed: list[list[int]] = [[] for _ in prompts]  # for each row in the batch
    ids, mask = _padded([prompt.ids for prompt in prompts], model.device)
    cache = None
    while True:
        begin, is_first, before = time.perf_counter(), cache is None, sum(map(len, generated))
        columns = 1 + max(map(len, proposed))
        logits, cache = _step(model, ids, mask, cache, columns)
        preallocate(cache)
        going = list(range(len(left)))  # those whose proposals were right so far
        for column in range(columns):
            tokens = _choose(logits[going, column], [drawn[left[n]] for n in going], sampling)
            right = []
            for n, token in zip(going, tokens, strict=True):
                ended[left[n]] = token in ends
                if not ended[left[n]]:
                    generated[left[n]].append(token)
                    right += [n] if proposed[n][column : column + 1] == [token] else []
            for n in set(going) - set(right):
                mask[n, mask.shape[1] - columns + column + 1 :] = 0
            going = right
        if lookup is not None and not is_first:
            tokens_given = sum(map(len, generated)) - before
            lookup.note(sum(map(len, proposed)), tokens_given, time.perf_counter() - begin)
        stay = [n for n, row in enumerate(left) if not ended[row] and len(generated[row]) < prompts[row].max_tokens]
        if not stay:
            return [Row(each, done) for each, done in zip(generated, ended, strict=True)]
        if len(stay) < len(left):
            kept = torch.tensor(stay, device=mask.device)
            cache.reorder_cache(kept)
            mask, left = mask[kept], [left[n] for n in stay]
        proposed = (
            [[] for _ in left]
            if lookup is None
            else lookup.propose(
                [[*prompts[row].ids, *generated[row]] for row in left],
                [prompts[row].max_tokens - len(generated[row]) - 1 for row in left],
            )
        )
        width = max(map(len, proposed))
        new = [[generated[row][-1], *each] for row, each in zip(left, proposed, strict=True)]
        ids = torch.tensor([each + [0] * (1 + width - len(each)) for each in new], device=mask.device)
        real = torch.tensor([[1] * len(each) + [0] * (1 + width - len(each)) for each in new], device=mask.device)
        mask = torch.cat([mask, real], dim=1)


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


def _step(model: Any, ids: Tensor, mask: Tensor, cache: Any, columns: int) -> tuple[Tensor, Any]:
    """Run the model on new columns; return the logits of the last ones [batch, columns, vocabulary], and the cache."""
    options: dict[str, Any] = {"attention_mask": mask, "use_cache": True}
    if "position_ids" in inspect.signature(type(model).forward).parameters:
        options["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    if model._supports_logits_to_keep():
        options["logits_to_keep"] = columns
    out = model(input_ids=ids, cache=cache, **options)
    logits = out.logits[:, -columns:].float()
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
