"""Mixture of depths with one router: which tokens a converted layer processes, in training and in serving.

    z = R(norm_l(X))          R [2, d], one for all converted layers and both modalities
    p = softmax(z)[..., 1]    probability that the token is processed
    I                         the processed tokens, in order: the best ones in training, p > threshold in serving;
                              both compare z_1 - z_0, which also distinguishes tokens with p near 1
    U = X[I] + Attn_l(X[I])                  causal among I, with new position ids
    Y = X, but at I:  U + p_I * MLP_l(U)     only the MLP passes the task's gradient to the router

Training selects the best tokens of the whole sequence, which depends on later tokens; this execution is never measured.
Serving compares each token with a threshold, and a loss trains the router to predict its own selection.
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
KEEPS = 20.0  # a logit at which p is 1 in float32
SMALL = 0.01  # scale of the router with ``start="keep"``: a zero router could not rank tokens
Thresholds = float | Sequence[float]


class MixtureOfDepths(Policy):
    """Layers that process some tokens and let the others skip.

    Args:
        stack: the model of hidden size d.
        layers: the converted layers.
        prefill: a prompt token is processed if p is above this; one value, or one for each of ``layers``. 0.005 is the
            authors' constant; a calibrated value keeps the same fraction as training.
        decode: the same for generated tokens; the authors' constant is 0.5. -1 processes all.
        positions: ``compact`` assigns new position ids to the processed tokens in each layer, as released; ``original``
            keeps theirs.
        start: initialisation of the router: ``random`` as released; ``keep`` (an addition of Lamella) processes every
            token at first.
        routers: one ``shared`` router; for comparison one per ``layer`` (usual mixture of depths) or ``modality``.
        seed: random seed of the router.

    Attributes:
        training_share: rho: fraction of the skippable tokens that skip in training; None: thresholds decide.
        masks: whether tokens after the image are always processed in training.
        text_rows: for rows without an image: ``keep`` processes all tokens in training; ``half`` processes the prompt
            and the best answer tokens, half of all.
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
            raise MethodError(
                f"gamma-mod: there is no layer {wrong[0]}" if wrong else "gamma-mod: give layers to convert"
            )
        if positions not in ("compact", "original") or start not in ("random", "keep"):
            raise MethodError("gamma-mod: positions must be compact or original, and start random or keep")
        if routers not in ("shared", "layer", "modality"):
            raise MethodError(f"gamma-mod: routers must be shared, layer or modality, not {routers}")
        self.index_of = {layer: index for index, layer in enumerate(sorted(set(layers)))}
        self.sparse = frozenset(self.index_of)
        self.routers = routers
        self.thresholds = [_each(prefill, len(self.index_of), "prefill"), _each(decode, len(self.index_of), "decode")]
        self.norms = {layer: _norm(stack, layer) for layer in self.index_of}
        self.position_inputs = PositionInputs(stack) if positions == "compact" else None
        count = {"shared": 1, "layer": len(self.index_of), "modality": 2}[routers]
        d = stack.config.hidden_size
        weights = torch.randn(count, 2, d, generator=torch.Generator().manual_seed(seed)) / d**0.5
        self.router = nn.Parameter((weights if start == "random" else SMALL * weights).to(stack.device))
        self.bias = KEEPS if start == "keep" else 0.0
        self.training_share: float | None = None
        self.masks = True
        self.text_rows: Literal["keep", "half"] = "keep"
        self.router_loss = torch.zeros(())

    def begin(self, run: Pass) -> None:
        """Start to collect the router losses."""
        run.memory["router"] = []

    def end(self, run: Pass) -> None:
        """Sum the router losses of a parallel execution."""
        if run.cache is None:
            self.router_loss = torch.stack(run.memory["router"]).sum()

    def layer(self, call: LayerCall, h: Tensor, run: Pass) -> Tensor:
        """Run a layer; a converted one only for the selected tokens.

        Args:
            call: the layer.
            h: hidden states before it `[batch, time, hidden]`.
            run: the pass.
        """
        if call.index not in self.index_of:
            return call(h)
        z = self.logits(call, h, run)
        odds = z[..., 1] - z[..., 0]
        p = (odds + self.bias).sigmoid()
        real = torch.ones_like(p, dtype=torch.bool) if run.real is None else run.real
        served = self.training_share is None
        which = (self.served_tokens(call.index, odds, run) if served else self.training_tokens(odds, real, run)) & real
        run.note("p", call.index, p)
        run.note("odds", call.index, odds)
        if run.cache is None:
            biased = z[real] + z.new_tensor([0.0, self.bias])
            run.memory["router"].append(nn.functional.cross_entropy(biased, which[real].long()))
        return self._run_on(call, h, p, which)

    def logits(self, call: LayerCall, h: Tensor, run: Pass) -> Tensor:
        """Return z of every token without the bias, in float32 [batch, time, 2]: skip and process.

        Args:
            call: the layer.
            h: hidden states [batch, time, hidden].
            run: the pass.
        """
        norm = self.norms[call.index]
        read = (h if norm is None else call.layer.get_submodule(norm)(h)).float()
        if self.routers == "modality":
            images = torch.zeros_like(h[..., 0], dtype=torch.long) if run.images is None else run.images.long()
            return (self.router[images] @ read.unsqueeze(-1)).squeeze(-1)
        return read @ self.router[self.index_of[call.index] if self.routers == "layer" else 0].T

    def served_tokens(self, layer: int, odds: Tensor, run: Pass) -> Tensor:
        """Return the tokens processed in serving, by threshold [batch, time] bool.

        Args:
            layer: index of the layer.
            odds: z_1 - z_0 [batch, time].
            run: the pass.
        """
        index = self.index_of[layer]
        prefill, decode = ((each[index].clamp(0, 1).logit() - self.bias).float() for each in self.thresholds)
        return odds > torch.where(run.phase.response(odds.device), decode, prefill)

    def training_tokens(self, odds: Tensor, real: Tensor, run: Pass) -> Tensor:
        """Return the tokens processed in training, the best of each row [batch, time] bool.

        Args:
            odds: z_1 - z_0 [batch, time].
            real: mask of tokens that are not padding [batch, time].
            run: the pass.
        """
        free = self._free(real, run)
        passing = self._skip_count(free, real, run)  # independent of the mask, so that both settings do the same work
        if not self.masks:
            free = free | (real & self._has_image(real, run))
        score = odds.detach().masked_fill(~free, torch.inf).masked_fill(~real, -torch.inf)
        order = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        return order < (real.sum(1, keepdim=True) - passing)

    def _has_image(self, real: Tensor, run: Pass) -> Tensor:
        """Return which rows have an image [batch, 1] bool."""
        return torch.zeros_like(real[:, :1]) if run.images is None else run.images.any(1, keepdim=True)

    def _free(self, real: Tensor, run: Pass) -> Tensor:
        """Return the tokens that may skip: up to the end of the image, or possibly the answer of a text-only row."""
        response = run.phase.response(real.device).expand_as(real)
        images = torch.zeros_like(real) if run.images is None else run.images
        up_to_image = images.flip(1).cumsum(1).flip(1) > 0
        of_text = response if self.text_rows == "half" else torch.zeros_like(real)
        return torch.where(self._has_image(real, run), up_to_image, of_text) & real

    def _skip_count(self, free: Tensor, real: Tensor, run: Pass) -> Tensor:
        """Return the number of tokens that skip in each row [batch, 1]."""
        assert self.training_share is not None
        count = free.sum(1, keepdim=True)
        of_image = (self.training_share * count).floor().long()
        if self.text_rows == "keep":
            return of_image
        return torch.where(self._has_image(real, run), of_image, (real.sum(1, keepdim=True) // 2).minimum(count))

    def _run_on(self, call: LayerCall, h: Tensor, p: Tensor, which: Tensor) -> Tensor:
        if not which.any():
            return h
        some = call.tokens(which, self.position_inputs)
        g = some.attn(some.gather(h))
        u = join(g)
        o = torch.lerp(u, some.mlp(g), some.gather(p.unsqueeze(-1)).to(h.dtype))
        return some.scatter(h, o)


def _norm(stack: Stack, layer: int) -> str | None:
    """Return the norm before the attention; None in post-norm layers, whose attention has no norm before it."""
    try:
        return norm_before(stack, layer)
    except ArchitectureError:
        return None


def _each(threshold: Thresholds, count: int, name: str) -> Tensor:
    """Return one threshold per converted layer."""
    each = [threshold] * count if isinstance(threshold, int | float) else list(threshold)
    if len(each) != count or any(not -1 <= value <= 1 for value in each):
        raise MethodError(f"gamma-mod: {name} must be a value from -1 to 1, or one for each of the {count} layers")
    return torch.tensor(each, dtype=torch.float64)
