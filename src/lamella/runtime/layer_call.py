"""The arguments of a policy: a pass, and one call for every layer in it.

Only what a policy requests from a :class:`LayerCall` runs: sublayers, some rows of the batch, some tokens of each row,
or some experts of each token.
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
    """One forward pass of a view.

    Attributes:
        phase: which of its tokens are prompt.
        padding: which columns up to the end of this call are padding [batch, columns] bool; None without padding.
        cache: the cache in a step execution; None in a parallel one.
        device: device of the hidden states.
        batch: number of rows.
        memory: what the policy keeps from layer to layer in this pass.
        trace: the trace that records the pass, if there is one.
        images: which of its tokens are image positions [batch, time] bool; None without images.
        denoising: in a denoising loop, the request of this pass, with its step and what a policy keeps between steps.
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
        """Which columns of this call are tokens [batch, time] bool; None without padding."""
        return None if self.padding is None else ~self.padding[:, self.phase.start : self.phase.end]

    def choose(self, call: LayerCall, passing: Tensor, h: Tensor, out: Tensor) -> Tensor:
        """Return ``out`` of a layer, but ``h`` for the tokens that bypass it.

        Args:
            call: the layer.
            passing: tokens that bypass the layer [batch or 1, time] bool.
            h: hidden states before the layer.
            out: hidden states after it.
        """
        if self.trace is not None:
            self.trace.did_not_count(call.index, passing)
        return torch.where(passing.unsqueeze(-1), h, out)

    def note(self, name: str, layer: int, values: Tensor) -> None:
        """Record a value per token for one layer in the trace: the reason for the policy's decision [batch, time].

        Args:
            name: name of the value.
            layer: index of the layer.
            values: the values [batch, time].
        """
        if self.trace is not None:
            self.trace.note(name, layer, values)


