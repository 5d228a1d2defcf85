"""The loop of masked diffusion: an answer starts as masks, and every step commits the most certain tokens.

    prompt | M M M M | M M M M      the blocks of the answer are denoised from left to right, with equally many steps
    prompt | M b M d | M M M M      a step predicts every mask of its block and commits some
    prompt | a b c d | M M M M      then the next block

The cache determines what a pass computes again, and what it takes from the first pass of the block (``*`` is computed):

    cache     first pass of a block       its other passes          exact
    none      * * * * * | * * | * * *     the same                  yes
    prompt    . . . . . | * * | * * *     the same                  for a prompt that never sees the answer
    prefix    * * * * * | * * | * * *     . . . . . | * * | * * *   no: what precedes the block is not updated
    dual      * * * * * | * * | * * *     . . . . . | * * | . . .   no: neither is what follows it

``prompt`` is LaViDa's (arXiv 2505.16839): the prompt is encoded once, by itself. The other two are Fast-dLLM's (arXiv
2505.22618). A request holds its whole state, and the model none, so requests may be interleaved.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from lamella.errors import ArchitectureError, CacheError, MethodError
from lamella.runtime.cache import Phase, SparseSlot
from lamella.stack import Stack, last_stack, share

Algorithm = Literal["maskgit_plus", "topk_margin", "entropy", "origin"]
Commits = Literal["even", "timesteps"]
CacheKind = Literal["none", "prompt", "prefix", "dual"]
LAST = 1e-3  # noise of the last timestep


def even(masked: int, step: int, steps: int) -> int:
    """Return the number of tokens to commit in a step: equally many in each, with the remainder first (LLaDA).

    >>> [even(10, 0, 4), even(7, 1, 4), even(4, 2, 4), even(2, 3, 4)]
    [3, 2, 2, 2]

    Args:
        masked: number of masks left in the block.
        step: index of the step in the block.
        steps: number of steps of the block.
    """
    return -(-masked // (steps - step))


def timesteps(masked: int, step: int, steps: int) -> int:
    """Return the integer part of ``masked (1 - s / t)`` for noise that falls linearly from t to s (Dream).

    The last step commits all remaining masks.

    >>> [timesteps(10, 0, 4), timesteps(8, 1, 4), timesteps(6, 2, 4), timesteps(4, 3, 4)]
    [2, 2, 2, 4]

    Args:
        masked: number of masks left in the block.
        step: index of the step in the block.
        steps: number of steps of the block.
    """
    t, s = (1 - (1 - LAST) * at / steps for at in (step, step + 1))
    return masked if step == steps - 1 else int(masked * (1 - s / t))


COMMITS: dict[str, Callable[[int, int, int], int]] = {"even": even, "timesteps": timesteps}


@dataclass(frozen=True)
class Sampler:
    """How answers are denoised.

    Attributes:
        length: length of an answer in tokens.
        block: length of a block in tokens; if None, the whole answer is one block.
        steps: number of denoising steps of the whole answer, the same in each block; if None, one per token.
        algorithm: measure of certainty: the token's probability (``maskgit_plus``, LLaDA's low-confidence remasking),
            its margin to the second (``topk_margin``), the entropy of the distribution (``entropy``), or random
            (``origin``).
        commits: rule for the number of tokens that a step commits: ``even`` or ``timesteps``.
        temperature: sampling temperature; 0 takes the most likely tokens.
        cache: what passes reuse from earlier ones: ``none``, ``prompt``, ``prefix`` or ``dual``.
        seed: random seed.

    Raises:
        MethodError: for values that are inconsistent.
    """

    length: int = 64
    block: int | None = None
    steps: int | None = None
    algorithm: Algorithm = "maskgit_plus"
    commits: Commits = "even"
    temperature: float = 0.0
    cache: CacheKind = "none"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, kinds in (("algorithm", Algorithm), ("commits", Commits), ("cache", CacheKind)):
            if getattr(self, name) not in get_args(kinds):
                raise MethodError(f"{name} '{getattr(self, name)}': choose one of {', '.join(get_args(kinds))}")
        if self.length < 1 or not 1 <= self.per_block <= self.length or self.length % self.per_block:
            raise MethodError(f"length {self.length}, block {self.block}: an answer is a whole number of blocks")
        if not self.blocks <= self.in_all or self.in_all % self.blocks or self.in_all > self.length:
            raise MethodError(
                f"steps {self.steps}: give a multiple of the {self.blocks} blocks, at most one for each of the "
                f"{self.length} tokens"
            )
        if not self.temperature >= 0:
            raise MethodError(f"temperature {self.temperature}: it is 0 or more")

    @property
    def per_block(self) -> int:
        """The number of tokens of a block."""
        return self.length if self.block is None else self.block

    @property
    def blocks(self) -> int:
        """The number of blocks of an answer."""
        return self.length // self.per_block

    @property
    def in_all(self) -> int:
        """The number of denoising steps of a whole answer."""
        return self.length if self.steps is None else self.steps


class DenoisingCache(DynamicCache):
    """Keys and values of columns that are not computed again, until they are released.

    A pass appends those of its own columns, as in generation; afterwards :meth:`keep` selects the columns that stay.
    Their order does not matter: all tokens see all others, and keys include their rotary positions. A layer that does
    not run has no entry; a layer may hold fewer columns than others, different ones in each row, in a slot that records
    them.

    Attributes:
        columns: columns that every other layer holds, for which the model's mask must leave room before the columns of
            a pass [held].
    """

    def __init__(self) -> None:
        super().__init__()
        self.columns = torch.empty(0, dtype=torch.long)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of columns that are held."""
        return len(self.columns)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return the number of key columns and their offset for a mask of ``query_length`` tokens."""
        return len(self.columns) + query_length, 0

    def keep(self, columns: Tensor, entries: Tensor | slice) -> None:
        """Keep these columns [held].

        Args:
            columns: the columns to keep.
            entries: their entries in a layer that holds all columns.
        """
        layers: list[Any] = self.layers
        for index, layer in enumerate(layers):
            if isinstance(layer, SparseSlot):
                if len(columns) == 0:
                    layers[index] = DynamicLayer()
                elif layer.keys is not None:
                    layer.keep(torch.isin(layer.columns, columns))
            elif isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None:
                layer.keys, layer.values = layer.keys[:, :, entries], layer.values[:, :, entries]
        self.columns = columns

    def sparse(self, layer: int) -> SparseSlot | None:
        """Return the slot of a layer if it holds some columns only, else None."""
        found = self.layers[layer] if layer < len(self.layers) else None
        return found if isinstance(found, SparseSlot) else None

    def make_sparse(self, layer: int, rows: int, device: torch.device) -> SparseSlot:
        """Make a layer store different columns for each row from now on, starting with all that it has.

        Args:
            layer: index of the layer.
            rows: number of rows.
            device: device of the slot.
        """
        slot = self.sparse(layer)
        if slot is not None:
            return slot
        while len(self.layers) <= layer:
            self.layers.append(DynamicLayer())
        whole: Any = self.layers[layer]
        slot = SparseSlot(rows, device)
        if whole.keys is not None:
            slot.update(whole.keys, whole.values)
            slot.columns = self.columns.to(device).expand(rows, -1).clone()
        self.layers[layer] = slot
        return slot

    def delete(self, layer: int, which: Tensor) -> None:
        """Delete a layer's keys and values of some columns.

        Args:
            layer: index of the layer.
            which: columns to delete [rows, columns] bool.
        """
        slot = self.make_sparse(layer, len(which), which.device)
        held = slot.columns >= 0
        deleted = held & which.gather(1, slot.columns.clamp(min=0))
        if deleted.any():
            slot.keep(held & ~deleted)


class Denoising:
    """One request: prompts whose answers are denoised together, step by step.

    Args:
        model: a model that predicts masked tokens, or a view of one.
        input_ids: prompts [batch, time].
        attention_mask: 0 at their padding [batch, time], which is on the left.
        sampler: how the answers are denoised.
        prompt: other inputs of the model in passes with the prompt, such as ``pixel_values``.

    Attributes:
        tokens: prompts and answers, with the mask token where nothing is committed yet [batch, columns].
        step: index of the next denoising step, starting at 0.
        steps: number of denoising steps.
        start: first column of the current or last pass.
        end: column after the last one of that pass.
        kept: columns whose keys come from an earlier pass.
        logits: logits of the block's tokens in the last step [batch, block, vocabulary]; None before the first.
        passes: the columns of every pass so far, as [start, end).
        state: what a policy keeps from step to step.

    Raises:
        ArchitectureError: for a model that does not predict masked tokens.
        CacheError: for a prompt without tokens.
    """

    def __init__(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        sampler: Sampler | None = None,
        **prompt: Any,
    ) -> None:
        stack = check_masked(model)
        self.architecture = stack.architecture
        self.model, self.sampler = model, sampler or Sampler()
        self.prompt = _encoded(model, prompt)
        batch, self.length = input_ids.shape
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if self.length == 0 or not real.bool().any(dim=1).all():
            raise CacheError("a prompt of this batch is empty: give every row at least one token")
        self.mask_token: int = stack.config.mask_token_id
        images = stack.architecture.images
        self.forbidden_tokens = [
            self.mask_token,
            *([getattr(model.config, images)] if images else []),
        ]  # tokens that are never committed
        answer = input_ids.new_full((batch, self.sampler.length), self.mask_token)
        self.tokens = torch.cat([input_ids, answer], dim=1)
        self.real = torch.cat([real.bool(), torch.ones_like(answer, dtype=torch.bool)], dim=1)
        self.positions = (self.real.long().cumsum(dim=1) - 1).clamp(min=0)
        self.step, self.steps = 0, self.sampler.in_all
        self.start, self.end = 0, 0
        self.kept = torch.empty(0, dtype=torch.long, device=input_ids.device)
        self.cache = None if self.sampler.cache == "none" else DenoisingCache()
        self.before: Tensor | None = None  # for models that predict the next token: logits of the column before a pass
        self.logits: Tensor | None = None
        self.passes: list[tuple[int, int]] = []
        self.state: dict[str, Any] = {}
        self._generator = torch.Generator().manual_seed(self.sampler.seed)

    @property
    def done(self) -> bool:
        """Whether all steps are done."""
        return self.step == self.steps

    @property
    def answers(self) -> Tensor:
        """The committed tokens of the answers, and the mask token elsewhere [batch, length]."""
        return self.tokens[:, self.length :]

    @property
    def block(self) -> tuple[int, int]:
        """The columns of the current block, as [start, end)."""
        index = self.step * self.sampler.blocks // self.steps
        start = self.length + index * self.sampler.per_block
        return start, start + self.sampler.per_block

    @property
    def step_of_block(self) -> int:
        """The index of the next step in its block."""
        return self.step % (self.steps // self.sampler.blocks)

    @property
    def masked(self) -> Tensor:
        """Which tokens of the pass are masked [batch, time] bool."""
        return self.tokens[:, self.start : self.end] == self.mask_token

    @property
    def phase(self) -> Phase:
        """Which tokens of the pass are prompt."""
        return Phase.of(self.start, self.end - self.start, self.length)

    @torch.no_grad()
    def advance(self) -> None:
        """Run one step: a pass, and the commitment of tokens."""
        columns = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        start, end = self.block
        last = len(columns)
        if self.cache is None:
            logits = self._pass(0, last)
        elif self.sampler.cache == "prompt":
            if self.step == 0:
                self._begin(0, self.length, keep=columns[: self.length])
            logits = self._pass(self.length, last)
        elif self.step_of_block == 0:
            behind = columns[end:] if self.sampler.cache == "dual" else columns[:0]
            logits = self._begin(0, last, keep=torch.cat([columns[:start], behind]))
        else:
            logits = self._pass(start, end if self.sampler.cache == "dual" else last)
        self.logits = logits
        self._commit(logits, start, end)
        self.step += 1

    def _begin(self, start: int, end: int, keep: Tensor) -> Tensor:
        """Run a pass that reuses nothing, and keep the keys of these columns [kept] for later ones."""
        assert self.cache is not None
        self.kept = keep[:0]
        self.cache.keep(self.kept, slice(0))
        logits = self._pass(start, end)
        self.cache.keep(keep, keep - start)
        self.kept = keep
        return logits

    def _pass(self, start: int, end: int) -> Tensor:
        """Return the logits of the block's tokens [batch, block, vocabulary] from a pass over some columns."""
        self.start, self.end = start, end
        self.passes.append((start, end))
        device, (first, behind), shift = self.tokens.device, self.block, int(self.architecture.shifted)
        visible = torch.cat([self.kept, torch.arange(start, end, device=device)])
        begin = min(max(first - shift, start), end - 1)
        positions = torch.arange(begin, max(min(behind, end) - shift, begin + 1), device=device) - start
        given: dict[str, Any] = {} if self.cache is None else {"cache": self.cache}
        if getattr(self.model, "lamella_policy", None) is not None:
            given["denoising"] = self
        if start == 0:
            given |= self.prompt
        if not self.real.all():
            given["attention_mask"] = self.real[:, visible]
        logits: Tensor = self.model(
            input_ids=self.tokens[:, start:end],
            position_ids=self.positions[:, start:end],
            use_cache=False,
            logits_to_keep=positions,
            **given,
        ).logits
        if self.cache is not None and len(self.kept):
            self.cache.keep(self.kept, slice(len(self.kept)))
        if shift and start < first:
            self.before = logits[:, :1]
        elif shift:
            assert self.before is not None
            logits = torch.cat([self.before, logits], dim=1)[:, : behind - first]
        return logits

    def _commit(self, logits: Tensor, start: int, end: int) -> None:
        """Replace masks by the most certain tokens.

        Args:
            logits: logits of the block's tokens [batch, block, vocabulary].
            start: first column of the block.
            end: column after the last one of the block.
        """
        logits = logits.float()
        logits[..., self.forbidden_tokens] = -torch.inf
        masked = self.tokens[:, start:end] == self.mask_token
        tokens, certain = self._predicted(logits)
        per_block = self.steps // self.sampler.blocks
        count = COMMITS[self.sampler.commits](int(masked[0].sum()), self.step_of_block, per_block)
        order = certain.masked_fill(~masked, -torch.inf).argsort(dim=1, descending=True, stable=True)
        chosen = order[:, :count]
        self.tokens[:, start:end] = self.tokens[:, start:end].scatter(1, chosen, tokens.gather(1, chosen))

    def _predicted(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return a token for each position, and its certainty [batch, block]."""
        temperature = self.sampler.temperature
        p = torch.softmax(logits / temperature if temperature else logits, dim=-1)
        tokens = logits.argmax(dim=-1)
        if temperature:
            drawn = torch.multinomial(p.flatten(0, 1).cpu(), 1, generator=self._generator)
            tokens = drawn.view(tokens.shape).to(tokens.device)
        if self.sampler.algorithm == "origin":
            return tokens, torch.rand(tokens.shape, generator=self._generator).to(p.device)
        if self.sampler.algorithm == "entropy":
            return tokens, -torch.special.entr(p).sum(dim=-1)
        if self.sampler.algorithm == "topk_margin":
            first, second = p.topk(2, dim=-1).values.unbind(dim=-1)
            return tokens, first - second
        return tokens, p.gather(-1, tokens[..., None])[..., 0]


@torch.no_grad()
def _encoded(model: Any, prompt: dict[str, Any]) -> dict[str, Any]:
    """Return the other inputs of prompts, with images encoded once instead of in every pass."""
    if not prompt or not hasattr(model, "encoded"):
        return prompt
    found: dict[str, Any] = share(model).encoded(
        **prompt
    )  # a copy, since hooks are added to vision towers to return their states
    return found


def denoise(
    model: Any, input_ids: Tensor, attention_mask: Tensor | None = None, sampler: Sampler | None = None, **prompt: Any
) -> Tensor:
    """Generate answers to prompts by masked diffusion.

    Args:
        model: see :class:`Denoising`.
        input_ids: prompts [batch, time].
        attention_mask: 0 at their padding [batch, time], which is on the left.
        sampler: how the answers are denoised.
        prompt: other inputs of the model in passes with the prompt, such as ``pixel_values``.

    Returns:
        Prompts and answers [batch, time + length].

    Raises:
        ArchitectureError: for a model that does not predict masked tokens.
        CacheError: for a prompt without tokens.
    """
    request = Denoising(model, input_ids, attention_mask, sampler, **prompt)
    while not request.done:
        request.advance()
    return request.tokens


def check_masked(model: Any) -> Stack:
    """Return the stack of a transformers model that predicts masked tokens.

    Raises:
        ArchitectureError: for any other model.
    """
    stack = last_stack(model)
    architecture = stack.architecture
    if not architecture.denoises:
        raise ArchitectureError(
            f"a {architecture.name} predicts {architecture.objective}, not masked tokens, so there is nothing to "
            "denoise: call its own generate"
        )
    return stack
