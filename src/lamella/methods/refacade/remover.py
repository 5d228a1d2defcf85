"""The texture remover: from an object on grey to its untextured version in plain grey, by a flow in a few steps.

    z_fg = E(X M)        v(z_t, t, z_fg)        eps -> z_unt by Euler's method, in 3 steps, without guidance

For latents it is a VACE network whose control is z_fg; for pixels a small UNet of z_fg and z_t, concatenated, frame by
frame. The trained parameters of a VACE network are in float32, whatever the precision of its main blocks, in which it
computes.
"""

from __future__ import annotations

import copy
import json
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from lamella.errors import CheckpointError, LamellaError
from lamella.extras import require
from lamella.methods.refacade.base import TIMES, VACE, WORDS, Base
from lamella.methods.refacade.flow import Velocity
from lamella.reading import parse_json, read_text
from lamella.zoo import open_model

UNET = "UNet2DModel"
KINDS = (VACE, UNET)
STEPS, MOST = 3, 1000
STEPS_FILE, HINT = "removal.json", "give a folder of `lamella run refacade remover` or `distil`"
SHAPE = {
    "block_out_channels": (32, 48, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    "norm_num_groups": 8,
    "attention_head_dim": 16,
}


class TextureRemover(nn.Module):
    """A network that removes texture.

    Args:
        network: a ``WanVACETransformer3DModel`` of latents, or a ``UNet2DModel`` of pixels.
        steps: default number of steps.
    """

    def __init__(self, network: Any, steps: int = STEPS) -> None:
        super().__init__()
        self.network, self.steps = network, steps

    @property
    def kind(self) -> str:
        """The class of the network."""
        return type(self.network).__name__

    @classmethod
    def fresh(cls, base: Base) -> TextureRemover:
        """Return an untrained remover; for latents it is the base with VACE's control blocks, or copies of blocks."""
        diffusers = require("diffusers", "vision", "a texture remover")
        if base.vae is None:
            channels = base.channels
            return cls(
                diffusers.UNet2DModel(sample_size=None, in_channels=2 * channels, out_channels=channels, **SHAPE)
            )
        config = {name: each for name, each in base.network.config.items() if not name.startswith("_")}
        layers = list(base.vace_layers) or list(range(0, base.depth, 2))
        with init_empty_weights():
            network = diffusers.WanVACETransformer3DModel(**config, vace_layers=layers, vace_in_channels=base.channels)
        main = {name: each.clone() for name, each in base.network.state_dict().items()}
        control = dict(base.vace) or copied_control(base.network, layers)
        patch = nn.Conv3d(base.channels, network.patch_embedding.out_channels, network.patch_embedding.kernel_size)
        fresh = {f"vace_patch_embedding.{name}": each.detach() for name, each in patch.state_dict().items()}
        network.load_state_dict(
            {**main, **{name: each.float().clone() for name, each in control.items()}, **fresh}, assign=True
        )
        return cls(network)

    def trains(self, name: str) -> bool:
        """Return whether a parameter is trained: the control blocks of a VACE network, all parameters of a UNet."""
        return self.kind == UNET or name.startswith("network.vace")

    def velocity(self, z_t: Tensor, t: Tensor, z_fg: Tensor) -> Tensor:
        """Return v of noisy latents, given foregrounds [batch, C, F', h, w].

        Args:
            z_t: noisy latents [batch, C, F', h, w].
            t: times in [0, 1] [batch].
            z_fg: latents of the foregrounds, in the shape of ``z_t``.
        """
        if self.kind == UNET:
            frames = z_t.shape[2]
            x = torch.cat([z_t, z_fg], dim=1).transpose(1, 2).flatten(0, 1)  # [batch * frames, 2 C, h, w]
            output: Tensor = self.network(x, TIMES * t.repeat_interleave(frames), return_dict=False)[0]
            return output.unflatten(0, (-1, frames)).transpose(1, 2)
        network = self.network
        kind = network.patch_embedding.weight.dtype  # of the main blocks
        text = torch.zeros(len(z_t), WORDS, network.config.text_dim, device=z_t.device, dtype=kind)
        conditions = {"encoder_hidden_states": text, "control_hidden_states": z_fg}
        with nullcontext() if kind == torch.float32 else torch.autocast(z_t.device.type, kind):
            output = network(z_t.to(kind), timestep=TIMES * t, **conditions, return_dict=False)[0]
        return output.float()

    def remove_texture(self, z_fg: Tensor, generator: torch.Generator, steps: int | None = None) -> Tensor:
        """Return z_unt of a foreground [batch, C, F', h, w], starting from random noise.

        Args:
            z_fg: the foreground.
            generator: random number generator of the noise.
            steps: number of steps; defaults to the remover's own.
        """
        noise = torch.randn(z_fg.shape, generator=generator).to(z_fg)
        with torch.no_grad():
            return euler(lambda z, t: self.velocity(z, t, z_fg), noise, steps or self.steps)

    def write(self, folder: Path) -> None:
        """Write the network in diffusers' format, and its number of steps."""
        self.network.save_pretrained(folder)
        (folder / STEPS_FILE).write_text(json.dumps({"steps": self.steps}) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> TextureRemover:
        """Read a remover from a folder, in evaluation mode; the number of steps defaults to 3.

        Raises:
            CheckpointError: when there is none, or it is damaged.
        """
        opened = open_model(folder, dtype="auto", device="cpu", libraries=("diffusers",), classes=KINDS)
        remover = cls(opened.model.requires_grad_(False)).eval()
        if (folder / STEPS_FILE).is_file():
            try:
                remover.steps = parse_json(read_text(folder / STEPS_FILE))["steps"]
            except (LamellaError, ValueError, TypeError, KeyError):
                remover.steps = 0
            if type(remover.steps) is not int or not 1 <= remover.steps <= MOST:
                raise CheckpointError(f"{folder / STEPS_FILE}: no number of steps from 1 to {MOST}: {HINT}")
        return remover


def euler(velocity: Velocity, z: Tensor, steps: int, last_with_gradient: bool = False) -> Tensor:
    """Integrate a flow from noise at t = 1 to t = 0 in equal steps.

    Args:
        velocity: the velocity field.
        z: noise [batch, ...].
        steps: number of steps.
        last_with_gradient: compute gradients in the last step only.
    """
    times = [1 - index / steps for index in range(steps + 1)]
    for index, (t, after) in enumerate(pairwise(times), start=1):
        with torch.set_grad_enabled(torch.is_grad_enabled() and (not last_with_gradient or index == steps)):
            v = velocity(z, torch.full((len(z),), t, device=z.device))
        z = z + (after - t) * v
    return z


def copied_control(network: Any, layers: list[int]) -> dict[str, Tensor]:
    """Return control blocks of VACE as copies of main blocks, whose hints are initialised to zero.

    Args:
        network: the Wan transformer.
        layers: indices of the main blocks to copy.
    """
    import diffusers

    config = {name: each for name, each in network.config.items() if not name.startswith("_")}
    with init_empty_weights():
        empty: Any = diffusers.WanVACETransformer3DModel(**config, vace_layers=layers, vace_in_channels=1)
    found: dict[str, Tensor] = {}
    for index, layer in enumerate(layers):
        initial = {name: each.detach() for name, each in copy.deepcopy(network.blocks[layer]).state_dict().items()}
        for name, each in empty.vace_blocks[index].state_dict().items():
            value = initial[name] if name in initial else torch.zeros(each.shape)
            found[f"vace_blocks.{index}.{name}"] = value
    return found
