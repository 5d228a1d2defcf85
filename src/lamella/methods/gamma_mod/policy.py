"""Mixture of depths with one router: which tokens a converted layer processes, in training and in serving.

    z = R(norm_l(X))          R [2, d], one for all converted layers and both modalities
    p = softmax(z)[..., 1]    the probability that the token is processed
    I                         the processed tokens, in their order: the best ones in training, p > threshold in serving;
                              both by z_1 - z_0, which tells tokens apart also where every p is nearly 1
    U = X[I] + Attn_l(X[I])                  causal among I, positions counted anew
    Y = X, but at I:  U + p_I * MLP_l(U)     only the MLP carries the task's gradient into the router

Training takes the best tokens of the whole sequence, which looks ahead; so it is a third execution, with which nothing
is measured. Serving compares each token with a threshold, and a loss makes the router foresee its own choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lamella.errors import ArchitectureError, MethodError
from lamella.runtime import LayerCall, Pass, Policy, PositionInputs
from lamella.stack import Stack, join, norm_before

Routers = Literal["shared", "layer", "modality"]
KEEPS = 20.0  # of a logit: with it p is 1 in float32
SMALL = 0.01  # of a router beside it: with none at all the first of equal tokens would be the best
Thresholds = float | Sequence[float]


class MixtureOfDepths(Policy):
    """Layers that process some tokens and let the others pass.

    Args:
        stack: the model of hidden size d.
        layers: those that are converted.
        prefill: a token of the prompt is processed where p is above this; one number, or one for each of ``layers``.
            0.005 is the authors' constant; a calibrated one keeps the share that training kept.
        decode: the same for generated tokens; the authors' constant is 0.5. -1 processes all.
        positions: ``compact`` counts the positions of processed tokens anew in each layer, as released; ``original``
            leaves them theirs.
        start: ``random`` as released; ``keep`` (ours) starts with a router that processes every token.
        routers: one that is ``shared``; for comparison one per ``layer`` (the usual mixture of depths) or ``modality``.
        seed: of a random start.

    Attributes:
        training_share: rho: of the tokens that may pass, how many do in training; None: thresholds decide.
        masks: whether in training the tokens behind the image are always processed.
        text_rows: rows without an image: ``keep`` processes all of their tokens in training; ``half`` those of the
            prompt and the best of the answer, half of all.
        router_loss: the loss of the last parallel execution, summed over layers.

    Raises:
        MethodError: for settings out of range.
    """

    def __init__(
        self,
        stack: Stack,
        *,
        layers: Sequence[int],
        prefill: Thresholds = 0.005,
        decode: Thresholds = 0.5,
        positions: Literal["compact", "original"] = "compact",
        start: Literal["random", "keep"] = "random",
        routers: Routers = "shared",
        seed: int = 0,
    ) -> None:
        super().__init__(stack)
        wrong = [layer for layer in layers if not 0 <= layer < len(stack)]
        if wrong or not layers:
            raise MethodError(f"gamma-mod: there is no layer {wrong[0]}" if wrong else "gamma-mod: no layer is chosen")
        if positions not in ("compact", "original") or start not in ("random", "keep"):
            raise MethodError("gamma-mod: positions are compact or original, and start is random or keep")
        if routers not in ("shared", "layer", "modality"):
            raise MethodError(f"gamma-mod: routers is shared, layer or modality, not {routers}")
        self.place = {layer: place for place, layer in enumerate(sorted(set(layers)))}
        self.sparse = frozenset(self.place)
        self.routers = routers
        self.thresholds = [_each(prefill, len(self.place), "prefill"), _each(decode, len(self.place), "decode")]
        self.norms = {layer: _norm(stack, layer) for layer in self.place}
        self.position_inputs = PositionInputs(stack) if positions == "compact" else None
        count = {"shared": 1, "layer": len(self.place), "modality": 2}[routers]
        d = stack.config.hidden_size
        drawn = torch.randn(count, 2, d, generator=torch.Generator().manual_seed(seed)) / d**0.5
        self.router = nn.Parameter((drawn if start == "random" else SMALL * drawn).to(stack.device))
        self.bias = KEEPS if start == "keep" else 0.0
        self.training_share: float | None = None
        self.masks = True
        self.text_rows: Literal["keep", "half"] = "keep"
        self.router_loss = torch.zeros(())

    def begin(self, run: Pass) -> None:
        run.memory["router"] = []

    def end(self, run: Pass) -> None:
        if run.cache is None:
            self.router_loss = torch.stack(run.memory["router"]).sum()

    def layer(self, call: LayerCall, h: Tensor, run: Pass) -> Tensor:
        if call.index not in self.place:
            return call(h)
        z = self.logits(call, h, run)
        odds = z[..., 1] - z[..., 0]
        p = (odds + self.bias).sigmoid()
        real = torch.ones_like(p, dtype=torch.bool) if run.real is None else run.real
        served = self.training_share is None
        which = (self.foreseen(call.index, odds, run) if served else self.best(odds, real, run)) & real
        run.note("p", call.index, p)
        run.note("odds", call.index, odds)
        if run.cache is None:
            biased = z[real] + z.new_tensor([0.0, self.bias])
            run.memory["router"].append(nn.functional.cross_entropy(biased, which[real].long()))
        return self._processed(call, h, p, which)

    def logits(self, call: LayerCall, h: Tensor, run: Pass) -> Tensor:
        """z of every token without the bias, in float32 [batch, time, 2]: to pass, and to be processed."""
        norm = self.norms[call.index]
        read = (h if norm is None else call.layer.get_submodule(norm)(h)).float()
        if self.routers == "modality":
            images = torch.zeros_like(h[..., 0], dtype=torch.long) if run.images is None else run.images.long()
            return (self.router[images] @ read.unsqueeze(-1)).squeeze(-1)
        return read @ self.router[self.place[call.index] if self.routers == "layer" else 0].T

    def foreseen(self, layer: int, odds: Tensor, run: Pass) -> Tensor:
        """Which tokens are processed in serving, where each is compared with a threshold [batch, time] bool."""
        place = self.place[layer]
        prefill, decode = ((each[place].clamp(0, 1).logit() - self.bias).float() for each in self.thresholds)
        return odds > torch.where(run.phase.response(odds.device), decode, prefill)

    def best(self, odds: Tensor, real: Tensor, run: Pass) -> Tensor:
        """Which tokens are processed in training, where the best of each row are [batch, time] bool."""
        free = self._free(real, run)
        passing = self._passing(free, real, run)  # as many without the mask, so that both do the same work
        if not self.masks:
            free = free | (real & self._seeing(real, run))
        score = odds.detach().masked_fill(~free, torch.inf).masked_fill(~real, -torch.inf)
        order = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        return order < (real.sum(1, keepdim=True) - passing)

    def _seeing(self, real: Tensor, run: Pass) -> Tensor:
        """Which rows have an image [batch, 1] bool."""
        return torch.zeros_like(real[:, :1]) if run.images is None else run.images.any(1, keepdim=True)

    def _free(self, real: Tensor, run: Pass) -> Tensor:
        """Which tokens may pass: those up to the end of the image, or in a row without one, if any, the answer's."""
        response = run.phase.response(real.device).expand_as(real)
        images = torch.zeros_like(real) if run.images is None else run.images
        up_to_image = images.flip(1).cumsum(1).flip(1) > 0
        of_text = response if self.text_rows == "half" else torch.zeros_like(real)
        return torch.where(self._seeing(real, run), up_to_image, of_text) & real

    def _passing(self, free: Tensor, real: Tensor, run: Pass) -> Tensor:
        """How many tokens of each row pass [batch, 1]."""
        assert self.training_share is not None
        count = free.sum(1, keepdim=True)
        of_image = (self.training_share * count).floor().long()
        if self.text_rows == "keep":
            return of_image
        return torch.where(self._seeing(real, run), of_image, (real.sum(1, keepdim=True) // 2).minimum(count))

    def _processed(self, call: LayerCall, h: Tensor, p: Tensor, which: Tensor) -> Tensor:
        if not which.any():
            return h
        some = call.tokens(which, self.position_inputs)
        g = some.attn(some.gather(h))
        u = join(g)
        o = torch.lerp(u, some.mlp(g), some.gather(p.unsqueeze(-1)).to(h.dtype))
        return some.scatter(h, o)


def _norm(stack: Stack, layer: int) -> str | None:
    """The norm whose output the attention reads; None in post-norm layers, which read the stream as it is."""
    try:
        return norm_before(stack, layer)
    except ArchitectureError:
        return None


def _each(threshold: Thresholds, count: int, name: str) -> Tensor:
    """One threshold for each converted layer."""
    each = [threshold] * count if isinstance(threshold, int | float) else list(threshold)
    if len(each) != count or any(not -1 <= value <= 1 for value in each):
        raise MethodError(f"gamma-mod: {name} is a number from -1 to 1, or one for each of the {count} layers")
    return torch.tensor(each, dtype=torch.float64)
