"""Batched decoding in which finished rows leave their batch.

``generate`` keeps a finished row to the end of its batch and computes it at every step. Here its keys and values are
removed from the cache::

    step    1  2  3  4  5  6
    row a   x  x  .               rows of one batch have similar lengths (:func:`batches`), so that there is little
    row b   x  x  x  x  x  .      padding
    row c   x  x  x  .
    row d            x  x  x      and others may join

Keys and values are appended in place, whereas ``generate`` copies all of them at every step.

Each row has its own random generator, so its result depends neither on its neighbours nor on their order.

With a draft (prompt lookup, or a smaller model), a step verifies several proposed tokens of each row in one pass. Rows
keep different numbers of them: the others stay in the cache, masked. Every token is still chosen from the model's
distribution with the next random number of its row, so the texts are those of decoding without it, unless rounding
decides.
"""

from __future__ import annotations

import inspect
import random
import sys
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from lamella.errors import NumericsError
from lamella.needs import Recorder, current_recorder, now
from lamella.needs.generation import grow
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


class Proposals(ABC):
    """Proposes tokens for the rows of some batches, as long as this is faster.

    It ends where a pass with proposals takes longer than the passes without them that it replaces.

    Attributes:
        is_on: whether it proposes tokens.
    """

    def __init__(self) -> None:
        self.is_on = True
        self._plain = Passes()
        self._wide = Passes()

    def propose(self, rows: Sequence[Running]) -> list[list[int]]:
        """Return proposed tokens of each row, fewer than it may still have.

        Args:
            rows: the rows.
        """
        if not self.is_on or self._plain.passes < PROBE:  # what a pass costs without proposals is measured first
            return [[] for _ in rows]
        return [self._after(row, row.left - 1) if row.left > 1 else [] for row in rows]

    @abstractmethod
    def _after(self, row: Running, most: int) -> list[int]:
        """Return proposed tokens of a row, at most this many."""

    def note(self, proposed: int, tokens: int, seconds: float) -> None:
        """Note a step after the prompt.

        Args:
            proposed: number of tokens that were proposed.
            tokens: number of tokens that it gave.
            seconds: its duration, with that of proposing.
        """
        found = Passes(1, tokens, proposed, seconds=seconds)
        if not proposed:
            self._plain += found
            return
        self._wide += found
        plain = self._plain.seconds / max(self._plain.tokens, 1)  # of a token
        if self._wide.tokens >= ENOUGH and self._wide.tokens * plain < self._wide.seconds:
            self.is_on = False


class Lookup(Proposals):
    """Prompt lookup: it proposes what followed the most recent tokens of a row before."""

    def __init__(self) -> None:
        super().__init__()
        self._find = PromptLookupCandidateGenerator(num_output_tokens=TOKENS, max_length=sys.maxsize)

    def _after(self, row: Running, most: int) -> list[int]:
        text = [*row.prompt.ids, *row.ids]
        (found, _) = self._find.get_candidates(torch.LongTensor([text]))
        return list(found[0, len(text) :].tolist()[:most])


