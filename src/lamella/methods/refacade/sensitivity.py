"""Which layers of a frozen base a hint moves: what a small push of one size does to its loss, layer by layer.

    s_i = E | v(x <- block_i(x) + delta) - v |^2,  |delta| = share of the stream's norm, the same at every layer

Directions, times and noise are drawn once and are the same for all layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lamella.errors import MethodError
from lamella.files import Finished, Work
from lamella.methods.refacade.base import Base
from lamella.methods.refacade.jigsaw import WHITE
from lamella.methods.refacade.recipe import noised
from lamella.progress import tracker

SHARE = 0.3  # of the stream's norm, on average over layers


@torch.no_grad()
def hint_sensitivity(base: Base, clean: Tensor, *, draws: int, seed: int, work: Work) -> dict[str, list[float]]:
    """What a push at each layer changes.

    Args:
        clean: latents [rows, C, F', h, w].
        draws: times, noises and directions for each.
        seed: of them.
        work: where a run that was stopped goes on from.

    Returns:
        By layer, ``output``: the mean square of what changes; and ``loss``: by how much the flow's loss rises.

    Raises:
        MethodError: for less than one draw.
    """
    if draws < 1:
        raise MethodError(f"draws={draws}: give at least 1")
    white = torch.full_like(clean[:, :, :1], WHITE) if base.vae is None else _white(base, clean)
    known = Finished(work.journal("layers"), [base.digest, list(clean.shape), float(clean.double().sum()), draws, seed])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        cases = [noised(clean) for _ in range(draws)]
    streams = _streams(base, cases[0], white)
    size = SHARE * float(torch.stack([each.norm(dim=-1).mean() for each in streams]).mean())
    shape = streams[0].shape

    def pushed(layer: int | None) -> list[float]:
        drawn = torch.Generator().manual_seed(seed + 1)
        found = []
        for z_t, t, target in cases:
            delta = torch.randn(shape, generator=drawn).to(z_t)
            said = _pushed(base, z_t, t, white, layer, size * delta / delta.norm(dim=-1, keepdim=True))
            whole = said if layer is None else base.velocity(z_t, t, white)
            found.append([float((said - whole).square().mean()), float((said - target).square().mean())])
        return torch.tensor(found).mean(dim=0).tolist()

    whole = known.once("whole", lambda: pushed(None))[1]
    changes = []
    with tracker("pushing layers", base.depth) as count:
        for layer in range(base.depth):
            changes.append(known.once(f"layer {layer}", partial(pushed, layer)))
            count()
    return {"output": [each[0] for each in changes], "loss": [each[1] - whole for each in changes]}


def most_sensitive(values: Sequence[float], count: int) -> list[int]:
    """The layers at which a push does most, in order of depth."""
    return sorted(sorted(range(len(values)), key=lambda layer: -values[layer])[:count])


def _white(base: Base, clean: Tensor) -> Tensor:
    height, width = (base.spatial * side for side in clean.shape[-2:])
    return base.encode(torch.full((1, 3, height, width), WHITE))[None].expand(len(clean), -1, -1, -1, -1)


def _streams(base: Base, case: Any, white: Tensor) -> list[Tensor]:
    """What every block gives [rows, tokens, d]."""
    found: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda m, a, out: found.append(out)) for block in base.network.blocks]
    try:
        base.velocity(case[0], case[1], white)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _pushed(base: Base, z_t: Tensor, t: Tensor, white: Tensor, layer: int | None, delta: Tensor) -> Tensor:
    if layer is None:
        return base.velocity(z_t, t, white)
    hook = base.network.blocks[layer].register_forward_hook(lambda m, a, out: out + delta.type_as(out))
    try:
        return base.velocity(z_t, t, white)
    finally:
        hook.remove()
