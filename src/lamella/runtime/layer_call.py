"""What a policy is given: a pass, and in it one call for every layer.

What a :class:`LayerCall` is asked for runs, what it is not asked for does not: sublayers, some rows of the batch, some
tokens of each row, some experts of each token.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import EncoderDecoderCache

from lamella.runtime.cache import Phase, PlanCache, SparseSlot
from lamella.runtime.denoising import Denoising, DenoisingCache
from lamella.runtime.gathering import Gathering, Keep, PositionInputs, inputs_at, sparsely
from lamella.runtime.masks import additive, restricted, stored_mask, visible
from lamella.runtime.trace import Trace
from lamella.stack import Architecture, Experts, Hidden, Parallel, Sublayer, attend_with_weights, join


@dataclass
class Pass:
    """One forward of a view.

    Attributes:
        phase: which of its tokens are prompt.
        padding: where the columns up to the end of this call are no tokens [batch, columns] bool; None without padding.
        cache: of a step execution; None in a parallel one.
        device: where the stream lives.
        batch: how many rows there are.
        memory: what the policy keeps from layer to layer of this pass.
        trace: what takes notes, when somebody wants to see.
        images: which of its tokens stand for an image [batch, time] bool; None where none does.
        denoising: the request whose pass this is, in a denoising loop: its step, and what a policy keeps between steps.
    """

    phase: Phase
    padding: Tensor | None
    cache: PlanCache | None
    device: torch.device
    batch: int
    memory: dict[str, Any] = field(default_factory=dict)
    trace: Trace | None = None
    images: Tensor | None = None
    denoising: Denoising | None = None

    @property
    def real(self) -> Tensor | None:
        """Where this call's columns are tokens [batch, time] bool; None without padding."""
        return None if self.padding is None else ~self.padding[:, self.phase.start : self.phase.end]

    def choose(self, call: LayerCall, passing: Tensor, h: Tensor, out: Tensor) -> Tensor:
        """``out`` of a layer, but ``h`` where tokens pass it by [batch or 1, time] bool."""
        if self.trace is not None:
            self.trace.did_not_count(call.index, passing)
        return torch.where(passing.unsqueeze(-1), h, out)

    def note(self, name: str, layer: int, values: Tensor) -> None:
        """Let the trace have a number per token of one layer: the policy's reason [batch, time]."""
        if self.trace is not None:
            self.trace.note(name, layer, values)


