"""Which layers of a frozen base a hint moves: what a small push of one size does to its loss, layer by layer.

    s_i = E | v(x <- block_i(x) + delta) - v |^2,  |delta| = share of the stream's norm, the same at every layer

Directions, times and noise are drawn for each clip, and are the same for all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lamella.errors import MethodError
from lamella.files import Finished, Work
from lamella.methods.refacade.base import Base
from lamella.methods.refacade.recipe import noised
from lamella.progress import tracker

SHARE = 0.3  # of the stream's norm, on average over layers


@torch.no_grad()
def hint_sensitivity(
    base: Base, clean: Sequence[Tensor], *, draws: int, seed: int, work: Work
) -> dict[str, list[float]]:
    """What a push at each layer changes.

    Args:
        clean: latents of clips [C, F', h, w].
        draws: times, noises and directions for each of them.
        seed: of them.
        work: where a run that was stopped goes on from.

    Returns:
        By layer, ``output``: the mean square of what changes; and ``loss``: by how much the flow's loss rises.

    Raises:
        MethodError: for less than one draw.
    """
    if draws < 1:
        raise MethodError(f"draws {draws}: give at least 1")
    total = sum(float(clip.double().sum()) for clip in clean)
    depends = [base.digest, len(clean), list(clean[0].shape), total, draws, seed]
    known = Finished(work.journal("layers"), depends)
    changes = []
    with tracker("pushing layers, clip by clip", len(clean)) as count:
        for number, clip in enumerate(clean):
            rows = clip[None].to(base.network.device)
            changes.append(known.once(f"clip {number}", partial(pushed, base, rows, draws, (seed, number))))
            count()
    output, loss = torch.tensor(changes, dtype=torch.float64).mean(dim=0).tolist()
    return {"output": output, "loss": loss}


def pushed(base: Base, clip: Tensor, draws: int, seed: tuple[int, int]) -> list[list[float]]:
    """What a push at each layer changes on one clip [1, C, F', h, w]: of the output, and of the loss [2][layers]."""
    found = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(np.random.default_rng(seed).integers(2**62)))
        for _ in range(draws):
            z_t, t, target = (each.to(clip.device) for each in noised(clip.cpu()))
            said = partial(base.velocity, z_t, t, base.white(clip))
            streams: list[Tensor] = []  # what every block gives [1, tokens, d]
            with hooked(base.network.blocks, lambda module, given, out, streams=streams: streams.append(out)):
                whole = said()
            size = SHARE * torch.stack([each.float().norm(dim=-1).mean() for each in streams]).mean()
            delta = torch.randn(streams[0].shape).to(clip.device)
            delta *= size / delta.norm(dim=-1, keepdim=True)
            error = (whole - target).square().mean()
            for block in base.network.blocks:
                with hooked([block], lambda module, given, out, delta=delta: out + delta.type_as(out)):
                    v = said()
                found.append([float((v - whole).square().mean()), float((v - target).square().mean() - error)])
    return torch.tensor(found).view(draws, -1, 2).mean(dim=0).T.tolist()


@contextmanager
def hooked(blocks: Iterable[Any], hook: Callable[..., Any]) -> Iterator[None]:
    """Let a hook see what blocks give, while they run in here."""
    handles = [block.register_forward_hook(hook) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def most_sensitive(values: Sequence[float], count: int) -> list[int]:
    """The layers at which a push does most, in order of depth."""
    return sorted(sorted(range(len(values)), key=lambda layer: -values[layer])[:count])
