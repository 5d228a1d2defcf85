"""How good what is left is: noise on pictures that nothing was chosen on, and what is drawn from the same noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
from annotated_types import Ge
from torch import Tensor

from lamella.data import CaptionedImages
from lamella.extras import require
from lamella.methods.laptop_diff.denoiser import Denoiser
from lamella.methods.laptop_diff.tuples import Tuples, error, predictions, targets
from lamella.report.images import png_base64

DRAWING = 50  # steps of DDIM


@dataclass(frozen=True)
class Judging:
    """How much is judged.

    Attributes:
        tuples: (picture, time, noise) on which losses are measured, spread evenly over time.
        bins: stretches of time for which they are told apart.
        draws: pictures that the report shows, from the same noise; 0: none.
    """

    tuples: Annotated[int, Ge(1)] = 256
    bins: Annotated[int, Ge(1)] = 4
    draws: Annotated[int, Ge(0)] = 8


def judged(
    denoiser: Denoiser, networks: Mapping[str, Any], test: CaptionedImages, judging: Judging, batch: int, seed: int
) -> dict[str, Any]:
    """Denoising and output loss of some networks on test pictures, beside the whole one's, and what each draws.

    Args:
        networks: by name.
        test: pictures that nothing was chosen on.
        batch: tuples at once.
        seed: of times, noise and drawings.
    """
    tuples = Tuples.of(denoiser, test, judging.tuples, seed + 1)
    wanted = targets(denoiser, tuples)
    original = predictions(denoiser, denoiser.network, tuples, batch)
    where = tuples.bins(denoiser, judging.bins)
    losses: dict[str, Any] = {"original": {"task": float(error(original, wanted).mean())}}
    for name, network in networks.items():
        said = predictions(denoiser, network, tuples, batch)
        changed = error(said, original)
        losses[name] = {
            "task": float(error(said, wanted).mean()),
            "output": float(changed.mean()),
            "by_time": [float(changed[where == number].mean()) for number in range(judging.bins)],
        }
    if not judging.draws:
        return {"test": losses}
    every = {"original": denoiser.network, **networks}
    pictures = {name: drawn(denoiser, each, test, judging.draws, seed) for name, each in every.items()}
    return {"test": losses, "drawn": {name: png_base64(each) for name, each in pictures.items()}}


@torch.no_grad()
def drawn(
    denoiser: Denoiser, network: Any, asked: CaptionedImages, count: int, seed: int, steps: int = DRAWING
) -> npt.NDArray[np.uint8]:
    """Pictures [count, height, width, 3] that a network draws from noise, by DDIM and without guidance.

    Args:
        asked: whose captions or classes are drawn.
        seed: of the noise: the same for every network.
        steps: of the sampler.
    """
    scheduler = require("diffusers", "vision", "drawing").DDIMScheduler.from_config(denoiser.noising.config)
    scheduler.set_timesteps(min(steps, denoiser.timesteps))
    rows = [asked.items[number % len(asked)] for number in range(count)]
    told = denoiser.conditions(rows)
    channels = denoiser.network.config.in_channels
    x = torch.randn((count, channels, *denoiser.size), generator=torch.Generator().manual_seed(seed))
    x = (x * scheduler.init_noise_sigma).to(denoiser.network.device)
    told = {name: each.to(x.device) for name, each in told.items()}
    for t in scheduler.timesteps:
        said = denoiser.predict(network, x, torch.full((count,), int(t), device=x.device), told)
        x = scheduler.step(said, int(t), x).prev_sample
    return _pixels(denoiser, x)


def _pixels(denoiser: Denoiser, x: Tensor) -> npt.NDArray[np.uint8]:
    vae = getattr(denoiser.pipeline, "vae", None)
    if vae is not None:
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        x = vae.decode(x / vae.config.scaling_factor + shift, return_dict=False)[0]
    pixels = ((x.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return np.repeat(pixels, 3, axis=-1) if pixels.shape[-1] == 1 else pixels
