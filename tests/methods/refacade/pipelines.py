"""Small bases of the real classes with random weights: of pixels, and of latents as Wan's VACE has them."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import torch

from lamella.methods.refacade import Base, ControlBranch

SHAPE = {
    "num_attention_heads": 2, "attention_head_dim": 24, "text_dim": 12, "freq_dim": 16, "ffn_dim": 40, "num_layers": 3,
}  # fmt: skip


def loud(module: Any, seed: int = 1) -> Any:
    """Nothing is silent from the start, as what begins at zero is."""
    torch.manual_seed(seed)
    for each in module.parameters():
        each.data.add_(0.05 * torch.randn(each.shape))
    return module.eval()


@cache
def pixels() -> Base:
    """Of pixels; nobody changes it."""
    torch.manual_seed(0)
    network = diffusers.WanTransformer3DModel(patch_size=(1, 4, 4), in_channels=3, out_channels=3, **SHAPE)
    return Base(loud(network).requires_grad_(False), None, "pixels")


def branch(base: Base, *layers: int, silent: bool = False) -> ControlBranch:
    torch.manual_seed(2)
    made = ControlBranch(base.network, layers or (0, 2), *base.control_channels)
    return made.eval() if silent else loud(made)


def vae() -> Any:
    torch.manual_seed(3)
    four = [0.1, -0.2, 0.3, 0.0]
    return diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=four, latents_std=[1.1, 0.9, 1.2, 1]
    ).eval()


@cache
def folder(dtype: torch.dtype = torch.float32, layers: tuple[int, ...] = (0, 2), depth: int = 3) -> Path:
    """A VACE pipeline of latents, as diffusers writes one."""
    torch.manual_seed(4)
    vace = {"vace_layers": list(layers), "vace_in_channels": 96}
    shape = {**SHAPE, "num_layers": depth}
    network = diffusers.WanVACETransformer3DModel(in_channels=4, out_channels=4, **shape, **vace)
    where = Path(tempfile.mkdtemp(prefix="refacade-")) / "tiny-wan"
    loud(network).to(dtype).save_pretrained(where / "transformer")
    vae().to(dtype).save_pretrained(where / "vae")
    return where


@cache
def latents() -> Base:
    return Base.open(folder())


@cache
def halved() -> Base:
    """The same in bfloat16."""
    return Base.open(folder(torch.bfloat16))


def branch_inputs(base: Base, rows: int = 2, frames: int = 2, side: int = 8) -> dict[str, torch.Tensor]:
    """Everything that a velocity is asked with, at random."""
    torch.manual_seed(5)
    video, ref = base.control_channels
    return {
        "z": torch.randn(rows, base.channels, frames, side, side),
        "t": torch.rand(rows),
        "reference": torch.randn(rows, base.channels, 1, side, side),
        "c": torch.randn(rows, video, frames, side, side),
        "c_r": torch.randn(rows, ref, 1, side, side),
    }