@dataclass(slots=True)
class LayerCall:
    """One layer in one pass, as a policy sees it: what it calls runs, what it does not call does not.

    Attributes:
        index: the layer's number, which is also its cache slot.
        layer, architecture, kwargs: the module, its entry in the table, what the model calls it with beside the stream.
        runs: the sublayers that run at all under the plan.
        who: the rows that this call stands for [rows], None for all.
        some: the tokens of each row that it stands for, None for all.
    """

    index: int
    layer: nn.Module
    architecture: Architecture
    kwargs: dict[str, Any]
    run: Pass
    runs: tuple[str, ...]
    who: Tensor | None = None
    some: Gathering | None = None

    def __call__(self, h: Tensor, keys: Tensor | None = None) -> Tensor:
        """The whole layer, its sublayers in their order; see :meth:`attn` for ``keys``."""
        stream: Hidden = h
        for sublayer in self.architecture.sublayers:
            name = sublayer.name
            stream = self.attn(join(stream), keys) if name == "attn" else self._run(sublayer, stream, self.kwargs)
        return join(stream)

    def attn(self, h: Tensor, keys: Tensor | None = None) -> Hidden:
        """The attention; in a step execution its keys go to the cache.

        Args:
            h: the stream [rows, time, hidden].
            keys: which of these tokens other ones may look back on [rows, time] bool, in a layer that is among the
                policy's ``sparse`` ones; None for all. A token always sees itself.
        """
        attn, cache = self.architecture["attn"], self.run.cache
        if not self.architecture.causal and keys is None:
            return self._run(attn, h, self._everywhere(h)[0])
        if self.some is not None:
            assert keys is None, "gathered tokens see each other"
            return self._among(self.some, h)
        if cache is None:
            return self._run(attn, h, self.kwargs if keys is None else self._restricted(h, keys))
        slot = cache.sparse(self.index)
        assert slot is not None or keys is None, "layers that store some tokens only are the policy's sparse ones"
        if slot is None or "attn" not in self.runs:
            return self._run(attn, h, self.kwargs)
        out = self._run(attn, h, self._over(slot, h, keys))
        if keys is not None:
            slot.keep(keys)
        return out

    def attn_with_weights(self, h: Tensor) -> tuple[Hidden, Tensor, Tensor]:
        """The attention, by the eager kernel, in a model whose tokens see all others.

        Returns:
            The stream after it, how much each token attends to each key [rows, heads, time, keys], and the column of
            each key, -1 for an empty one [rows, keys].
        """
        assert not self.architecture.causal, "of tokens that see those before them alone, use stack.attend_with_weights"
        given, columns = self._everywhere(h)
        attn = self.architecture["attn"]
        self._took_note("attn")
        out, weights = attend_with_weights(attn, self.layer, h, given, causal=False)
        return out, weights, columns

    def cross(self, mid: Hidden) -> Hidden:
        """The attention to an encoder, after :meth:`attn`; nothing in a decoder that reads none [rows, time, hidden].

        In a step execution the encoder's keys and values are computed when a layer first runs, for all rows.
        """
        return self._run(self.architecture["cross"], mid, self.kwargs) if "cross" in self.runs else mid

    def mlp(self, mid: Hidden) -> Tensor:
        """The MLP, after :meth:`attn` and :meth:`cross` or in place of them [rows, time, hidden]."""
        return join(self._run(self.architecture["mlp"], mid, self.kwargs))

    def mlp_where(self, mid: Hidden, need: Tensor) -> Tensor:
        """The MLP, executed for these tokens only [rows, time] bool; the others pass."""
        if "mlp" not in self.runs or not need.any():
            return join(mid)
        self._took_note("mlp", need)
        if need.all():
            return join(self.architecture["mlp"].run(self.layer, mid, self.kwargs))
        chosen = Parallel(*(part[need][None] for part in mid)) if isinstance(mid, Parallel) else mid[need][None]
        out = join(mid).clone()
        out[need] = join(self.architecture["mlp"].run(self.layer, chosen, self.kwargs))[0]
        return out

    def experts(self, mid: Hidden, experts: Experts, keep: Keep) -> Tensor:
        """The MLP, of whose experts each token runs some of those that were chosen for it; what else it has runs.

        Args:
            mid: the stream after the attention [rows, time, hidden].
            experts: where they are: :attr:`Stack.experts`.
            keep: given the experts chosen for each token [tokens, used] and their weights, which to run, as bool.
        """
        try:
            module = self.layer.get_submodule(experts.experts)
        except AttributeError:  # a layer without
            return self.mlp(mid)
        with sparsely(module, keep):
            return self.mlp(mid)

    def store_keys(self, h: Tensor) -> None:
        """Compute and store keys and values alone, for a layer that does not run but will be looked back on."""
        cache = self.run.cache
        if cache is None or "attn" not in self.runs:
            return
        try:
            self.architecture["attn"].run(self.layer, h, self.kwargs | {self.architecture.cache: _KeysOnly(cache)})
        except _Stored:
            return

    def rows(self, which: Tensor) -> LayerCall:
        """The same layer for some rows of the batch [rows].

        In a step execution its slot must hold these rows alone, and the decoder read no encoder; see :meth:`run_rows`.
        """
        given = {name: _gather(value, which, self.run.batch) for name, value in self.kwargs.items()}
        return replace(self, kwargs=given, who=which)

    def run_rows(self, h: Tensor, which: Tensor) -> Tensor:
        """The whole layer for some rows of the batch; of the others, a step execution stores keys and values.

        What the layer has stored of earlier tokens is of all rows.

        Args:
            h: the stream of all rows [batch, time, hidden].
            which: the numbers of those that run [rows].

        Returns:
            The stream of these rows after the layer [rows, time, hidden].
        """
        name, cache = self.architecture.cache, self.run.cache
        call = self.rows(which)
        if cache is None:
            return call(h[which])
        assert cache.sparse(self.index) is None, "a slot that holds some tokens only belongs to all rows"
        pair, rest = self.kwargs[name], torch.ones(len(h), dtype=torch.bool, device=h.device)
        rest[which] = False
        others = rest.nonzero().flatten()
        keys = _Keys(cache)
        if len(others) and "attn" in self.runs:
            given = self.rows(others).kwargs | {name: keys}
            with suppress(_Stored):
                self.architecture["attn"].run(self.layer, h[others], given)
        stream: Hidden = h[which]
        for sublayer in self.architecture.sublayers:
            given = call.kwargs
            if sublayer.name == "attn":
                given = given | {name: _AllRows(cache, which, others, keys.found)}
            elif sublayer.name == "cross":
                given = given | {name: self._encoder_keys(h, pair, which)}
            stream = call._run(sublayer, stream, given)
        return join(stream)

    def _encoder_keys(self, h: Tensor, pair: Any, which: Tensor) -> Any:
        """The keys and values of an encoder for some rows, as a cache; they are first stored for all rows."""
        if not pair.is_updated.get(self.index):
            given = self.kwargs | {self.architecture.cache: _OfEncoder(pair)}
            try:
                self.architecture["cross"].run(self.layer, h, given)
            except _Stored:
                pair.is_updated[self.index] = True
        return _OfEncoder(pair, self.index, which)

    def tokens(self, which: Tensor, positions: PositionInputs | None = None) -> LayerCall:
        """The same layer for some tokens of each row, which see each other and what such calls stored before.

        Its stream is :meth:`gather`'s; :meth:`scatter` puts what comes of it in the place of these tokens. In a step
        execution the layer must be among the policy's ``sparse`` ones, whose slots then hold these tokens alone.

        Args:
            which: the tokens [rows, time] bool, none of them padding.
            positions: of the stack, where tokens move up to the positions that the others leave; else they keep theirs.
        """
        real = self._of_rows(self.run.real)
        if (which if real is None else which | ~real).all() and self._may_stay(positions):
            return self
        some = Gathering.of(which)
        given = inputs_at(self.kwargs, some.index)
        if positions is not None:
            given |= positions(self.index, (self._stored() + some.held.cumsum(dim=1) - 1).clamp(min=0))
        return replace(self, kwargs=self.kwargs | given, some=some)

    def apart(self, groups: Tensor, dtype: torch.dtype) -> LayerCall:
        """The same layer, in which tokens see those of their own group alone, in a model whose tokens see all others.

        Groups that all run are computed in one pass so, in place of one for each by :meth:`tokens`.

        Args:
            groups: a number for each token [rows, time].
            dtype: of the stream.
        """
        assert not self.architecture.causal and self.some is None
        seen, mask = groups[:, None, :, None] == groups[:, None, None, :], self.kwargs.get("attention_mask")
        seen = seen if mask is None else seen & visible(mask)
        return replace(self, kwargs=self.kwargs | {"attention_mask": additive(seen, dtype)})

    def moved(self, positions: PositionInputs, at: Tensor) -> LayerCall:
        """The same call with its tokens at other positions.

        Args:
            positions: of the stack.
            at: the position of every token of the pass [rows, time].
        """
        at = at if self.some is None else at.gather(1, self.some.index)
        return replace(self, kwargs=self.kwargs | positions(self.index, at))

    def gather(self, h: Tensor) -> Tensor:
        """The stream of the tokens of this call [rows, time, hidden] -> [rows, most, hidden]."""
        return h if self.some is None else self.some.gather(h)

    def scatter(self, h: Tensor, out: Tensor) -> Tensor:
        """The stream [rows, time, hidden] with ``out`` [rows, most, hidden] in the place of this call's tokens."""
        return out if self.some is None else self.some.scatter(h, out)

    def _of_rows(self, value: Tensor | None) -> Tensor | None:
        """What there is of every row of the batch, for the rows of this call."""
        return value if value is None or self.who is None else value[self.who.to(value.device)]

    def _stored(self) -> Tensor:
        """How many tokens of each row the layer's slot holds [rows, 1]; none in a parallel execution."""
        slot = None if self.run.cache is None else self.run.cache.sparse(self.index)
        if slot is None:
            return torch.zeros(1, 1, dtype=torch.long, device=self.run.device)
        held = slot.columns >= 0
        if self.run.padding is not None:
            held &= ~self.run.padding.gather(1, slot.columns.clamp(min=0))
        return held.sum(dim=1, keepdim=True)

    def _may_stay(self, positions: PositionInputs | None) -> bool:
        """Whether tokens of which none is left out also stay where they are."""
        return positions is None or (self.run.padding is None and bool((self._stored() == self.run.phase.start).all()))

    def _run(self, sublayer: Sublayer, stream: Hidden, given: dict[str, Any]) -> Hidden:
        if sublayer.name not in self.runs:
            return stream
        self._took_note(sublayer.name)
        return sublayer.run(self.layer, stream, given)

    def _restricted(self, h: Tensor, keys: Tensor) -> dict[str, Any]:
        """What an attention over whole sequences is called with, of which others see these columns alone."""
        mask, causal = self.kwargs.get("attention_mask"), self.architecture.causal
        return self.kwargs | {"attention_mask": restricted(mask, keys, h.dtype, causal)}

    def _among(self, some: Gathering, h: Tensor) -> Hidden:
        """The attention of gathered tokens [rows, most, hidden]."""
        attn, cache, dtype = self.architecture["attn"], self.run.cache, h.dtype
        columns = torch.where(some.held, self.run.phase.start + some.index, -1)
        if cache is None:
            own = self.kwargs.get("attention_mask")
            if own is None:
                mask = stored_mask(columns, None, h.shape[1], None, None, dtype)
            else:
                mask = additive(some.visible(own), dtype)
            return self._run(attn, h, self.kwargs | {"attention_mask": mask})
        slot = cache.sparse(self.index)
        assert slot is not None, "layers that gather tokens are the policy's sparse ones"
        both, window = torch.cat([slot.columns, columns], dim=1), cache.window(self.index)
        sees_all = h.shape[1] == 1 and window is None and not slot.ragged and bool(some.held.all())
        sees_all = sees_all and self.run.padding is None
        seen = None if sees_all else stored_mask(both, None, h.shape[1], self.run.padding, window, dtype)
        given = {"attention_mask": seen, self.architecture.cache: _Columns(cache, both)}
        out = self._run(attn, h, self.kwargs | given)
        slot.keep(some.held)
        return out

    def _everywhere(self, h: Tensor) -> tuple[dict[str, Any], Tensor]:
        """What an attention in both directions is called with, and the column of each of its keys [rows, keys]."""
        start, rows = self.run.phase.start, len(h)
        kept = None if self.run.denoising is None else self.run.denoising.cache
        if self.some is None:
            own = torch.arange(start, start + h.shape[1], device=h.device).expand(rows, -1)
        else:
            own = torch.where(self.some.held, start + self.some.index, -1)
        if kept is None:
            mask = self.kwargs.get("attention_mask")
            if self.some is None:
                return self.kwargs, own
            if mask is not None:
                return self.kwargs | {"attention_mask": additive(self.some.visible(mask), h.dtype)}, own
            return self.kwargs | {"attention_mask": self._visible(own, h)}, own
        slot = kept.sparse(self.index)
        if slot is None and self.some is None:
            return self.kwargs, torch.cat([kept.columns.to(h.device).expand(rows, -1), own], dim=1)
        slot = kept.make_sparse(self.index, rows, h.device)
        both = torch.cat([slot.columns, own], dim=1)
        seen = {"attention_mask": self._visible(both, h), self.architecture.cache: _Columns(kept, both)}
        return self.kwargs | seen, both

    def _visible(self, columns: Tensor, h: Tensor) -> Tensor | None:
        """The mask of tokens that see all of these columns [rows, keys] that are tokens; None where all of them are."""
        seen = columns >= 0
        padding = self._of_rows(self.run.padding)
        if padding is not None:
            seen = seen & ~padding.gather(1, columns.clamp(min=0))
        return None if seen.all() else additive(seen[:, None, None].expand(-1, 1, h.shape[1], -1), h.dtype)

    def _over(self, slot: SparseSlot, h: Tensor, keys: Tensor | None) -> dict[str, Any]:
        """What an attention is called with that looks back on what a sparse slot holds."""
        assert self.run.cache is not None
        window, padding = self.run.cache.window(self.index), self._of_rows(self.run.padding)
        queries, bias = h.shape[1], self.kwargs.get("position_bias")
        sees_all = queries == 1 and padding is None and window is None and not slot.ragged
        if sees_all and bias is None:
            return self.kwargs | {"attention_mask": None}
        columns = slot.columns_with(self.run.phase.start, queries)
        mask = None if sees_all else stored_mask(columns, keys, queries, padding, window, h.dtype)
        given = self.kwargs | {"attention_mask": mask}
        return given if bias is None else given | {"position_bias": _of_columns(bias, columns)}

    def _took_note(self, sublayer: str, tokens: Tensor | None = None) -> None:
        if self.some is not None:
            tokens = self.some.which
        if self.run.trace is not None:
            self.run.trace.note_run(self.index, sublayer, self.who, tokens)


