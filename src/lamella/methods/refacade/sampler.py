"""Retexturing: untexture the object, jigsaw the reference, and draw with hints from noise.

    v = v_u + g (v_c - v_u)      v_u: negative text, white reference, no hints

One generator makes the remover's noise and the sampler's: a seed decides the result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lamella.errors import MethodError
from lamella.extras import require
from lamella.methods.refacade.base import TIMES, Base
from lamella.methods.refacade.conditions import control, dilated, mask_latent, reference
from lamella.methods.refacade.jigsaw import Jigsaw, Puzzle
from lamella.methods.refacade.modules import ControlBranch
from lamella.methods.refacade.remover import TextureRemover


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn.

    Attributes:
        steps: of UniPC; 20.
        guidance: g; 1.5. At 1 there is one pass for each step; much more makes colours too strong.
        scale: of the hints; at 0 there are none.
        dilate: r: the hole in the background reaches so many pixels beyond the object; 3.
        removal: Euler's steps that take texture away; as many as the remover was made for when left out, 3 unless it
            was distilled to others.
        negative: text that is read where guidance leads away from.
        paste: put the picture's own pixels back outside the hole, in the end.

    Raises:
        MethodError: for values out of range.
    """

    steps: int = 20
    guidance: float = 1.5
    scale: float = 1.0
    dilate: int = 3
    removal: int | None = None
    negative: str = ""
    paste: bool = False

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("removal", 1), ("dilate", 0), ("scale", 0), ("guidance", 1)):
            value = getattr(self, name)
            if value is not None and not least <= value <= 1000:
                raise MethodError(f"{name} {value:g}: give {least} to 1000")


class Conditions(NamedTuple):
    """What the network is told, a row for each clip [rows, ...].

    Attributes:
        reference: the clean latent that is frame 0 [rows, C, 1, h, w].
        c: of the video [rows, channels, F', h, w].
        c_r: of the reference [rows, channels, 1, h, w].
    """

    reference: Tensor
    c: Tensor
    c_r: Tensor


class Drawn(NamedTuple):
    """What came of it; frames from -1 to 1 [frames, 3, height, width].

    Attributes:
        frames: the retextured ones.
        untextured: the object without texture, as the network was shown it.
        puzzle: the reference, likewise.
    """

    frames: Tensor
    untextured: Tensor
    puzzle: Puzzle


@torch.no_grad()
def conditions(base: Base, frames: Tensor, mask: Tensor, z_unt: Tensor, puzzle: Puzzle, dilate: int) -> Conditions:
    """What the network is told of a clip.

    Args:
        frames: from -1 to 1 [frames, 3, height, width].
        mask: where the object is [frames, 1, height, width].
        z_unt: the latent of its plain twin [C, F', h, w].
        puzzle: the reference.
        dilate: r.
    """
    hole = dilated(mask, dilate)
    background = base.encode(frames * (1 - hole))
    told = mask_latent(hole, base.spatial, background.shape[1]).to(background)
    shown = base.encode(puzzle.image[None])
    where = mask_latent(puzzle.mask[None], base.spatial, 1).to(shown)
    c, c_r = control(background, z_unt, told), reference(shown, where)
    return Conditions(shown[None], c[None], c_r[None])


def guided(base: Base, branch: ControlBranch, z: Tensor, t: Tensor, told: Conditions, sampling: Sampling) -> Tensor:
    """v of a step, with guidance; at g = 1 the conditional pass alone."""
    with branch.attached(base.network, told.c, told.c_r, sampling.scale):
        v_c = base.velocity(z, t, told.reference)
    if sampling.guidance == 1:
        return v_c
    v_u = base.velocity(z, t, base.white(z), base.text(sampling.negative))
    return v_u + sampling.guidance * (v_c - v_u)


@torch.no_grad()
def sampled(
    base: Base, branch: ControlBranch, told: Conditions, sampling: Sampling, generator: torch.Generator
) -> Tensor:
    """Latents drawn from noise [rows, C, F', h, w]; the reference stays clean at every step."""
    diffusers = require("diffusers", "vision", "drawing")
    shape = (len(told.c), base.channels, *told.c.shape[2:])
    z = torch.randn(shape, generator=generator).to(told.reference)
    how = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 1.0}
    scheduler = diffusers.UniPCMultistepScheduler(num_train_timesteps=TIMES, **how)
    scheduler.set_timesteps(sampling.steps)
    for sigma, timestep in zip(scheduler.sigmas.tolist(), scheduler.timesteps, strict=False):
        t = torch.full((len(z),), sigma, device=z.device)
        z = scheduler.step(guided(base, branch, z, t, told, sampling), timestep, z, return_dict=False)[0]
    return z


def retextured(
    base: Base,
    branch: ControlBranch,
    remover: TextureRemover,
    clip: tuple[Tensor, Tensor],
    shown: tuple[Tensor, Tensor],
    *,
    sampling: Sampling = Sampling(),
    jigsaw: Jigsaw = Jigsaw(),  # noqa: B008, frozen
    seed: int = 0,
) -> Drawn:
    """Give an object the texture of a reference.

    Args:
        clip: frames from -1 to 1 [frames, 3, height, width], and where the object is [frames, 1, height, width].
        shown: a reference [3, height, width], and where its object is [1, height, width]; both of the frames' size.
        seed: of all noise, and of the jigsaw.

    Raises:
        MethodError: for sizes that do not fit, or a mask that shows no object.
    """
    frames, mask = clip
    check(base, frames, mask, shown)
    generator = torch.Generator().manual_seed(seed)
    puzzle = jigsaw(*shown, np.random.default_rng(seed), smallest=base.token)
    z_fg = base.encode(frames * mask)
    z_unt = remover.removed(z_fg[None], generator, sampling.removal)[0]
    told = conditions(base, frames, mask, z_unt, puzzle, sampling.dilate)
    drawn = base.decode(sampled(base, branch, told, sampling, generator)[0])
    return Drawn(drawn, base.decode(z_unt), puzzle)


def check(base: Base, frames: Tensor, mask: Tensor, shown: tuple[Tensor, Tensor]) -> None:
    """Check what is to be retextured.

    Raises:
        MethodError: for sizes that do not fit, or a mask that shows no object.
    """
    height, width = frames.shape[-2:]
    base.check_size(height, width)
    if mask.shape != (len(frames), 1, height, width):
        raise MethodError(
            f"a mask {list(mask.shape)} for frames {list(frames.shape)}: give one of their number and size"
        )
    if not mask.any():
        raise MethodError("the mask is empty: give one that marks the object")
    if (len(frames) - 1) % base.temporal:
        raise MethodError(f"{len(frames)} frames: give a multiple of {base.temporal} and one more")
    image, where = shown
    if image.shape != (3, height, width) or where.shape != (1, height, width):
        raise MethodError(f"a reference of {list(image.shape)}: give one of the frames' size, {height} x {width}")
