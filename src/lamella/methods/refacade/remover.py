"""The texture remover: from an object on grey to its twin in plain grey material, by a flow in a few steps.

    z_fg = E(X M)        v(z_t, t, z_fg)        eps -> z_unt by Euler's steps, 3 of them, without guidance

On latents it is a VACE network whose control is z_fg; in pixels a small UNet that reads z_fg beside z_t, frame by
frame. Of a VACE network what trains is of float32, whatever its main blocks are of, which it computes in.
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
TOLD, HINT = "removal.json", "give a folder that `lamella run refacade remover` or `distil` has written"
SHAPE = {
    "block_out_channels": (32, 48, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    "norm_num_groups": 8,
    "attention_head_dim": 16,
}


class TextureRemover(nn.Module):
    """A network that takes texture away.

    Args:
        network: a ``WanVACETransformer3DModel`` of latents, or a ``UNet2DModel`` of pixels.
        steps: that it takes, unless it is told otherwise.
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
        """One that has learnt nothing: of latents the base with control blocks, VACE's or copies of every second."""
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
        """Which parameters learn: of a VACE network its control blocks, of a UNet all."""
        return self.kind == UNET or name.startswith("network.vace")

    def velocity(self, z_t: Tensor, t: Tensor, z_fg: Tensor) -> Tensor:
        """v, of noisy latents and foregrounds [batch, C, F', h, w] at times from 0 to 1 [batch]."""
        if self.kind == UNET:
            frames = z_t.shape[2]
            x = torch.cat([z_t, z_fg], dim=1).transpose(1, 2).flatten(0, 1)  # [batch * frames, 2 C, h, w]
            said: Tensor = self.network(x, TIMES * t.repeat_interleave(frames), return_dict=False)[0]
            return said.unflatten(0, (-1, frames)).transpose(1, 2)
        network = self.network
        kind = network.patch_embedding.weight.dtype  # of the main blocks
        text = torch.zeros(len(z_t), WORDS, network.config.text_dim, device=z_t.device, dtype=kind)
        given = {"encoder_hidden_states": text, "control_hidden_states": z_fg}
        with nullcontext() if kind == torch.float32 else torch.autocast(z_t.device.type, kind):
            said = network(z_t.to(kind), timestep=TIMES * t, **given, return_dict=False)[0]
        return said.float()

    def removed(self, z_fg: Tensor, generator: torch.Generator, steps: int | None = None) -> Tensor:
        """z_unt of a foreground [batch, C, F', h, w], from noise of its own; in its own steps when left out."""
        noise = torch.randn(z_fg.shape, generator=generator).to(z_fg)
        with torch.no_grad():
            return euler(lambda z, t: self.velocity(z, t, z_fg), noise, steps or self.steps)

    def write(self, folder: Path) -> None:
        """The network as diffusers writes one, and its steps."""
        self.network.save_pretrained(folder)
        (folder / TOLD).write_text(json.dumps({"steps": self.steps}) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> TextureRemover:
        """The remover in a folder, in evaluation mode; of 3 steps where nothing says another number.

        Raises:
            CheckpointError: when there is none, or it is damaged.
        """
        opened = open_model(folder, dtype="auto", device="cpu", libraries=("diffusers",), classes=KINDS)
        made = cls(opened.model.requires_grad_(False)).eval()
        if (folder / TOLD).is_file():
            try:
                made.steps = parse_json(read_text(folder / TOLD))["steps"]
            except (LamellaError, ValueError, TypeError, KeyError):
                made.steps = 0
            if type(made.steps) is not int or not 1 <= made.steps <= MOST:
                raise CheckpointError(f"{folder / TOLD}: no number of steps from 1 to {MOST}: {HINT}")
        return made


def euler(velocity: Velocity, z: Tensor, steps: int, last_with_gradient: bool = False) -> Tensor:
    """From noise, t = 1, to t = 0 in equal steps along a flow.

    Args:
        last_with_gradient: let nothing but the last step know of gradients.
    """
    times = [1 - number / steps for number in range(steps + 1)]
    for number, (t, after) in enumerate(pairwise(times), start=1):
        with torch.set_grad_enabled(torch.is_grad_enabled() and (not last_with_gradient or number == steps)):
            v = velocity(z, torch.full((len(z),), t, device=z.device))
        z = z + (after - t) * v
    return z


def copied_control(network: Any, layers: list[int]) -> dict[str, Tensor]:
    """Control blocks of VACE as copies of main blocks, whose hints begin at zero."""
    import diffusers

    config = {name: each for name, each in network.config.items() if not name.startswith("_")}
    with init_empty_weights():
        empty: Any = diffusers.WanVACETransformer3DModel(**config, vace_layers=layers, vace_in_channels=1)
    found: dict[str, Tensor] = {}
    for number, layer in enumerate(layers):
        begun = {name: each.detach() for name, each in copy.deepcopy(network.blocks[layer]).state_dict().items()}
        for name, each in empty.vace_blocks[number].state_dict().items():
            value = begun[name] if name in begun else torch.zeros(each.shape)
            found[f"vace_blocks.{number}.{name}"] = value
    return found
