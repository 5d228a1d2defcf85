"""Which experts a token skips: those whose weight, times what their layer is worth to its modality, is too little.

s_i = alpha[layer, modality] * w_i        w: the router's weights, as the model mixes with them
skip expert i  iff  s_i < tau[modality]   what is left is not normalised again
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
    """Skips experts by importance and thresholds.

    Args:
        stack: the model of L layers, some of them with experts.
        alpha: for ``text`` and ``image`` the importance of each layer [L]; what belongs to layers without experts is
            not read.
        tau: for ``text`` and ``image`` the threshold; 0 skips nothing.

    Attributes:
        bypass: a layer and a modality whose tokens skip all of its experts, whatever the thresholds say, and what they
            take instead: nothing, or (``identity``) what the experts would have read.
        heard: a list that takes, of each layer of a pass, the scores of its tokens, and which are of an image.
        counts: of the last pass without a cache, the pairs of a token and a chosen expert, and those that ran, by layer
            and modality [layers, text and image, chosen and run]; padding is not counted.

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
            raise MethodError(f"modes: alpha gives text and image a number for each of {len(stack)} layers")
        tau = {"text": 0.0, "image": 0.0} if tau is None else tau
        if set(tau) != set(MODALITIES) or any(not value >= 0 for value in tau.values()):
            raise MethodError("modes: tau gives text and image a threshold of at least 0")
        self.alpha = torch.tensor([list(alpha[name]) for name in MODALITIES])
        self.tau = torch.tensor([tau[name] for name in MODALITIES])
        self.bypass: tuple[int, str, Bypass] | None = None
        self.heard: list[tuple[Tensor, Tensor]] | None = None
        self.counts = torch.zeros(self.layers, 2, 2, dtype=torch.long)
        self._stack = stack
        self._norms: dict[int, str] = {}

    def begin(self, run: Pass) -> None:
        run.memory["counts"] = torch.zeros(self.layers, 2, 2, dtype=torch.long)

    def end(self, run: Pass) -> None:
        if run.cache is None:
            self.counts = run.memory["counts"]

    def layer(self, call: LayerCall, h: Tensor, run: Pass) -> Tensor:
        mid = call.attn(h)
        image = torch.zeros(h.shape[:2], dtype=torch.bool, device=h.device) if run.images is None else run.images
        real = torch.ones_like(image) if run.real is None else run.real
        bypassed = self._bypassed(call.index, image)
        left = torch.zeros_like(image, dtype=h.dtype)

        def keep(ids: Tensor, weights: Tensor) -> Tensor:
            if self.heard is not None:
                s = self.score(call.index, weights, image.flatten())
                self.heard.append((s[real.flatten()], image[real]))
            kept = self.kept(call.index, weights, image.flatten()) & ~bypassed.flatten()[:, None]
            if run.cache is None:  # generation has no time to count
                for place, those in enumerate((real & ~image, real & image)):
                    of = kept[those.flatten()]
                    run.memory["counts"][call.index, place] = torch.tensor([of.numel(), int(of.sum())])
            left.copy_(kept.sum(1).view_as(image))
            return kept & real.flatten()[:, None] if not kept[real.flatten()].all() else torch.ones_like(kept)

        out = call.experts(mid, self.experts, keep)
        run.note("experts", call.index, left)
        if self.bypass is None or self.bypass[2] == "zero" or not bypassed.any():
            return out
        stream = join(mid)
        if call.index not in self._norms:  # found by running the layer, so once
            self._norms[call.index] = norm_before(self._stack, call.index, "mlp")
        read = call.layer.get_submodule(self._norms[call.index])(stream)
        return torch.where(bypassed.unsqueeze(-1), stream + read, out)

    def score(self, layer: int, weights: Tensor, image: Tensor) -> Tensor:
        """s of the chosen experts [tokens, used], given their weights and which tokens are of an image."""
        return self.alpha[:, layer].to(weights.device)[image.long(), None] * weights.float()

    def kept(self, layer: int, weights: Tensor, image: Tensor) -> Tensor:
        """Which of the chosen experts run [tokens, used] bool; see :meth:`score`."""
        return self.score(layer, weights, image) >= self.tau.to(weights.device)[image.long(), None]

    def _bypassed(self, layer: int, image: Tensor) -> Tensor:
        """Which tokens skip all experts of a layer [batch, time] bool."""
        if self.bypass is None or self.bypass[0] != layer:
            return torch.zeros_like(image)
        return image if self.bypass[1] == "image" else ~image