class ModelProposals(Proposals):
    """A smaller model proposes its most likely next tokens, for each row by itself.

    Args:
        model: the model, whose generation config may say how many tokens it proposes; it :func:`takes_proposals`.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._model = model
        self._tokens = model.generation_config.num_assistant_tokens or TOKENS
        self._longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
        self._read: WeakKeyDictionary[Running, tuple[list[int], Any]] = WeakKeyDictionary()

    @torch.no_grad()
    def _after(self, row: Running, most: int) -> list[int]:
        text = [*row.prompt.ids, *row.ids]
        most = min(most, self._tokens, self._longest - len(text))
        if most < 1:
            return []
        known, cache = self._read.get(row, ([], None))
        same = next((n for n, (one, two) in enumerate(zip(known, text, strict=False)) if one != two), len(known))
        same = min(same, len(text) - 1)
        if cache is not None and same < len(known):
            cache.crop(same - len(known))
        found: list[int] = []
        new = text[same:]
        while len(found) < most:
            ids = torch.tensor([new], device=self._model.device)
            logits, cache = _step(self._model, ids, ids.new_ones(1, same + len(new)), cache, 1)
            same += len(new)
            new = [int(logits[0, -1].argmax())]
            found += new
        self._read[row] = ([*text, *found[:-1]], cache)
        return found


def takes_proposals(model: Any) -> bool:
    """Return whether proposed tokens can be masked: all layers attend to all earlier tokens, and no plan decides.

    Args:
        model: a decoder, or a view of one.
    """
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = ["full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"]
    return set(kinds) == {"full_attention"} and not hasattr(model, "lamella_policy")


@torch.no_grad()
def decode(
    model: Any, prompts: Sequence[Prompt], sampling: Sampling, ends: set[int], draft: Proposals | None = None
) -> list[Row]:
    """Continue one batch of prompts; finished rows leave it.

    Args:
        model: a decoder, or a view of one with any plan.
        prompts: prompts of any lengths.
        sampling: how tokens are sampled.
        ends: tokens that end a row.
        draft: proposes tokens, for a model that :func:`takes_proposals`.

    Returns:
        The new tokens of each prompt, in their order.

    Raises:
        NumericsError: if logits are not finite.
    """
    rows = [Running(prompt, sampling, ends) for prompt in prompts]
    batch = Batch(model, draft)
    batch.join(rows)
    recorder = current_recorder()
    while batch.rows:
        batch.step() if recorder is None else batch.rest(recorder)
    return [Row(row.ids, row.finished) for row in rows]


@dataclass(eq=False)
class Running:
    """A row that is being generated.

    Attributes:
        prompt: the prompt.
        sampling: how its tokens are sampled.
        ends: tokens that end it.
        ids: the new tokens so far, without the end token.
        finished: whether it ended with an end token.
    """

    prompt: Prompt
    sampling: Sampling
    ends: Collection[int]
    ids: list[int] = field(default_factory=list)
    finished: bool = False

    def __post_init__(self) -> None:
        self.drawn = random.Random(self.prompt.seed)

    @property
    def left(self) -> int:
        """The number of tokens that may follow."""
        return 0 if self.finished else self.prompt.max_tokens - len(self.ids)


class Batch:
    """Rows that are decoded together: they leave when they are over, and others may join between two steps.

    Args:
        model: a decoder, or a view of one with any plan.
        draft: proposes tokens; see :func:`decode`.

    Attributes:
        rows: the rows that are not over.
    """

    def __init__(self, model: Any, draft: Proposals | None = None) -> None:
        self.rows: list[Running] = []
        self._model, self._draft = model, draft
        self._cache: Any = None
        self._mask = torch.empty(0)  # of the columns of the cache [rows, columns]

    @property
    def takes_more(self) -> bool:
        """Whether rows may join now: not while a plan decides at run time, or if a cache slot drops columns."""
        if not self.rows:
            return True
        kinds = {type(layer) for layer in self._cache.layers}
        return type(self._cache) is DynamicCache and kinds <= {DynamicLayer, PreallocatedSlot}

    @torch.no_grad()
    def join(self, rows: Sequence[Running]) -> None:
        """Encode the prompts of some rows, generate their first tokens, and add them to the batch.

        Args:
            rows: the rows.

        Raises:
            NumericsError: if logits are not finite.
        """
        ids, mask = _padded([row.prompt.ids for row in rows], self._model.device)
        logits, cache = _step(self._model, ids, mask, None, 1)
        preallocate(cache)
        running, self.rows = self.rows, list(rows)
        known, self._cache, self._mask = (self._cache, self._mask), cache, mask
        self._take(logits, [[] for _ in rows])
        if running and self.rows:
            self._cache, self._mask = _joined(*known, self._cache, self._mask)
        elif running:
            self._cache, self._mask = known
        self.rows = running + self.rows

    @torch.no_grad()
    def step(self) -> None:
        """Generate the next token of every row, or more where proposed tokens are right.

        Raises:
            NumericsError: if logits are not finite.
        """
        begin, before = now(), sum(len(row.ids) for row in self.rows)
        proposed: list[list[int]] = [[] for _ in self.rows]
        draft = self._draft if self._draft is not None and self._draft.is_on else None
        if draft is not None:
            proposed = draft.propose(self.rows)
        columns = 1 + max(map(len, proposed))
        new = [[row.ids[-1], *each] for row, each in zip(self.rows, proposed, strict=True)]
        ids = torch.tensor([each + [0] * (columns - len(each)) for each in new], device=self._mask.device)
        real = torch.tensor([[1] * len(each) + [0] * (columns - len(each)) for each in new], device=self._mask.device)
        self._mask = torch.cat([self._mask, real], dim=1)
        logits, self._cache = _step(self._model, ids, self._mask, self._cache, columns)
        rows = self.rows
        self._take(logits, proposed)
        if draft is not None:
            given = sum(len(row.ids) for row in rows) - before
            draft.note(sum(map(len, proposed)), given, now() - begin)

    def rest(self, recorder: Recorder) -> None:
        """Record what the rows need until their last token; see :mod:`lamella.needs`."""
        left = max(row.left for row in self.rows)
        grown = grow(self._cache, left - 1)
        with recorder.times(left):
            self.step()
        del grown
        for row in self.rows:
            row.ids += [1] * row.left
        self._keep([])

    def drop(self, rows: Collection[Running]) -> None:
        """Remove rows before they are over.

        Args:
            rows: the rows.
        """
        self._keep([number for number, row in enumerate(self.rows) if row not in rows])

    def _take(self, logits: Tensor, proposed: Sequence[Sequence[int]]) -> None:
        """Choose tokens from logits of the last columns [rows, columns, vocabulary] as long as proposals are right."""
        columns = logits.shape[1]
        going = list(range(len(self.rows)))  # those whose proposals were right so far
        for column in range(columns):
            if not going:
                break
            tokens = _choose(logits[going, column], [self.rows[n] for n in going])
            right = []
            for n, token in zip(going, tokens, strict=True):
                row = self.rows[n]
                row.finished = token in row.ends
                if not row.finished:
                    row.ids.append(token)
                    right += [n] if proposed[n][column : column + 1] == [token] else []
            for n in set(going) - set(right):
                self._mask[n, self._mask.shape[1] - columns + column + 1 :] = 0
            going = right
        self._keep([number for number, row in enumerate(self.rows) if row.left])

    def _keep(self, numbers: list[int]) -> None:
        if len(numbers) == len(self.rows):
            return
        self.rows = [self.rows[number] for number in numbers]
        if not self.rows:
            self._cache = None
        else:
            kept = torch.tensor(numbers, device=self._mask.device)
            self._cache.reorder_cache(kept)
            self._mask = self._mask[kept]


def _joined(cache: Any, mask: Tensor, other: Any, other_mask: Tensor) -> tuple[Any, Tensor]:
    """Return a cache with the rows of two, and its mask [rows, columns]; columns that no row uses are dropped."""
    unused = int(mask.any(dim=0).int().argmax())
    mask = mask[:, unused:]
    columns = max(mask.shape[1], other_mask.shape[1])

    def together(one: Tensor, two: Tensor) -> Tensor:
        return torch.cat([pad(each, (0, 0, columns - each.shape[-2], 0)) for each in (one[..., unused:, :], two)])

    for index, (one, two) in enumerate(zip(cache.layers, other.layers, strict=True)):
        cache.layers[index] = PreallocatedSlot(together(one.keys, two.keys), together(one.values, two.values))
    return cache, torch.cat([pad(each, (columns - each.shape[1], 0)) for each in (mask, other_mask)])


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


def _choose(logits: Tensor, rows: Sequence[Running]) -> list[int]:
    """Choose a token for each row from its logits [rows, vocabulary]."""
    chosen: list[int] = logits.argmax(dim=-1).tolist()
    sampled = [number for number, row in enumerate(rows) if row.sampling.temperature > 0]
    if not sampled:
        return chosen
    temperatures = torch.tensor([[rows[number].sampling.temperature] for number in sampled], device=logits.device)
    scaled = logits[sampled] / temperatures
    whole = scaled.logsumexp(dim=-1, keepdim=True)
    values, indices = scaled.topk(min(LIKELIEST, scaled.shape[1]), dim=-1)
    shares = (values - whole).exp()
    for number, each in enumerate(sampled):
        top_p = rows[each].sampling.top_p
        nucleus, where = shares[number], indices[number]
        if float(nucleus.sum()) < top_p:  # a row with a very flat distribution
            nucleus, where = (scaled[number] - whole[number]).exp().sort(descending=True)
        reached = nucleus.cumsum(dim=0).double()
        last = min(int((reached < top_p).sum()), len(reached) - 1)  # the token that reaches top_p is included
        at = rows[each].drawn.random() * float(reached[last])
        chosen[each] = int(where[min(int((reached <= at).sum()), last)])
    return chosen
