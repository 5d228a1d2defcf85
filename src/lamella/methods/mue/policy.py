"""The exits: where a modality in the encoder, or a token in the decoder, runs no further layers.

    S_e = cos(h_{e-1}, h_e)     saturation; h_0 is the input of the first layer
    exit at the first e with S_e > tau, e >= min_layer

In the encoder, each modality m attends to its own tokens only, has its own tau_m, and h are all its tokens of a row. In
the decoder, h is the hidden state of one token. After an exit the state is kept; in deeper layers of the decoder keys
and values are computed from it (``state``), or later tokens do not attend to it there (``none``).
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
OFF = 2.0  # above any cosine, even one that is rounded up
NEARLY_0 = 1e-8  # lower bound of norms, against division by 0
Reduce = Literal["flat", "mean", "min"]
Propagate = Literal["state", "none"]


class ModalityExits(Policy):
    """An encoder that processes its modalities separately, each up to its own exit.

    Args:
        stack: the encoder, of N layers.
        image: tau of image tokens; above 1 they never exit.
        text: tau of text tokens; above 1 they never exit.
        reduce: saturation of a modality: the cosine over all its tokens at once (``flat``, as in the authors' code), or
            the ``mean`` or the ``min`` of the cosines of its tokens.
        min_layer: number of layers that always run; 1 in the paper.

    Attributes:
        exits: of the last pass, the number of layers that each row has run, by modality [batch]; 0 without such tokens.
        cosines: of the last pass, S by modality [batch, N], NaN where the layer did not run.
        fixed_exits: exits to use instead of the thresholds, by modality: a layer, or one for each row [batch].

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
        self.cosines: dict[str, Tensor] = {}
        self.fixed_exits: Mapping[str, int | Tensor] | None = None

    def token_masks(self, run: Pass) -> dict[str, Tensor]:
        """Return the mask of each modality's tokens: [batch, time] bool."""
        real = torch.ones(run.batch, run.phase.end, dtype=torch.bool, device=run.device)
        real = real if run.real is None else run.real
        images = torch.zeros_like(real) if run.images is None else run.images
        return {"image": real & images, "text": real & ~images}

    def begin(self, run: Pass) -> None:
        """Reset the exits and cosines, and mark all rows of each modality as active."""
        masks = run.memory["masks"] = self.token_masks(run)
        run.memory["groups"] = torch.stack([*masks.values()]).long().argmax(0)
        run.memory["active"] = {name: which.any(1) for name, which in masks.items()}
        self.exits = {name: which.any(1).long() * self.layers for name, which in masks.items()}
        self.cosines = {name: torch.full((run.batch, self.layers), torch.nan, dtype=torch.double) for name in masks}

    def layer(self, call: LayerCall, h: Tensor, run: Pass) -> Tensor:
        """Run a layer for the modalities that have not exited, each of which attends to its own tokens only.

        Args:
            call: the layer.
            h: hidden states before it `[batch, time, hidden]`.
            run: the pass.
        """
        masks: dict[str, Tensor] = run.memory["masks"]
        active = {name: each for name, each in run.memory["active"].items() if each.any()}
        recorded = torch.full(h.shape[:2], torch.nan, dtype=torch.double)
        together = len(active) > 1 and all(torch.equal(each, masks[name].any(1)) for name, each in active.items())
        if together:  # no row has exited: one pass in which each modality attends to itself
            out = call.apart(run.memory["groups"], h.dtype)(h)
            tokens, h = by_token(h, out), out
        for name, each in active.items():
            rows, which = each.nonzero().flatten(), masks[name]
            if together:
                s = saturation(tuple(part[rows] for part in tokens), which[rows], self.reduce)
            else:
                h, s = self._run_layer(call, h, rows, which[rows])
            self._exit(name, call.index, rows, s, run)
            if run.trace is not None:
                recorded = torch.where(which.cpu(), self.cosines[name][:, call.index, None], recorded)
        run.note("cosine", call.index, recorded)
        return h

    def _run_layer(self, call: LayerCall, h: Tensor, rows: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        """Run a layer for some tokens of some rows.

        Args:
            call: the layer.
            h: hidden states of all rows [batch, time, d].
            rows: indices of the rows that run.
            which: tokens of these rows that run [rows, time] bool.

        Returns:
            The hidden states after the layer [batch, time, d], and S of the rows [rows].
        """
        some = (call if len(rows) == len(h) else call.rows(rows)).tokens(which)
        of_rows = h if len(rows) == len(h) else h[rows]
        before = some.gather(of_rows)
        after = some(before)
        s = saturation(by_token(before, after), which if some.some is None else some.some.held, self.reduce)
        out = some.scatter(of_rows, after)
        return out if len(rows) == len(h) else h.index_copy(0, rows, out), s

    def _exit(self, name: str, layer: int, rows: Tensor, s: Tensor, run: Pass) -> None:
        """Let rows of a modality exit after a layer, by their S [rows]."""
        self.cosines[name][rows.cpu(), layer] = s.detach().double().cpu()
        done = self._has_exited(name, layer + 1, rows) if self.fixed_exits is not None else s > self.tau[name]
        if layer + 1 >= self.min_layer and done.any():
            self.exits[name][rows[done]] = layer + 1
            run.memory["active"][name][rows[done]] = False

    def _has_exited(self, name: str, e: int, rows: Tensor) -> Tensor:
        assert self.fixed_exits is not None
        at = self.fixed_exits.get(name, self.layers)
        return e >= at[rows] if isinstance(at, Tensor) else torch.full_like(rows, e >= at, dtype=torch.bool)


class TokenExits(Policy):
    """A decoder in which each token exits at its own layer.

    Args:
        stack: the decoder, of N layers.
        threshold: tau; above 1 no token exits.
        decay: (beta, tau') of a threshold that falls with the decoding step, see :func:`decayed`; constant if None.
        steps: N of the decay, the maximum number of generated tokens.
        propagate: keys and values of an exited token in the layers that it did not run: computed from its ``state``
            (Lamella's, as in CALM), or ``none``, as in the authors' code.
        min_layer: number of layers that always run; 1 in the paper.

    Attributes:
        exits: of the last pass, the number of layers that each token has run [batch, time].
        cosines: of the last parallel execution, S of each token [batch, time, N], NaN where the layer did not run.
        active: whether a step execution looks for exits at all.
        fixed_exits: exits of a parallel execution to use instead of the threshold [batch, time].
        recorded_hidden: if set, a list to which each layer appends its hidden states [batch, time, d].

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
        self.active = self.threshold <= 1
        if decay is not None and not (0 <= decay[0] <= 1 and decay[1] >= 0 and steps is not None and steps > 0):
            raise MethodError("mue: decay is beta from 0 to 1 and tau' of at least 0, with steps of at least 1")
        if propagate not in ("state", "none"):
            raise MethodError(f"mue: propagate is state or none, not {propagate}")
        self.decay, self.steps, self.propagate = decay, steps, propagate
        self.min_layer = check_layer(min_layer, self.layers)
        if propagate == "none":
            self.sparse = frozenset(range(self.min_layer, self.layers))
        self.exits = torch.zeros(0, 0, dtype=torch.long)
        self.cosines = torch.zeros(0, 0, self.layers)
        self.fixed_exits: Tensor | None = None
        self.recorded_hidden: list[Tensor] | None = None

    def begin(self, run: Pass) -> None:
        """Reset the exits and cosines, and mark all real tokens as active."""
        time = run.phase.end - run.phase.start
        active = torch.ones(run.batch, time, dtype=torch.bool, device=run.device)
        run.memory["active"] = active if run.real is None else run.real.clone()
        run.memory["tau"] = self.tau(run.phase.order(run.device))
        self.exits = run.memory["active"].long() * self.layers
        if run.cache is None:
            self.cosines = torch.full((run.batch, time, self.layers), torch.nan, device=run.device, dtype=torch.double)

    def tau(self, t: Tensor) -> Tensor:
        """Return the threshold of each step; t is 0 in a prompt, whose last token predicts the first generated one."""
        if self.decay is None or self.threshold > 1:
            return torch.full(t.shape, self.threshold, device=t.device, dtype=torch.double)
        assert self.steps is not None
        return decayed(self.threshold, t, *self.decay, self.steps)

    def layer(self, call: LayerCall, h: Tensor, run: Pass) -> Tensor:
        """Run a layer for the tokens that have not exited.

        Args:
            call: the layer.
            h: hidden states before it `[batch, time, hidden]`.
            run: the pass.
        """
        active: Tensor = run.memory["active"]
        if not active.any():
            if self.propagate == "state":
                call.store_keys(h)
            out = h
        else:
            out = self._run_layer(call, h, active, run)
            e = call.index + 1
            if run.cache is None or (self.active and e < self.layers):
                self._exit(e, call, h, out, run)
        if self.recorded_hidden is not None:
            self.recorded_hidden.append(out)
        return out

    def _exit(self, e: int, call: LayerCall, h: Tensor, out: Tensor, run: Pass) -> None:
        """Let tokens exit after layer e; a parallel execution also records their S."""
        active, s = run.memory["active"], cosines(h, out)
        if run.cache is None:
            self.cosines[..., call.index] = s.detach().double().masked_fill(~active, torch.nan)
        if run.trace is not None:
            run.note("cosine", call.index, s.masked_fill(~active, torch.nan))
        done = self.finished(call, h, out, s, run) if self.fixed_exits is None else e >= self.fixed_exits
        if e >= self.min_layer and (done := done & active).any():
            self.exits[done] = e
            run.memory["active"] = active & ~done

    def finished(self, call: LayerCall, h: Tensor, out: Tensor, s: Tensor, run: Pass) -> Tensor:
        """Return which tokens exit after a layer: [batch, time] bool.

        Args:
            call: the layer.
            h: hidden states before it [batch, time, d].
            out: hidden states after it [batch, time, d].
            s: saturation of each token [batch, time].
            run: the pass.
        """
        return s > run.memory["tau"]

    def _run_layer(self, call: LayerCall, h: Tensor, active: Tensor, run: Pass) -> Tensor:
        """Return the hidden states after a layer that only the active tokens run."""
        if active.all() or (run.real is not None and bool((active | ~run.real).all())):
            return call(h)
        if run.cache is not None and h.shape[1] == 1 and self.propagate == "state":
            rows = active[:, 0].nonzero().flatten()
            return h.index_copy(0, rows, call.run_rows(h, rows))
        keys = active if call.index in self.sparse else None
        return run.choose(call, ~active, h, call(h, keys=keys))


def by_token(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the dot product of each token's states before and after a layer, and both norms: [rows, tokens] each.

    Args:
        before: hidden states at the input of the layer `[rows, tokens, hidden]`.
        after: hidden states at its output, of the same shape.
    """
    before, after = _wide(before), _wide(after)
    return (before * after).sum(-1), before.norm(dim=-1), after.norm(dim=-1)


def saturation(tokens: tuple[Tensor, ...], held: Tensor, reduce: Reduce = "flat") -> Tensor:
    """Return S of each row: the similarity of its hidden states before and after a layer [rows].

    ``flat`` is sum_i w_i cos_i with w_i = |h_i| |h'_i| / (|h| |h'|), so tokens of large norm weigh most.

    Args:
        tokens: dot products and norms of each token, see :func:`by_token`.
        held: which of the tokens count [rows, tokens] bool.
        reduce: see :class:`ModalityExits`.
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
    """Return S of each token: [batch, time, d] -> [batch, time].

    Args:
        before: hidden states at the input of a layer `[batch, time, d]`.
        after: hidden states at its output, of the same shape.
    """
    return torch.cosine_similarity(_wide(before), _wide(after), dim=-1)


def _wide(h: Tensor) -> Tensor:
    return h.to(torch.promote_types(h.dtype, torch.float32))


def decayed(theta: float, t: Tensor, beta: float, rate: float, steps: int) -> Tensor:
    """Return tau_t = clip(beta theta + (1 - beta) exp(-tau' t / N), 0, 1).

    Thresholds are higher at first, since early errors spread.

    Args:
        theta: the threshold.
        t: the decoding step, from 0.
        beta: 0.95 in the paper, with a theta of 0.99.
        rate: tau', 1 in the paper.
        steps: N, the maximum number of steps.

    >>> decayed(0.5, torch.tensor([0, 10]), 0.9, 1.0, 10)
    tensor([0.5500, 0.4868], dtype=torch.float64)
    """
    return (beta * theta + (1 - beta) * torch.exp(-rate * t.double() / steps)).clamp(0, 1)


def check_threshold(name: str, value: float) -> float:
    """Return a threshold on cosines as a float.

    Args:
        name: name of the option, for the message.
        value: the threshold: -1 to 1, or OFF for no exit.

    Raises:
        MethodError: when it is out of range.
    """
    if not -OFF <= value <= OFF:
        raise MethodError(f"mue: {name} {value} is a threshold on cosines: give -1 to 1, or {OFF:g} for no exit")
    return float(value)


def check_layer(layer: int, layers: int) -> int:
    """Return a number of layers that always run.

    Args:
        layer: number of layers that always run, from the first.
        layers: number of layers of the stack.

    Raises:
        MethodError: unless it is 1 to ``layers``.
    """
    if not 1 <= layer <= layers:
        raise MethodError(f"mue: min_layer {layer} is out of range: give 1 to {layers}, the number of layers")
    return layer
