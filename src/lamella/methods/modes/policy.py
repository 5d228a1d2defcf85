"""Skip the chosen experts whose router weight, times the importance of their layer to the token's modality, is small.

s_i = alpha[layer, modality] * w_i        w: the router weights with which the model mixes the experts
skip expert i  iff  s_i < tau[modality]   the remaining weights are not normalised again
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from lamella.errors import MethodError
from lamella.runtime import LayerCall, Pass, Policy
from lamella.stack import Stack, join, norm_before

MODALITIES = ("text", "image")
Bypass = Literal["zero", "identity"]


class ExpertSkipping(Policy):
    """Skip experts by importance and thresholds.

    Args:
        stack: the model of L layers, some of them with experts.
        alpha: for ``text`` and ``image`` the importance of each layer [L]; values of layers without experts are
            ignored.
        tau: for ``text`` and ``image`` the threshold; 0 skips nothing.

    Attributes:
        bypass: a layer, a modality whose tokens skip all experts of that layer whatever the thresholds, and their
            output instead: ``zero``, or the input of the experts (``identity``).
        recorded_scores: if set, a list to which each layer of a pass appends the scores of its tokens [tokens, used]
            and a mask of image tokens [tokens].
        counts: of the last pass without a cache, the number of pairs of a token and a chosen expert and of those that
            ran [layers, text and image, chosen and run]; padding is not counted.

    Raises:
        MethodError: for a model without experts, or settings that do not fit.
    """

    def __init__(
        self, stack: Stack, *, alpha: Mapping[str, Sequence[float]], tau: Mapping[str, float] | None = None
    ) -> None:
        super().__init__(stack)
        if stack.experts is None:
            raise MethodError(f"modes: {stack.name} has no experts to skip")
        self.experts = stack.experts
        if set(alpha) != set(MODALITIES) or any(len(each) != len(stack) for each in alpha.values()):
            raise MethodError(
                f"modes: alpha must hold one value for each of {len(stack)} layers, for text and for image"
            )
        tau = {"text": 0.0, "image": 0.0} if tau is None else tau
        if set(tau) != set(MODALITIES) or any(not value >= 0 for value in tau.values()):
            raise MethodError("modes: tau must hold a threshold of at least 0 for text and for image")
        self.alpha = torch.tensor([list(alpha[name]) for name in MODALITIES])
        self.tau = torch.tensor([tau[name] for name in MODALITIES])
        self.bypass: tuple[int, str, Bypass] | None = None
        self.recorded_scores: list[tuple[Tensor, Tensor]] | None = None
        self.counts = torch.zeros(self.layers, 2, 2, dtype=torch.long)
        self._stack = stack
        self._norms: dict[int, str] = {}

    def begin(self, run: Pass) -> None:
        """Reset the counts of a pass."""
        run.memory["counts"] = torch.zeros(self.layers, 2, 2, dtype=torch.long)

    def end(self, run: Pass) -> None:
        """Publish the counts of a pass without a cache."""
        if run.cache is None:
            self.counts = run.memory["counts"]

    def layer(self, call: LayerCall, h: Tensor, run: Pass) -> Tensor:
        """Run a layer with the experts that are kept for each token.

        Args:
            call: the layer.
            h: hidden states before it `[batch, time, hidden]`.
            run: the pass.
        """
        mid = call.attn(h)
        image = torch.zeros(h.shape[:2], dtype=torch.bool, device=h.device) if run.images is None else run.images
        real = torch.ones_like(image) if run.real is None else run.real
        bypassed = self._bypassed(call.index, image)
        left = torch.zeros_like(image, dtype=h.dtype)

        def keep(ids: Tensor, weights: Tensor) -> Tensor:
            if self.recorded_scores is not None:
                s = self.score(call.index, weights, image.flatten())
                self.recorded_scores.append((s[real.flatten()], image[real]))
            kept = self.kept(call.index, weights, image.flatten()) & ~bypassed.flatten()[:, None]
            if run.cache is None:  # not while generating, where counting would cost time
                for index, those in enumerate((real & ~image, real & image)):
                    runs = kept[those.flatten()]
                    run.memory["counts"][call.index, index] = torch.tensor([runs.numel(), int(runs.sum())])
            left.copy_(kept.sum(1).view_as(image))
            return kept & real.flatten()[:, None] if not kept[real.flatten()].all() else torch.ones_like(kept)

        out = call.experts(mid, self.experts, keep)
        run.note("experts", call.index, left)
        if self.bypass is None or self.bypass[2] == "zero" or not bypassed.any():
            return out
        hidden = join(mid)
        if call.index not in self._norms:  # found by running the layer, so once
            self._norms[call.index] = norm_before(self._stack, call.index, "mlp")
        normed = call.layer.get_submodule(self._norms[call.index])(hidden)
        return torch.where(bypassed.unsqueeze(-1), hidden + normed, out)

    def score(self, layer: int, weights: Tensor, image: Tensor) -> Tensor:
        """Return s of the chosen experts [tokens, used].

        Args:
            layer: index of the layer.
            weights: router weights of the chosen experts [tokens, used].
            image: mask of image tokens [tokens] bool.
        """
        return self.alpha[:, layer].to(weights.device)[image.long(), None] * weights.float()

    def kept(self, layer: int, weights: Tensor, image: Tensor) -> Tensor:
        """Return the mask of the chosen experts that run: [tokens, used] bool.

        Args:
            layer: index of the layer.
            weights: router weights of the chosen experts [tokens, used].
            image: mask of image tokens [tokens] bool.
        """
        return self.score(layer, weights, image) >= self.tau.to(weights.device)[image.long(), None]

    def _bypassed(self, layer: int, image: Tensor) -> Tensor:
        """Mark the tokens that skip all experts of a layer: [batch, time] bool."""
        if self.bypass is None or self.bypass[0] != layer:
            return torch.zeros_like(image)
        return image if self.bypass[1] == "image" else ~image
