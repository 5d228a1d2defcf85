"""A prefix tree of layer executions for one prompt: the common prefix of two chains of layers is computed once.

A chain is prefixed by the tokens generated before it, so that answers of several tokens share computation too. Each
node stores the hidden states and the keys and values of *that execution*: a layer that runs twice has two sets, and a
token attends to those of its own position in its own chain.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from lamella.errors import MethodError
from lamella.stack import Context, Hidden, Prefixes, Stack, hold

Chain = tuple[int, ...]
Generated = tuple[int, ...] | None  # tokens generated so far; None: nothing is generated, so no keys are kept
BUDGET = 512 * 2**20


class _LayerOutput(NamedTuple):
    """The hidden states after a layer, and its keys and values for all tokens so far, if kept."""

    h: Hidden
    slot: Any = None

    @property
    def bytes(self) -> int:
        """The size of the stored tensors."""
        tensors = (self.h, getattr(self.slot, "keys", None), getattr(self.slot, "values", None))
        return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))


class PrefixTree:
    """Execute any chain of a model's layers on one prompt, sharing common prefixes.

    Args:
        stack: the opened model; it is not changed.
        prompt: token ids [1, time].
        budget: bytes of hidden states, keys and values to keep between calls; the least recently used are dropped and
            recomputed when needed. 0 keeps nothing (plain execution). The default holds about 8000 layers of SmolLM2 on
            a prompt of 28 tokens.

    Attributes:
        executed: number of layers executed.
        unshared: number of layers that would have been executed without sharing.
        held: bytes kept now.
    """

    def __init__(self, stack: Stack, prompt: Tensor, budget: int = BUDGET) -> None:
        if prompt.ndim != 2 or prompt.shape[0] != 1 or prompt.shape[1] == 0:
            raise MethodError(f"a prefix tree takes one prompt of token ids [1, time], not {list(prompt.shape)}")
        self.stack = stack
        self.prompt = prompt.to(stack.device)
        self.budget = budget
        self.executed = self.unshared = self.held = 0
        self._prefixes: Prefixes[Any, Any] = Prefixes(None)
        self._empty = DynamicCache(config=stack.config).layers
        self._fronts: dict[Generated, tuple[Context, DynamicCache | None]] = {}

    @torch.no_grad()
    def logits(self, chain: Sequence[int]) -> Tensor:
        """Return the logits of the first token after the prompt [vocabulary].

        Args:
            chain: layer indices in order of execution.
        """
        logits = self._next(tuple(chain), None)
        self._forget(tuple(chain), None)
        return logits

    @torch.no_grad()
    def greedy(self, chain: Sequence[int], tokens: int, stop: Callable[[int], bool] = lambda token: False) -> list[int]:
        """Return the greedy continuation along a chain, equal to that of cached generation.

        Args:
            chain: layer indices in order of execution.
            tokens: maximum number of new tokens.
            stop: whether a token ends the answer; it is the last one returned.
        """
        generated: tuple[int, ...] = ()
        while len(generated) < tokens and not (generated and stop(generated[-1])):
            generated += (int(self._next(tuple(chain), generated).argmax()),)
        self._forget(tuple(chain), ())
        return list(generated)

    def _next(self, chain: Chain, generated: Generated) -> Tensor:
        if not chain:
            raise MethodError("a chain needs at least one layer")
        self.unshared += len(chain)
        h = self._prefixes.behind((generated, *chain), self._run).h
        assert isinstance(h, Tensor)  # after whole layers
        return self.stack.head(h[:, -1:])[0, -1]

    def _run(self, before: _LayerOutput | None, chain: tuple[Any, ...]) -> _LayerOutput:
        """Run the last layer of this chain on the prompt, or on the last generated token."""
        generated, *layers = chain
        context, cache = self._front(generated)
        if before is None:
            ran = _LayerOutput(context.h)
        else:
            slot, layer = None, layers[-1]
            if cache is not None:
                past = (
                    self._prefixes.behind((generated[:-1], *layers), self._run).slot
                    if generated
                    else self._empty[layer]
                )
                slot = cache.layers[layer] = copy.copy(past)  # updates create new tensors: a shallow copy is enough
            ran = _LayerOutput(self.stack.run(before.h, layer, layer + 1, context), slot)
            self.executed += 1
        self.held += ran.bytes
        return ran

    def _front(self, generated: Generated) -> tuple[Context, DynamicCache | None]:
        """Run the model's front on the prompt, or on the last generated token, with a cache of the right length."""
        if generated not in self._fronts:
            cache = None if generated is None else DynamicCache(config=self.stack.config)
            given: dict[str, Any] = {"input_ids": self.prompt}
            if cache is not None:
                given |= {"cache": cache, "use_cache": True}
            if cache is not None and generated:
                given["input_ids"] = self.prompt.new_tensor([[generated[-1]]])
                for slot in range(len(self.stack)):
                    hold(cache, slot, self.prompt.shape[1] + len(generated) - 1)
            self._fronts[generated] = self.stack.context(given), cache
        return self._fronts[generated]

    def _forget(self, chain: Chain, generated: Generated) -> None:
        """Enforce the budget between calls; within a call, everything it needs must stay.

        Every prefix of this chain counts as just used, the shortest last, since most chains can share short prefixes.
        """
        self._fronts = {generated: front for generated, front in self._fronts.items() if not generated}
        states = self._prefixes.states
        for length in range(len(chain), 0, -1):
            if (generated, *chain[:length]) in states:
                states.move_to_end((generated, *chain[:length]))
        while self.held > self.budget:
            _, ran = states.popitem(last=False)
            self.held -= ran.bytes
