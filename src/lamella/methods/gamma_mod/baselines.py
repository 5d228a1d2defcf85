"""Baselines of gamma-MoD: the authors' layer modes, random layers, and training-free dropping of image tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from lamella.errors import MethodError
from lamella.measure.image_tokens import TokenFeatures, choose
from lamella.runtime import LayerCall, Pass, Policy
from lamella.stack import Stack, attend_with_weights, join


def mode_layers(mode: str, layers: int) -> list[int]:
    """Return the layers that one of the authors' modes converts, by its name in their code.

    Args:
        mode: name of the mode.
        layers: number of layers of the model.

    >>> mode_layers("arank_mod", 8)
    [3, 4, 5, 6]
    >>> mode_layers("second_half", 8)
    [4, 5, 6]
    """
    last = layers - 1
    spans = {
        "first_half": range(layers // 2),
        "second_half": range(layers // 2, last),
        "sparse": range(0, layers, 2),
        "dense": range(layers),
        "first_last_dense": range(1, last),
        "first_five_dense": range(5, last),
        "last_two_thirds": range(layers // 3 + 2, last),
        "arank_mod": range(3, last),
    }
    if not spans[mode]:
        raise MethodError(f"gamma-mod: {mode} converts no layer of {layers}; its modes are {', '.join(spans)}")
    return list(spans[mode])


def random_layers(layers: int, count: int, seed: int) -> list[int]:
    """Return `count` random layers.

    Args:
        layers: number of layers of the model.
        count: number of layers to return.
        seed: random seed.
    """
    return sorted(torch.randperm(layers, generator=torch.Generator().manual_seed(seed))[:count].tolist())


class ImageTokenPruning(Policy):
    """Drop image tokens after a layer, without training: FastV, or VTW if none is kept.

    Args:
        stack: the model.
        layer: the last layer that runs for all tokens.
        keep: number of image tokens per row that run the later layers, at their original positions.
        criterion: ranking by the prompt's attention in ``layer``: ``fastv`` or ``withdraw``.
    """

    def __init__(self, stack: Stack, *, layer: int, keep: int, criterion: str = "fastv") -> None:
        super().__init__(stack)
        self.layer_of, self.keep, self.criterion = layer, keep, criterion
        self.sparse = frozenset(range(layer + 1, len(stack)))

    def layer(self, call: LayerCall, h: Tensor, run: Pass) -> Tensor:
        """Run a layer, without dropped image tokens.

        Args:
            call: the layer.
            h: hidden states before it `[batch, time, hidden]`.
            run: the pass.
        """
        if run.images is None or not run.images.any():
            return call(h)
        real = torch.ones_like(run.images) if run.real is None else run.real
        if call.index > self.layer_of:
            some = call.tokens(real & ~run.memory["gone"])
            return some.scatter(h, some(some.gather(h)))
        if call.index < self.layer_of:
            return call(h)
        mid, weights = attend_with_weights(call.architecture["attn"], call.layer, h, call.kwargs, causal=True)
        run.memory["gone"] = self._gone(join(mid), weights, run.images & real, real, run)
        return call.mlp(mid)

    def _gone(self, h: Tensor, weights: Tensor, images: Tensor, real: Tensor, run: Pass) -> Tensor:
        """Return the image tokens to drop [batch, time] bool."""
        gone = images.clone()
        asks = real & ~run.phase.response(h.device)  # the answer is not known yet
        for row, columns in enumerate(each.nonzero().flatten() for each in images):
            if len(columns):
                to_image = weights[row][:, asks[row]][:, :, columns]  # [heads, prompt, image]
                kept = choose(self.criterion, TokenFeatures(h[row, columns], attention=to_image), self.keep).index
                gone[row, columns[kept]] = False
        return gone