class _Stored(Exception):
    """Keys and values are in the cache; the rest of the attention is not wanted."""


@dataclass
class _KeysOnly:
    """A cache that ends an attention as soon as its keys and values are stored."""

    cache: Any

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)

    def update(self, *args: Any, **kwargs: Any) -> Any:
        self.cache.update(*args, **kwargs)
        raise _Stored


class _Keys:
    """A cache that ends an attention with its keys and values, and stores nothing.

    Attributes:
        found: those keys and values, each [rows, heads, time, size].
    """

    def __init__(self, cache: PlanCache) -> None:
        self.cache = cache
        self.found: tuple[Tensor, Tensor] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.found = keys, values
        raise _Stored


@dataclass
class _AllRows:
    """A cache for an attention that runs for some rows, which stores the others' keys and values beside theirs.

    Attributes:
        cache: of all rows.
        which, others: the numbers of the rows that run, and of those that do not.
        beside: keys and values of the others, if there are any.
    """

    cache: PlanCache
    which: Tensor
    others: Tensor
    beside: tuple[Tensor, Tensor] | None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.beside is not None:
            order = torch.cat([self.which, self.others]).argsort()
            keys, values = (torch.cat(pair)[order] for pair in zip((keys, values), self.beside, strict=True))
        held, said = self.cache.update(keys, values, layer_idx)
        return held[self.which], said[self.which]


