"""The small video transformer of pixels that is built in, and how it and its parts are trained and kept.

They are trained on textured objects when they are first asked for, on any machine, and kept in the cache. With the
remover and the control branch (:mod:`lamella.methods.refacade.nano_parts`) it takes about half an hour of one core; a
training that is stopped goes on when it is asked for again.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lamella.errors import TrainingError
from lamella.extras import require
from lamella.methods.refacade.clips import Clip, of_object
from lamella.methods.refacade.flow import BaseLoss, Length, task
from lamella.methods.refacade.objects import objects
from lamella.plan.filling import fill
from lamella.progress import notify
from lamella.train import TrainConfig, fit
from lamella.zoo.cache import build_once

TRAINED, UNTRAINED = "nano", "untrained"
SIDE = 32  # pixels, of the frames of the built-in network
WEIGHTS = "model.safetensors"
FRAMES, ALONE = 3, 0.85  # of a clip, and the share of batches that see its first frame alone
COUNT = 1200  # objects
SHAPE = {
    "patch_size": (1, 4, 4),
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "in_channels": 3,
    "out_channels": 3,
    "text_dim": 8,
    "freq_dim": 64,
    "ffn_dim": 192,
    "num_layers": 6,
}
STEPS = {"base": 1200, "remover": 700, "branch": 2000}
RATE, BATCH, SAVE = 2e-3, 16, 100


def made(shape: dict[str, Any], seed: int = 0) -> Any:
    """A video transformer of a shape with random weights, frozen."""
    diffusers = require("diffusers", "vision", "the built-in network")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return diffusers.WanTransformer3DModel(**shape).requires_grad_(False).eval()


def every_second(depth: int) -> list[int]:
    """The layers that the paper's branch has."""
    return list(range(0, depth, 2))


def network(name: str, around: Callable[[Any], Any]) -> Any:
    """The transformer, by its name.

    Args:
        around: makes the base of a transformer, which encodes clips and gives the velocity.
    """
    found = made(SHAPE)
    if name == TRAINED:
        fill(found, built("base", partial(_train_base, found, around)), "the built-in base")
    return found.requires_grad_(False).eval()


def built(part: str, train: Callable[[Path], nn.Module]) -> dict[str, Tensor]:
    def build(folder: Path) -> dict[str, Any]:
        notify(
            f"refacade: the built-in {part} is trained on textured objects, once. All three parts take about half an "
            "hour of one core; stopped, it goes on."
        )
        work = folder.parent / f".refacade-{part}.work"  # stays when this is killed
        with torch.random.fork_rng(devices=[]):
            try:
                trained = train(work)
            except TrainingError:  # what another version has begun
                shutil.rmtree(work)
                trained = train(work)
        save_file({name: each.contiguous() for name, each in trained.state_dict().items()}, folder / WEIGHTS)
        shutil.rmtree(work)
        return {"steps": STEPS[part], "objects": COUNT}

    folder = build_once(f"refacade-{part}-{SIDE}-{STEPS[part]}", build, megabytes=200)
    return load_file(folder / WEIGHTS)


def config(part: str) -> TrainConfig:
    steps = STEPS[part]
    return TrainConfig(steps=steps, lr=RATE, schedule="cosine", warmup=0.05, batch=BATCH, save_every=SAVE)


def _train_base(found: Any, around: Callable[[Any], Any], out: Path) -> nn.Module:
    base = around(found)
    samples = [{"clean": base.encode(clip.frames)} for clip in clips()]
    fit(
        found,
        samples,
        task(BaseLoss(base.velocity, Length(ALONE))),
        config("base"),
        out=out,
        trainable=lambda name: True,
    )
    return found


def clips() -> list[Clip]:
    """What all three learn from."""
    return list(map(of_object, islice(objects("train", 0, SIDE, FRAMES), COUNT)))