@dataclass(slots=True)
class LayerCall:
    """One layer in one pass, as a policy sees it: only what the policy calls is executed.

    Attributes:
        index: index of the layer, which is also its cache slot.
        layer: the module.
        architecture: its entry in the table.
        kwargs: keyword arguments that the model passes to the layer.
        run: the pass.
        runs: the sublayers that run under the plan.
        who: the rows of this call [rows]; None for all.
        some: the tokens of each row in this call; None for all.
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
        """Run the whole layer, its sublayers in order; see :meth:`attn` for ``keys``.

        Args:
            h: residual stream before the layer [rows, time, hidden].
            keys: see :meth:`attn`.
        """
        hidden: Hidden = h
        for sublayer in self.architecture.sublayers:
            name = sublayer.name
            hidden = self.attn(join(hidden), keys) if name == "attn" else self._run(sublayer, hidden, self.kwargs)
        return join(hidden)

    def attn(self, h: Tensor, keys: Tensor | None = None) -> Hidden:
        """Run the attention; in a step execution its keys are stored in the cache.

        Args:
            h: residual stream before the layer [rows, time, hidden].
            keys: which of these tokens later tokens may attend to [rows, time] bool, in a layer that is among the
                policy's ``sparse`` ones; None for all. A token always sees itself.
        """
        attn, cache = self.architecture["attn"], self.run.cache
        if not self.architecture.causal and keys is None:
            return self._run(attn, h, self._everywhere(h)[0])
        if self.some is not None:
            assert keys is None, "gathered tokens see one another"
            return self._among(self.some, h)
        if cache is None:
            return self._run(attn, h, self.kwargs if keys is None else self._restricted(h, keys))
        slot = cache.sparse(self.index)
        assert slot is not None or keys is None, "only the policy's sparse layers store some tokens only"
        if slot is None or "attn" not in self.runs:
            return self._run(attn, h, self.kwargs)
        out = self._run(attn, h, self._over(slot, h, keys))
        if keys is not None:
            slot.keep(keys)
        return out

    def attn_with_weights(self, h: Tensor) -> tuple[Hidden, Tensor, Tensor]:
        """Run the attention with the eager kernel, in a model with bidirectional attention.

        Args:
            h: residual stream before the layer [rows, time, hidden].

        Returns:
            The residual stream after it, the attention probabilities [rows, heads, time, keys], and the column of each
            key, -1 for an empty one [rows, keys].
        """
        assert not self.architecture.causal, "for causal models, use stack.attend_with_weights"
        given, columns = self._everywhere(h)
        attn = self.architecture["attn"]
        self._note_run("attn")
        out, weights = attend_with_weights(attn, self.layer, h, given, causal=False)
        return out, weights, columns

    def cross(self, mid: Hidden) -> Hidden:
        """Run the attention to an encoder, after :meth:`attn`; does nothing in a decoder without one.

        In a step execution the encoder's keys and values are computed when a layer first runs, for all rows.

        Args:
            mid: residual stream after the attention [rows, time, hidden].
        """
        return self._run(self.architecture["cross"], mid, self.kwargs) if "cross" in self.runs else mid

    def mlp(self, mid: Hidden) -> Tensor:
        """Run the MLP, after :meth:`attn` and :meth:`cross` or instead of them [rows, time, hidden]."""
        return join(self._run(self.architecture["mlp"], mid, self.kwargs))

    def mlp_where(self, mid: Hidden, need: Tensor) -> Tensor:
        """Run the MLP for some tokens only [rows, time] bool; the others bypass it.

        Args:
            mid: residual stream after the attention [rows, time, hidden].
            need: the tokens [rows, time] bool.
        """
        if "mlp" not in self.runs or not need.any():
            return join(mid)
        self._note_run("mlp", need)
        if need.all():
            return join(self.architecture["mlp"].run(self.layer, mid, self.kwargs))
        chosen = Parallel(*(part[need][None] for part in mid)) if isinstance(mid, Parallel) else mid[need][None]
        out = join(mid).clone()
        out[need] = join(self.architecture["mlp"].run(self.layer, chosen, self.kwargs))[0]
        return out

    def experts(self, mid: Hidden, experts: Experts, keep: Keep) -> Tensor:
        """Run the MLP with only some of the experts that were chosen for each token; its other parts run in full.

        Args:
            mid: residual stream after the attention [rows, time, hidden].
            experts: the stack's experts, :attr:`Stack.experts`.
            keep: returns which experts run, as bool, given the experts chosen for each token [tokens, used] and their
                weights.
        """
        try:
            module = self.layer.get_submodule(experts.experts)
        except AttributeError:  # a layer without experts
            return self.mlp(mid)
        with sparsely(module, keep):
            return self.mlp(mid)

    def store_keys(self, h: Tensor) -> None:
        """Compute and store only keys and values, for a layer that does not run but that later tokens attend to."""
        cache = self.run.cache
        if cache is None or "attn" not in self.runs:
            return
        try:
            self.architecture["attn"].run(self.layer, h, self.kwargs | {self.architecture.cache: _KeysOnly(cache)})
        except _Stored:
            return

    def rows(self, which: Tensor) -> LayerCall:
        """Return the same layer for some rows of the batch [rows].

        In a step execution its slot must hold these rows only, and the decoder must not read an encoder; see
        :meth:`run_rows`.
        """
        given = {name: _gather(value, which, self.run.batch) for name, value in self.kwargs.items()}
        return replace(self, kwargs=given, who=which)

    def run_rows(self, h: Tensor, which: Tensor) -> Tensor:
        """Run the whole layer for some rows of the batch; a step execution also stores the others' keys and values.

        The layer's slot must hold earlier tokens of all rows.

        Args:
            h: residual stream of all rows [batch, time, hidden].
            which: indices of the rows that run [rows].

        Returns:
            The residual stream of these rows after the layer [rows, time, hidden].
        """
        name, cache = self.architecture.cache, self.run.cache
        call = self.rows(which)
        if cache is None:
            return call(h[which])
        assert cache.sparse(self.index) is None, "a sparse slot belongs to all rows"
        pair, rest = self.kwargs[name], torch.ones(len(h), dtype=torch.bool, device=h.device)
        rest[which] = False
        others = rest.nonzero().flatten()
        keys = _Keys(cache)
        if len(others) and "attn" in self.runs:
            given = self.rows(others).kwargs | {name: keys}
            with suppress(_Stored):
                self.architecture["attn"].run(self.layer, h[others], given)
        hidden: Hidden = h[which]
        for sublayer in self.architecture.sublayers:
            given = call.kwargs
            if sublayer.name == "attn":
                given = given | {name: _AllRows(cache, which, others, keys.found)}
            elif sublayer.name == "cross":
                given = given | {name: self._encoder_keys(h, pair, which)}
            hidden = call._run(sublayer, hidden, given)
        return join(hidden)

    def _encoder_keys(self, h: Tensor, pair: Any, which: Tensor) -> Any:
        """Return the keys and values of an encoder for some rows, as a cache; they are first stored for all rows."""
        if not pair.is_updated.get(self.index):
            given = self.kwargs | {self.architecture.cache: _OfEncoder(pair)}
            try:
                self.architecture["cross"].run(self.layer, h, given)
            except _Stored:
                pair.is_updated[self.index] = True
        return _OfEncoder(pair, self.index, which)

    def tokens(self, which: Tensor, positions: PositionInputs | None = None) -> LayerCall:
        """Return the same layer for some tokens of each row, which see one another and what such calls stored before.

        :meth:`gather` returns its input; :meth:`scatter` puts its result at the positions of these tokens. In a step
        execution the layer must be among the policy's ``sparse`` ones, whose slots then hold these tokens only.

        Args:
            which: the tokens [rows, time] bool, none of them padding.
            positions: position inputs of the stack, if tokens move up to the positions that the others leave free; None
                if they keep their positions.
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
        """Return the same layer with tokens that see only their own group, in a model with bidirectional attention.

        Groups that all run are computed in one pass this way, instead of one pass per group with :meth:`tokens`.

        Args:
            groups: group index of each token [rows, time].
            dtype: dtype of the hidden states.
        """
        assert not self.architecture.causal and self.some is None
        seen, mask = groups[:, None, :, None] == groups[:, None, None, :], self.kwargs.get("attention_mask")
        seen = seen if mask is None else seen & visible(mask)
        return replace(self, kwargs=self.kwargs | {"attention_mask": additive(seen, dtype)})

    def moved(self, positions: PositionInputs, at: Tensor) -> LayerCall:
        """Return the same call with its tokens at other positions.

        Args:
            positions: position inputs of the stack.
            at: position of every token of the pass [rows, time].
        """
        at = at if self.some is None else at.gather(1, self.some.index)
        return replace(self, kwargs=self.kwargs | positions(self.index, at))

    def gather(self, h: Tensor) -> Tensor:
        """Return the hidden states of the tokens of this call [rows, time, hidden] -> [rows, most, hidden]."""
        return h if self.some is None else self.some.gather(h)

    def scatter(self, h: Tensor, out: Tensor) -> Tensor:
        """Return the hidden states [rows, time, hidden] with ``out`` [rows, most, hidden] at this call's tokens.

        Args:
            h: hidden states of all tokens.
            out: hidden states of this call's tokens.
        """
        return out if self.some is None else self.some.scatter(h, out)

    def _of_rows(self, value: Tensor | None) -> Tensor | None:
        """Return the entries of the rows of this call from a tensor with all rows."""
        return value if value is None or self.who is None else value[self.who.to(value.device)]

    def _stored(self) -> Tensor:
        """Return the number of tokens of each row in the layer's slot [rows, 1]; zero in a parallel execution."""
        slot = None if self.run.cache is None else self.run.cache.sparse(self.index)
        if slot is None:
            return torch.zeros(1, 1, dtype=torch.long, device=self.run.device)
        held = slot.columns >= 0
        if self.run.padding is not None:
            held &= ~self.run.padding.gather(1, slot.columns.clamp(min=0))
        return held.sum(dim=1, keepdim=True)

    def _may_stay(self, positions: PositionInputs | None) -> bool:
        """Return whether tokens also keep their positions if none of them is skipped."""
        return positions is None or (self.run.padding is None and bool((self._stored() == self.run.phase.start).all()))

    def _run(self, sublayer: Sublayer, hidden: Hidden, given: dict[str, Any]) -> Hidden:
        if sublayer.name not in self.runs:
            return hidden
        self._note_run(sublayer.name)
        return sublayer.run(self.layer, hidden, given)

    def _restricted(self, h: Tensor, keys: Tensor) -> dict[str, Any]:
        """Return the arguments of an attention over whole sequences that restrict the visible keys."""
        mask, causal = self.kwargs.get("attention_mask"), self.architecture.causal
        return self.kwargs | {"attention_mask": restricted(mask, keys, h.dtype, causal)}

    def _among(self, some: Gathering, h: Tensor) -> Hidden:
        """Return the output of the attention among gathered tokens [rows, most, hidden]."""
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
        assert slot is not None, "only the policy's sparse layers gather tokens"
        both, window = torch.cat([slot.columns, columns], dim=1), cache.window(self.index)
        sees_all = h.shape[1] == 1 and window is None and not slot.ragged and bool(some.held.all())
        sees_all = sees_all and self.run.padding is None
        seen = None if sees_all else stored_mask(both, None, h.shape[1], self.run.padding, window, dtype)
        given = {"attention_mask": seen, self.architecture.cache: _Columns(cache, both)}
        out = self._run(attn, h, self.kwargs | given)
        slot.keep(some.held)
        return out

    def _everywhere(self, h: Tensor) -> tuple[dict[str, Any], Tensor]:
        """Return the arguments of a bidirectional attention, and the column of each of its keys [rows, keys]."""
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
        """Return the mask of tokens that see all of these columns [rows, keys]; None if all of them are tokens."""
        seen = columns >= 0
        padding = self._of_rows(self.run.padding)
        if padding is not None:
            seen = seen & ~padding.gather(1, columns.clamp(min=0))
        return None if seen.all() else additive(seen[:, None, None].expand(-1, 1, h.shape[1], -1), h.dtype)

    def _over(self, slot: SparseSlot, h: Tensor, keys: Tensor | None) -> dict[str, Any]:
        """Return the arguments of an attention that attends to the contents of a sparse slot."""
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

    def _note_run(self, sublayer: str, tokens: Tensor | None = None) -> None:
        if self.some is not None:
            tokens = self.some.which
        if self.run.trace is not None:
            self.run.trace.note_run(self.index, sublayer, self.who, tokens)