class _OfEncoder(EncoderDecoderCache):
    """The encoder's part of a pair of caches, by itself.

    Without rows it ends an attention as soon as the encoder's keys and values are stored in the pair; with some, it
    hands on what is stored of these.
    """

    def __init__(self, pair: EncoderDecoderCache, layer: int | None = None, which: Tensor | None = None) -> None:
        self.self_attention_cache = pair.self_attention_cache
        self.is_updated: dict[int, bool] = {}
        stored: Any = pair.cross_attention_cache
        handed: Any = _KeysOnly(stored)
        if layer is not None:
            held = stored.layers[layer]
            handed = SimpleNamespace(layers={layer: SimpleNamespace(keys=held.keys[which], values=held.values[which])})
            self.is_updated[layer] = True
        self.cross_attention_cache = handed


@dataclass
class _Columns:
    """A cache in whose sparse slot the next keys and values are those of columns that need not follow each other."""

    cache: PlanCache | DenoisingCache
    columns: Tensor

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        slot = self.cache.sparse(layer_idx)
        assert slot is not None
        slot.columns = self.columns
        found: tuple[Tensor, Tensor] = slot.update(keys, values)
        return found


def _of_columns(bias: Tensor, columns: Tensor) -> Tensor:
    """T5's bias of scores by column [1, heads, queries, columns], for the entries of each row [rows, stored]."""
    heads, queries = bias.shape[1:3]
    positions = columns.clamp(min=0)[:, None, None].expand(-1, heads, queries, -1)
    return bias.expand(len(columns), -1, -1, -1).gather(-1, positions)


def _gather(value: Any, rows: Tensor, batch: int) -> Any:
    """The rows of everything in a call that has one entry per row."""
    if isinstance(value, tuple):
        return tuple(_gather(each, rows, batch) for each in value)
    if isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] == batch > 1:
        return value[rows.to(value.device)]
    return value
