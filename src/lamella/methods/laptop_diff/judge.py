"""Evaluation of pruned networks: losses on test images, and images generated from the same noise."""

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

DRAWING = 50  # DDIM steps


@dataclass(frozen=True)
class EvaluationSettings:
    """Settings of the evaluation.

    Attributes:
        tuples: number of (image, timestep, noise) tuples for measuring losses, spread evenly over timesteps.
        bins: number of timestep intervals that are reported separately.
        draws: number of generated images in the report, from the same noise; 0 for none.
    """

    tuples: Annotated[int, Ge(1)] = 256
    bins: Annotated[int, Ge(1)] = 4
    draws: Annotated[int, Ge(0)] = 8


def evaluate_networks(
    denoiser: Denoiser,
    networks: Mapping[str, Any],
    test: CaptionedImages,
    evaluation: EvaluationSettings,
    batch: int,
    seed: int,
) -> dict[str, Any]:
    """Compute denoising and output losses of networks on test images, relative to the original, and generate images.

    Args:
        denoiser: the original.
        networks: pruned networks by name.
        test: test images.
        evaluation: settings.
        batch: batch size.
        seed: random seed of timesteps, noise and generated images.
    """
    tuples = Tuples.of(denoiser, test, evaluation.tuples, seed + 1)
    wanted = targets(denoiser, tuples)
    original = predictions(denoiser, denoiser.network, tuples, batch)
    where = tuples.bins(denoiser, evaluation.bins)
    losses: dict[str, Any] = {"original": {"task": float(error(original, wanted).mean())}}
    for name, network in networks.items():
        output = predictions(denoiser, network, tuples, batch)
        changed = error(output, original)
        losses[name] = {
            "task": float(error(output, wanted).mean()),
            "output": float(changed.mean()),
            "by_time": [float(changed[where == number].mean()) for number in range(evaluation.bins)],
        }
    if not evaluation.draws:
        return {"test": losses}
    every = {"original": denoiser.network, **networks}
    generated = {name: generate_images(denoiser, each, test, evaluation.draws, seed) for name, each in every.items()}
    return {"test": losses, "generated": {name: png_base64(each) for name, each in generated.items()}}


@torch.no_grad()
def generate_images(
    denoiser: Denoiser, network: Any, images: CaptionedImages, count: int, seed: int, steps: int = DRAWING
) -> npt.NDArray[np.uint8]:
    """Generate images [count, height, width, 3] from noise, by DDIM without guidance.

    Args:
        denoiser: the original with its pipeline.
        network: the network to use.
        images: images whose captions or classes are used as conditions.
        count: number of images.
        seed: random seed of the noise, the same for every network.
        steps: number of DDIM steps.
    """
    scheduler = require("diffusers", "vision", "generating images").DDIMScheduler.from_config(denoiser.noising.config)
    scheduler.set_timesteps(min(steps, denoiser.timesteps))
    rows = [images.items[number % len(images)] for number in range(count)]
    conditions = denoiser.conditions(rows)
    channels = denoiser.network.config.in_channels
    x = torch.randn((count, channels, *denoiser.size), generator=torch.Generator().manual_seed(seed))
    x = (x * scheduler.init_noise_sigma).to(denoiser.network.device)
    conditions = {name: each.to(x.device) for name, each in conditions.items()}
    for t in scheduler.timesteps:
        output = denoiser.predict(network, x, torch.full((count,), int(t), device=x.device), conditions)
        x = scheduler.step(output, int(t), x).prev_sample
    return _pixels(denoiser, x)


def _pixels(denoiser: Denoiser, x: Tensor) -> npt.NDArray[np.uint8]:
    vae = getattr(denoiser.pipeline, "vae", None)
    if vae is not None:
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        x = vae.decode(x / vae.config.scaling_factor + shift, return_dict=False)[0]
    pixels = ((x.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return np.repeat(pixels, 3, axis=-1) if pixels.shape[-1] == 1 else pixels
