"""The built-in remover and control branch of the small video transformer of pixels."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import nn

from lamella.methods.refacade.base import Base
from lamella.methods.refacade.datasets import removal_samples, transfer_samples
from lamella.methods.refacade.modules import ControlBranch
from lamella.methods.refacade.nano import ALONE, TRAINED, UNTRAINED, built_in_weights, clips, config, every_second
from lamella.methods.refacade.recipe import train_branch, train_remover
from lamella.methods.refacade.remover import TextureRemover
from lamella.plan.filling import fill


def remover(name: str) -> TextureRemover:
    """Return the built-in remover by its name."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        found = TextureRemover.fresh(Base.open(UNTRAINED))
    if name == TRAINED:
        fill(found, built_in_weights("remover", partial(_train_remover, found)), "the built-in remover")
    return found.requires_grad_(False).eval()


def branch(base: Base, name: str) -> ControlBranch:
    """Return the control branch of a built-in base by its name.

    Args:
        base: the built-in base.
        name: name of the branch; a trained one or one at initialisation.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        found = ControlBranch(base.network, every_second(base.depth), *base.control_channels)
    if name == TRAINED:
        fill(found, built_in_weights("branch", partial(_train_branch, base, found)), "the built-in branch")
    return found.requires_grad_(False).eval()


def _train_remover(found: TextureRemover, out: Path) -> nn.Module:
    train_remover(found, removal_samples(Base.open(UNTRAINED), clips()), config("remover"), out, ALONE)
    return found


def _train_branch(base: Base, found: ControlBranch, out: Path) -> nn.Module:
    samples = transfer_samples(base, remover(TRAINED), clips())
    train_branch(base, found, samples, config("branch"), out, alone=ALONE)
    return found
