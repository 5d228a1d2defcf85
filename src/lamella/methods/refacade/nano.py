"""Small networks that are built in: a video transformer of pixels, its remover and its control branch.

They are trained on textured objects when they are first asked for, on any machine, and kept in the cache. All three
take about half an hour of one core; a training that is stopped goes on when it is asked for again.
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
from lamella.methods.refacade.base import SIDE, TRAINED, UNTRAINED, Base
from lamella.methods.refacade.lessons import Clip, of_object, removal_samples, transfer_samples
from lamella.methods.refacade.modules import ControlBranch
from lamella.methods.refacade.objects import objects
from lamella.methods.refacade.recipe import BaseLoss, Length, task, train_branch, train_remover
from lamella.methods.refacade.remover import TextureRemover
from lamella.plan.filling import fill
from lamella.progress import say
from lamella.train import TrainConfig, fit
from lamella.zoo.cache import build_once

NAMES = (TRAINED, UNTRAINED)
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


def network(name: str) -> Any:
    """The transformer, by its name."""
    found = made(SHAPE)
    if name == TRAINED:
        fill(found, _built("base", partial(_train_base, found)), "the built-in base")
    return found.requires_grad_(False).eval()


def remover(name: str) -> TextureRemover:
    """The remover, likewise."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        found = TextureRemover.fresh(Base.open(UNTRAINED))
    if name == TRAINED:
        fill(found, _built("remover", partial(_train_remover, found)), "the built-in remover")
    return found.requires_grad_(False).eval()


def branch(base: Base, name: str) -> ControlBranch:
    """The control branch of a built-in base, likewise."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        found = ControlBranch(base.network, every_second(base.depth), *base.control_channels)
    if name == TRAINED:
        fill(found, _built("branch", partial(_train_branch, base, found)), "the built-in branch")
    return found.requires_grad_(False).eval()


def _built(part: str, train: Callable[[Path], nn.Module]) -> dict[str, Tensor]:
    def build(folder: Path) -> dict[str, Any]:
        say(
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


def _config(part: str) -> TrainConfig:
    steps = STEPS[part]
    return TrainConfig(steps=steps, lr=RATE, schedule="cosine", warmup=0.05, batch=BATCH, save_every=SAVE)


def _train_base(found: Any, out: Path) -> nn.Module:
    base = Base(found, None, UNTRAINED)
    samples = [{"clean": base.encode(clip.frames)} for clip in clips()]
    fit(found, samples, task(BaseLoss(base, Length(ALONE))), _config("base"), out=out, trainable=lambda name: True)
    return found


def _train_remover(found: TextureRemover, out: Path) -> nn.Module:
    train_remover(found, removal_samples(Base.open(UNTRAINED), clips()), _config("remover"), out, ALONE)
    return found


def _train_branch(base: Base, found: ControlBranch, out: Path) -> nn.Module:
    samples = transfer_samples(base, remover(TRAINED), clips())
    train_branch(base, found, samples, _config("branch"), out, alone=ALONE)
    return found


def clips() -> list[Clip]:
    """What all three learn from."""
    return list(map(of_object, islice(objects("train", 0, SIDE, FRAMES), COUNT)))
