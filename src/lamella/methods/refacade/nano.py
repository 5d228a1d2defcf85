"""The small built-in video transformer of pixels, and the training and caching of its parts.

The parts are trained on textured objects on first use, on any machine, and cached. With the remover and the control
branch (:mod:`lamella.methods.refacade.nano_parts`) this takes about half an hour of one core; an interrupted training
resumes on the next use.
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
SIDE = 32  # side in pixels of the built-in network's frames
WEIGHTS = "model.safetensors"
FRAMES, ALONE = 3, 0.85  # frames of a clip, and fraction of batches with its first frame only
COUNT = 1200  # number of objects
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


def random_network(shape: dict[str, Any], seed: int = 0) -> Any:
    """Return a frozen Wan video transformer with random weights.

    Args:
        shape: arguments of diffusers' ``WanTransformer3DModel``.
        seed: random seed of the weights.
    """
    diffusers = require("diffusers", "vision", "the built-in network")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return diffusers.WanTransformer3DModel(**shape).requires_grad_(False).eval()


def every_second(depth: int) -> list[int]:
    """Return the layers of the paper's branch."""
    return list(range(0, depth, 2))


def network(name: str, around: Callable[[Any], Any]) -> Any:
    """Return the transformer by its name.

    Args:
        name: ``nano`` or ``untrained``.
        around: makes the base of a transformer, which encodes clips and predicts the velocity.
    """
    found = random_network(SHAPE)
    if name == TRAINED:
        fill(found, built_in_weights("base", partial(_train_base, found, around)), "the built-in base")
    return found.requires_grad_(False).eval()


def built_in_weights(part: str, train: Callable[[Path], nn.Module]) -> dict[str, Tensor]:
    """Return the weights of a built-in part from the cache, after training it on first use.

    Args:
        part: name of the part: ``base``, ``remover`` or ``branch``.
        train: trains the part in a folder that keeps checkpoints, and returns it.
    """

    def build(folder: Path) -> dict[str, Any]:
        notify(
            f"refacade: the built-in {part} is trained on textured objects, once. All three parts take about half an "
            "hour of one core; an interrupted training resumes."
        )
        work = folder.parent / f".refacade-{part}.work"  # kept when the process is killed
        with torch.random.fork_rng(devices=[]):
            try:
                trained = train(work)
            except TrainingError:  # started by another version
                shutil.rmtree(work)
                trained = train(work)
        save_file({name: each.contiguous() for name, each in trained.state_dict().items()}, folder / WEIGHTS)
        shutil.rmtree(work)
        return {"steps": STEPS[part], "objects": COUNT}

    folder = build_once(f"refacade-{part}-{SIDE}-{STEPS[part]}", build, megabytes=200)
    return load_file(folder / WEIGHTS)


def config(part: str) -> TrainConfig:
    """Return the training settings of a part."""
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
    """Return the training clips of all three parts."""
    return list(map(of_object, islice(objects("train", 0, SIDE, FRAMES), COUNT)))
