"""One prompt, many chains of layers: what two chains have in common at their beginning is computed once.

A chain begins with the tokens that were written before it, so answers of several tokens share too: chains that have
written the same tokens share the same streams. With every stream lie the keys and values of *that execution*: a layer
that runs twice has two, and a token reads those of its own place in its own chain.
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
Written = tuple[int, ...] | None  # None: nothing will be written behind the prompt, so no keys are kept
BUDGET = 512 * 2**20


class _Ran(NamedTuple):
    """The stream behind a layer that ran, and its keys and values for all tokens up to here, if kept."""

    h: Hidden
    slot: Any = None

    @property
    def bytes(self) -> int:
        tensors = (self.h, getattr(self.slot, "keys", None), getattr(self.slot, "values", None))
        return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))


class PrefixTree:
    """What a model computes for one prompt along any chain of its layers.

    Args:
        stack: the opened model; it is not changed.
        prompt: token ids [1, time].
        budget: bytes of streams, keys and values to keep between two calls; what was used longest ago goes first, and
            is computed again when asked for. 0 keeps nothing, which is plain execution. The default holds some 8000
            layers of SmolLM2 on a prompt of 28 tokens.

    Attributes:
        executed: layers that were run.
        asked: layers that would have been run without sharing.
        held: bytes that are kept now.
    """

    def __init__(self, stack: Stack, prompt: Tensor, budget: int = BUDGET) -> None:
        if prompt.ndim != 2 or prompt.shape[0] != 1 or prompt.shape[1] == 0:
            raise MethodError(f"a prefix tree holds one prompt of tokens [1, time], not {list(prompt.shape)}")
        self.stack = stack
        self.prompt = prompt.to(stack.device)
        self.budget = budget
        self.executed = self.asked = self.held = 0
        self._prefixes: Prefixes[Any, Any] = Prefixes(None)
        self._empty = DynamicCache(config=stack.config).layers
        self._fronts: dict[Written, tuple[Context, DynamicCache | None]] = {}

    @torch.no_grad()
    def logits(self, chain: Sequence[int]) -> Tensor:
        """The logits of the first token after the prompt [vocabulary]."""
        logits = self._next(tuple(chain), None)
        self._forget(tuple(chain), None)
        return logits

    @torch.no_grad()
    def greedy(self, chain: Sequence[int], tokens: int, stop: Callable[[int], bool] = lambda token: False) -> list[int]:
        """The most likely continuation, as cached generation along this chain gives it.

        Args:
            chain: layer numbers in the order of execution.
            tokens: the most that are written.
            stop: whether this token ends the answer; it is the last one returned.
        """
        written: tuple[int, ...] = ()
        while len(written) < tokens and not (written and stop(written[-1])):
            written += (int(self._next(tuple(chain), written).argmax()),)
        self._forget(tuple(chain), ())
        return list(written)

    def _next(self, chain: Chain, written: Written) -> Tensor:
        if not chain:
            raise MethodError("a chain needs at least one layer")
        self.asked += len(chain)
        h = self._prefixes.behind((written, *chain), self._run).h
        assert isinstance(h, Tensor)  # behind whole layers
        return self.stack.head(h[:, -1:])[0, -1]

    def _run(self, before: _Ran | None, chain: tuple[Any, ...]) -> _Ran:
        """The last layer of this chain, run on the prompt or, behind it, on the last token written."""
        written, *layers = chain
        context, cache = self._front(written)
        if before is None:
            ran = _Ran(context.h)
        else:
            slot, layer = None, layers[-1]
            if cache is not None:
                past = self._prefixes.behind((written[:-1], *layers), self._run).slot if written else self._empty[layer]
                slot = cache.layers[layer] = copy.copy(past)  # updates make new tensors: a copy of the frame is enough
            ran = _Ran(self.stack.run(before.h, layer, layer + 1, context), slot)
            self.executed += 1
        self.held += ran.bytes
        return ran

    def _front(self, written: Written) -> tuple[Context, DynamicCache | None]:
        """The model's front for the prompt, or for the last token written, with a cache that counts what is before."""
        if written not in self._fronts:
            cache = None if written is None else DynamicCache(config=self.stack.config)
            given: dict[str, Any] = {"input_ids": self.prompt}
            if cache is not None:
                given |= {"cache": cache, "use_cache": True}
            if cache is not None and written:
                given["input_ids"] = self.prompt.new_tensor([[written[-1]]])
                for slot in range(len(self.stack)):
                    hold(cache, slot, self.prompt.shape[1] + len(written) - 1)
            self._fronts[written] = self.stack.context(given), cache
        return self._fronts[written]

    def _forget(self, chain: Chain, written: Written) -> None:
        """Keep to the budget, but only between calls: within one, everything it needs must stay.

        Every beginning of this chain counts as used just now, the shortest last, since most chains can share those.
        """
        self._fronts = {written: front for written, front in self._fronts.items() if not written}
        states = self._prefixes.states
        for length in range(len(chain), 0, -1):
            if (written, *chain[:length]) in states:
                states.move_to_end((written, *chain[:length]))
        while self.held > self.budget:
            _, ran = states.popitem(last=False)
            self.held -= ran.bytes
