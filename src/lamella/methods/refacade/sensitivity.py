"""Sensitivity of the layers of a frozen base to hints: the effect of a small perturbation on its output and loss.

    s_i = E | v(x <- block_i(x) + delta) - v |^2,  |delta| = a fraction of the norm of the hidden states, equal for all
    i

Directions, times and noise are random for each clip, and the same for all layers.
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
from lamella.methods.refacade.flow import add_noise
from lamella.progress import tracker

FRACTION = 0.3  # norm of the perturbation over the mean norm of the hidden states


@torch.no_grad()
def hint_sensitivity(
    base: Base, clean: Sequence[Tensor], *, draws: int, seed: int, work: Work
) -> dict[str, list[float]]:
    """Measure the effect of a perturbation at each layer.

    Args:
        base: the video transformer.
        clean: latents of clips [C, F', h, w].
        draws: number of random times, noises and directions per clip.
        seed: random seed of these.
        work: folder from which an interrupted run resumes.

    Returns:
        By layer, ``output``: the mean squared change; and ``loss``: the increase of the flow-matching loss.

    Raises:
        MethodError: for less than one draw.
    """
    if draws < 1:
        raise MethodError(f"draws {draws}: give at least 1")
    total = sum(float(clip.double().sum()) for clip in clean)
    depends = [base.digest, len(clean), list(clean[0].shape), total, draws, seed]
    known = Finished(work.journal("layers"), depends)
    changes = []
    with tracker("perturbing layers, clip by clip", len(clean)) as count:
        for index, clip in enumerate(clean):
            rows = clip[None].to(base.network.device)
            changes.append(known.once(f"clip {index}", partial(perturb_layers, base, rows, draws, (seed, index))))
            count()
    output, loss = torch.tensor(changes, dtype=torch.float64).mean(dim=0).tolist()
    return {"output": output, "loss": loss}


def perturb_layers(base: Base, clip: Tensor, draws: int, seed: tuple[int, int]) -> list[list[float]]:
    """Measure the effect of a perturbation at each layer on one clip.

    Args:
        base: the video transformer.
        clip: clean latents [1, C, F', h, w].
        draws: number of random times, noises and perturbations.
        seed: random seed, and index of the clip.

    Returns:
        Mean squared change of the output, and change of the loss, by layer [2][layers].
    """
    found = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(np.random.default_rng(seed).integers(2**62)))
        for _ in range(draws):
            z_t, t, target = (each.to(clip.device) for each in add_noise(clip.cpu()))
            predict = partial(base.velocity, z_t, t, base.white(clip))
            hidden: list[Tensor] = []  # output of every block [1, tokens, d]
            with hook_on(base.network.blocks, lambda module, args, out, hidden=hidden: hidden.append(out)):
                whole = predict()
            size = FRACTION * torch.stack([each.float().norm(dim=-1).mean() for each in hidden]).mean()
            delta = torch.randn(hidden[0].shape).to(clip.device)
            delta *= size / delta.norm(dim=-1, keepdim=True)
            error = (whole - target).square().mean()
            for block in base.network.blocks:
                with hook_on([block], lambda module, args, out, delta=delta: out + delta.type_as(out)):
                    v = predict()
                found.append([float((v - whole).square().mean()), float((v - target).square().mean() - error)])
    return torch.tensor(found).view(draws, -1, 2).mean(dim=0).T.tolist()


@contextmanager
def hook_on(blocks: Iterable[Any], hook: Callable[..., Any]) -> Iterator[None]:
    """Register a forward hook on blocks within a context.

    Args:
        blocks: the modules.
        hook: the forward hook.
    """
    handles = [block.register_forward_hook(hook) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def most_sensitive(values: Sequence[float], count: int) -> list[int]:
    """Return the layers with the largest effect, in the order of depth.

    Args:
        values: the effect of each layer.
        count: number of layers to return.
    """
    return sorted(sorted(range(len(values)), key=lambda layer: -values[layer])[:count])
