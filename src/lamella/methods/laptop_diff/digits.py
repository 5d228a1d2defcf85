"""A small built-in UNet that generates scikit-learn's digits."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lamella.data import CaptionedImages, InputContext
from lamella.extras import require
from lamella.plan.filling import fill
from lamella.train import Task, TrainConfig, fit
from lamella.train.supervised import stacked
from lamella.zoo.cache import build_once

DIGITS, UNTRAINED = "digits", "untrained"
NAMES = (DIGITS, UNTRAINED)
TIMESTEPS = 200
STEPS, RATE, BATCH = 3000, 1e-3, 64
WEIGHTS = "model.safetensors"
SHAPE = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (24, 48),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 8,
    "attention_head_dim": 8,
}


def untrained(seed: int = 0) -> Any:
    """Create the pipeline with random weights."""
    diffusers = require("diffusers", "vision", "the built-in UNet")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = diffusers.UNet2DModel(**SHAPE).eval()
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=TIMESTEPS, clip_sample_range=1.0)
    pipeline = diffusers.DDPMPipeline(unet=network, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pipeline(name: str, steps: int = STEPS, seed: int = 0) -> Any:
    """Open one of the two built-in pipelines by name.

    Args:
        name: ``digits`` or ``untrained``.
        steps: number of training steps.
        seed: random seed of the weights and of the training.
    """
    made = untrained(seed)
    if name == DIGITS:
        folder = build_once(f"laptop-diff-digits-{steps}-{seed}", partial(_train, steps, seed), megabytes=40)
        fill(made.unet, load_file(folder / WEIGHTS), folder)
    return made


class NoiseLoss:
    """Mean squared error of the predicted noise, at random timesteps.

    Args:
        scheduler: noise scheduler.
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler

    def __call__(self, network: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """Compute the loss of a batch."""
        clean = batch["clean"]
        timesteps = torch.randint(self.scheduler.config.num_train_timesteps, (len(clean),), device=clean.device)
        noise = torch.randn_like(clean)
        output = network(self.scheduler.add_noise(clean, noise, timesteps), timesteps).sample
        return (output - noise).square().mean()


def _train(steps: int, seed: int, folder: Path) -> dict[str, Any]:
    """Train it on the calibration split of the digits, and write its weights."""
    made = untrained(seed)
    images = CaptionedImages.open(DIGITS, InputContext(), count=10_000)
    pixels = [torch.from_numpy(each.image[..., :1]).permute(2, 0, 1) / 127.5 - 1 for each in images.items]
    task = Task(NoiseLoss(made.scheduler), collate=stacked, weight=lambda batch: len(batch["clean"]))
    config = TrainConfig(steps=steps, lr=RATE, schedule="constant", warmup=0, batch=BATCH, seed=seed, save_every=steps)
    samples = [{"clean": each} for each in pixels]
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        fit(made.unet, samples, task, config, out=Path(work) / "run", trainable=lambda name: True)
    save_file(made.unet.state_dict(), folder / WEIGHTS)
    return {"steps": steps, "seed": seed, "images": images.describe()}