class _Stored(Exception):
    """Raised when keys and values are stored, because the rest of the attention is not needed."""


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
    """A cache for an attention that runs for some rows, which also stores the keys and values of the others.

    Attributes:
        cache: cache of all rows.
        which: indices of the rows that run.
        others: indices of the rows that do not.
        other_keys: keys and values of the others, if there are any.
    """

    cache: PlanCache
    which: Tensor
    others: Tensor
    other_keys: tuple[Tensor, Tensor] | None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.other_keys is not None:
            order = torch.cat([self.which, self.others]).argsort()
            keys, values = (torch.cat(pair)[order] for pair in zip((keys, values), self.other_keys, strict=True))
        all_keys, all_values = self.cache.update(keys, values, layer_idx)
        return all_keys[self.which], all_values[self.which]


class _OfEncoder(EncoderDecoderCache):
    """The encoder's part of a pair of caches.

    Without rows it ends an attention as soon as the encoder's keys and values are stored in the pair; with some, it
    passes on what is stored for these.
    """

    def __init__(self, pair: EncoderDecoderCache, layer: int | None = None, which: Tensor | None = None) -> None:
        self.self_attention_cache = pair.self_attention_cache
        self.is_updated: dict[int, bool] = {}
        stored: Any = pair.cross_attention_cache
        passed: Any = _KeysOnly(stored)
        if layer is not None:
            held = stored.layers[layer]
            passed = SimpleNamespace(layers={layer: SimpleNamespace(keys=held.keys[which], values=held.values[which])})
            self.is_updated[layer] = True
        self.cross_attention_cache = passed


@dataclass
class _Columns:
    """A cache in whose sparse slot the next keys and values belong to columns that need not be consecutive."""

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
    """Return T5's position bias by column [1, heads, queries, columns] for the entries of each row [rows, stored]."""
    heads, queries = bias.shape[1:3]
    positions = columns.clamp(min=0)[:, None, None].expand(-1, heads, queries, -1)
    return bias.expand(len(columns), -1, -1, -1).gather(-1, positions)


def _gather(value: Any, rows: Tensor, batch: int) -> Any:
    """Return the rows of every argument with one entry per row."""
    if isinstance(value, tuple):
        return tuple(_gather(each, rows, batch) for each in value)
    if isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] == batch > 1:
        return value[rows.to(value.device)]
    return value
