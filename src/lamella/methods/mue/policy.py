"""The exits: where a stream of the encoder, or a token of the decoder, runs no further layers.

    S_e = cos(h_{e-1}, h_e)     saturation; h_0 is what enters the first layer
    exit at the first e with S_e > tau, e >= min_layer

Encoder, for each modality m by itself: its tokens see no others, tau_m is its own, h are all of its tokens of one row.
Decoder, for each token: h is that token's stream. Whoever has left keeps its state; in deeper layers of the decoder
keys and values are made from it (``state``), or later tokens do not see it there (``none``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from lamella.errors import MethodError
from lamella.runtime import LayerCall, Pass, Policy
from lamella.stack import Stack

MODALITIES = ("image", "text")
OFF = 2.0  # above any cosine, also one that was rounded up
NEARLY_0 = 1e-8  # in place of the lengths of streams that are nothing
Reduce = Literal["flat", "mean", "min"]
Propagate = Literal["state", "none"]


class StreamExits(Policy):
    """An encoder whose modalities run apart, each to an exit of its own.

    Args:
        stack: the encoder, of N layers.
        image, text: tau of each modality; above 1 it never exits.
        reduce: what S of a stream is: the cosine of all of it at once (``flat``, as released), or of the cosines of its
            tokens the ``mean`` or the ``min``.
        min_layer: layers that always run; 1 in the paper.

    Attributes:
        exits: of the last pass, how many layers each row has run, by modality [batch]; 0 without such tokens.
        seen: of the last pass, S by modality [batch, N], NaN where the layer did not run.
        leaves: exits that are given and not found, by modality: a number, or one for each row [batch].

    Raises:
        MethodError: for settings out of range.
    """

    encodes = True

    def __init__(
        self, stack: Stack, *, image: float = OFF, text: float = OFF, reduce: Reduce = "flat", min_layer: int = 1
    ) -> None:
        super().__init__(stack)
        self.tau = {"image": check_threshold("image", image), "text": check_threshold("text", text)}
        if reduce not in ("flat", "mean", "min"):
            raise MethodError(f"mue: reduce is flat, mean or min, not {reduce}")
        self.reduce: Reduce = reduce
        self.min_layer = check_layer(min_layer, self.layers)
        self.exits: dict[str, Tensor] = {}
        self.seen: dict[str, Tensor] = {}
        self.leaves: Mapping[str, int | Tensor] | None = None

    def streams(self, run: Pass) -> dict[str, Tensor]:
        """Which tokens belong together, by modality [batch, time] bool."""
        real = torch.ones(run.batch, run.phase.end, dtype=torch.bool, device=run.device)
        real = real if run.real is None else run.real
        images = torch.zeros_like(real) if run.images is None else run.images
        return {"image": real & images, "text": real & ~images}

    def begin(self, run: Pass) -> None:
        streams = run.memory["streams"] = self.streams(run)
        run.memory["groups"] = torch.stack([*streams.values()]).long().argmax(0)
        run.memory["active"] = {name: which.any(1) for name, which in streams.items()}
        self.exits = {name: which.any(1).long() * self.layers for name, which in streams.items()}
        self.seen = {name: torch.full((run.batch, self.layers), torch.nan, dtype=torch.double) for name in streams}

    def layer(self, call: LayerCall, h: Tensor, run: Pass) -> Tensor:
        streams: dict[str, Tensor] = run.memory["streams"]
        active = {name: each for name, each in run.memory["active"].items() if each.any()}
        noted = torch.full(h.shape[:2], torch.nan, dtype=torch.double)
        together = len(active) > 1 and all(torch.equal(each, streams[name].any(1)) for name, each in active.items())
        if together:  # nobody has left: one pass, in which each stream sees itself
            out = call.apart(run.memory["groups"], h.dtype)(h)
            tokens, h = by_token(h, out), out
        for name, each in active.items():
            rows, which = each.nonzero().flatten(), streams[name]
            if together:
                s = saturation(tuple(part[rows] for part in tokens), which[rows], self.reduce)
            else:
                h, s = self._advanced(call, h, rows, which[rows])
            self._leave(name, call.index, rows, s, run)
            if run.trace is not None:
                noted = torch.where(which.cpu(), self.seen[name][:, call.index, None], noted)
        run.note("cosine", call.index, noted)
        return h

    def _advanced(self, call: LayerCall, h: Tensor, rows: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        """The stream [batch, time, d] after a layer for some tokens of some rows [rows, time], and their S [rows]."""
        some = (call if len(rows) == len(h) else call.rows(rows)).tokens(which)
        of_rows = h if len(rows) == len(h) else h[rows]
        before = some.gather(of_rows)
        after = some(before)
        s = saturation(by_token(before, after), which if some.some is None else some.some.held, self.reduce)
        out = some.scatter(of_rows, after)
        return out if len(rows) == len(h) else h.index_copy(0, rows, out), s

    def _leave(self, name: str, layer: int, rows: Tensor, s: Tensor, run: Pass) -> None:
        """Let rows [rows] of a modality leave behind a layer, by their S."""
        self.seen[name][rows.cpu(), layer] = s.detach().double().cpu()
        done = self._left(name, layer + 1, rows) if self.leaves is not None else s > self.tau[name]
        if layer + 1 >= self.min_layer and done.any():
            self.exits[name][rows[done]] = layer + 1
            run.memory["active"][name][rows[done]] = False

    def _left(self, name: str, e: int, rows: Tensor) -> Tensor:
        assert self.leaves is not None
        at = self.leaves.get(name, self.layers)
        return e >= at[rows] if isinstance(at, Tensor) else torch.full_like(rows, e >= at, dtype=torch.bool)


class TokenExits(Policy):
    """A decoder whose tokens leave it each at a layer of its own.

    Args:
        stack: the decoder, of N layers.
        threshold: tau; above 1 no token exits.
        decay: (beta, tau') of a threshold that falls from step to step, see :func:`decayed`; it stays when left out.
        steps: N of the decay, the most tokens that are generated.
        propagate: what later tokens see of one that has left, in the layers that it did not run: keys and values made
            from its ``state`` (ours, as in CALM), or ``none``, as in the released code.
        min_layer: layers that always run; 1 in the paper.

    Attributes:
        exits: of the last pass, how many layers each token has run [batch, time].
        seen: of the last parallel execution, S of each token [batch, time, N], NaN where the layer did not run.
        watches: whether a step execution looks for exits at all.
        leaves: exits that are given and not found [batch, time], of a parallel execution.
        heard: a list that takes the stream after each layer [batch, time, d].

    Raises:
        MethodError: for settings out of range.
    """

    crosses = True

    def __init__(
        self,
        stack: Stack,
        *,
        threshold: float = OFF,
        decay: tuple[float, float] | None = None,
        steps: int | None = None,
        propagate: Propagate = "state",
        min_layer: int = 1,
    ) -> None:
        super().__init__(stack)
        self.threshold = check_threshold("threshold", threshold)
        self.watches = self.threshold <= 1
        if decay is not None and not (0 <= decay[0] <= 1 and decay[1] >= 0 and steps is not None and steps > 0):
            raise MethodError("mue: decay is beta from 0 to 1 and tau' of at least 0, with steps of at least 1")
        if propagate not in ("state", "none"):
            raise MethodError(f"mue: propagate is state or none, not {propagate}")
        self.decay, self.steps, self.propagate = decay, steps, propagate
        self.min_layer = check_layer(min_layer, self.layers)
        if propagate == "none":
            self.sparse = frozenset(range(self.min_layer, self.layers))
        self.exits = torch.zeros(0, 0, dtype=torch.long)
        self.seen = torch.zeros(0, 0, self.layers)
        self.leaves: Tensor | None = None
        self.heard: list[Tensor] | None = None

    def begin(self, run: Pass) -> None:
        time = run.phase.end - run.phase.start
        active = torch.ones(run.batch, time, dtype=torch.bool, device=run.device)
        run.memory["active"] = active if run.real is None else run.real.clone()
        run.memory["tau"] = self.tau(run.phase.order(run.device))
        self.exits = run.memory["active"].long() * self.layers
        if run.cache is None:
            self.seen = torch.full((run.batch, time, self.layers), torch.nan, device=run.device, dtype=torch.double)

    def tau(self, t: Tensor) -> Tensor:
        """The threshold of each step; of a prompt, whose last token writes the first one, t is 0."""
        if self.decay is None or self.threshold > 1:
            return torch.full(t.shape, self.threshold, device=t.device, dtype=torch.double)
        assert self.steps is not None
        return decayed(self.threshold, t, *self.decay, self.steps)

    def layer(self, call: LayerCall, h: Tensor, run: Pass) -> Tensor:
        active: Tensor = run.memory["active"]
        if not active.any():
            if self.propagate == "state":
                call.store_keys(h)
            out = h
        else:
            out = self._advanced(call, h, active, run)
            e = call.index + 1
            if run.cache is None or (self.watches and e < self.layers):
                self._leave(e, call, h, out, run)
        if self.heard is not None:
            self.heard.append(out)
        return out

    def _leave(self, e: int, call: LayerCall, h: Tensor, out: Tensor, run: Pass) -> None:
        """Let tokens leave behind layer e; a parallel execution also keeps their S."""
        active, s = run.memory["active"], cosines(h, out)
        if run.cache is None:
            self.seen[..., call.index] = s.detach().double().masked_fill(~active, torch.nan)
        if run.trace is not None:
            run.note("cosine", call.index, s.masked_fill(~active, torch.nan))
        done = self.finished(call, h, out, s, run) if self.leaves is None else e >= self.leaves
        if e >= self.min_layer and (done := done & active).any():
            self.exits[done] = e
            run.memory["active"] = active & ~done

    def finished(self, call: LayerCall, h: Tensor, out: Tensor, s: Tensor, run: Pass) -> Tensor:
        """Which tokens leave behind a layer [batch, time] bool, by their stream before and after it and their S."""
        return s > run.memory["tau"]

    def _advanced(self, call: LayerCall, h: Tensor, active: Tensor, run: Pass) -> Tensor:
        """The stream after a layer that some tokens run."""
        if active.all() or (run.real is not None and bool((active | ~run.real).all())):
            return call(h)
        if run.cache is not None and h.shape[1] == 1 and self.propagate == "state":
            rows = active[:, 0].nonzero().flatten()
            return h.index_copy(0, rows, call.run_rows(h, rows))
        keys = active if call.index in self.sparse else None
        return run.choose(call, ~active, h, call(h, keys=keys))


def by_token(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the cosines of streams are made of: of each token the product of both, and their lengths [rows, tokens]."""
    before, after = _wide(before), _wide(after)
    return (before * after).sum(-1), before.norm(dim=-1), after.norm(dim=-1)


def saturation(tokens: tuple[Tensor, ...], held: Tensor, reduce: Reduce = "flat") -> Tensor:
    """S of streams: how alike their tokens are before and after a layer [rows].

    ``flat`` is sum_i w_i cos_i with w_i = |h_i| |h'_i| / (|h| |h'|), so tokens of large norm weigh most.

    Args:
        tokens: of each, see :func:`by_token`.
        held: which of the tokens count [rows, tokens] bool.
        reduce: see :class:`StreamExits`.
    """
    product, own, other = tokens
    if reduce == "flat":
        lengths = (each.masked_fill(~held, 0).norm(dim=1) for each in (own, other))
        return product.masked_fill(~held, 0).sum(1) / math.prod(lengths).clamp_min(NEARLY_0)
    each = product / (own * other).clamp_min(NEARLY_0)
    if reduce == "min":
        return each.masked_fill(~held, math.inf).amin(1)
    return each.masked_fill(~held, 0).sum(1) / held.sum(1)


def cosines(before: Tensor, after: Tensor) -> Tensor:
    """S of tokens, each by itself [batch, time, d] -> [batch, time]."""
    return torch.cosine_similarity(_wide(before), _wide(after), dim=-1)


def _wide(h: Tensor) -> Tensor:
    return h.to(torch.promote_types(h.dtype, torch.float32))


def decayed(theta: float, t: Tensor, beta: float, rate: float, steps: int) -> Tensor:
    """tau_t = clip(beta theta + (1 - beta) exp(-tau' t / N), 0, 1): late exits first, since early errors spread.

    Args:
        theta: the threshold.
        t: the step, from 0 on.
        beta, rate: in the paper 0.95 and 1, beside a theta of 0.99.
        steps: N, the most steps.

    >>> decayed(0.5, torch.tensor([0, 10]), 0.9, 1.0, 10)
    tensor([0.5500, 0.4868], dtype=torch.float64)
    """
    return (beta * theta + (1 - beta) * torch.exp(-rate * t.double() / steps)).clamp(0, 1)


def check_threshold(name: str, value: float) -> float:
    """A threshold, which is compared with cosines.

    Raises:
        MethodError: for one that is none.
    """
    if not -OFF <= value <= OFF:
        raise MethodError(f"mue: {name} {value} is compared with cosines: give -1 to 1, or {OFF:g} for no exit")
    return float(value)


def check_layer(layer: int, layers: int) -> int:
    """A number of layers that always run.

    Raises:
        MethodError: for more than there are, or none.
    """
    if not 1 <= layer <= layers:
        raise MethodError(f"mue: min_layer {layer} is to be 1 to {layers}, the layers of the stack")
    return layer
