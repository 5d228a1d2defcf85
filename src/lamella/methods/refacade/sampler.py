"""Retexturing: remove the texture of the object, jigsaw the reference, and generate from noise with hints.

    v = v_u + g (v_c - v_u)      v_u: negative prompt, white reference, no hints

One generator provides the noise of the remover and of the sampler: a seed determines the result.
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
from lamella.methods.refacade.conditions import control, dilate_mask, mask_latent, reference
from lamella.methods.refacade.jigsaw import Jigsaw, Puzzle
from lamella.methods.refacade.modules import ControlBranch
from lamella.methods.refacade.remover import TextureRemover


@dataclass(frozen=True)
class SamplerSettings:
    """Settings of the sampler.

    Attributes:
        steps: number of steps of UniPC; 20 in the paper.
        guidance: g; 1.5 in the paper. At 1 there is one pass per step; large values oversaturate colours.
        scale: factor on the hints; at 0 there are none.
        dilate: r, dilation of the hole in the background in pixels; 3 in the paper.
        removal: number of Euler steps of the texture remover; defaults to the remover's own, 3 unless it was distilled.
        negative: negative prompt of guidance.
        paste: restore the image's own pixels outside the hole in the end.

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
    """Conditions of the network, one row per clip [rows, ...].

    Attributes:
        reference: the clean latent of frame 0 [rows, C, 1, h, w].
        c: condition of the video [rows, channels, F', h, w].
        c_r: condition of the reference [rows, channels, 1, h, w].
    """

    reference: Tensor
    c: Tensor
    c_r: Tensor


class RetexturedClip(NamedTuple):
    """The result of sampling; frames in [-1, 1] [frames, 3, height, width].

    Attributes:
        frames: the retextured frames.
        untextured: the untextured object, as network input.
        puzzle: the reference, as network input.
    """

    frames: Tensor
    untextured: Tensor
    puzzle: Puzzle


@torch.no_grad()
def conditions(base: Base, frames: Tensor, mask: Tensor, z_unt: Tensor, puzzle: Puzzle, dilate: int) -> Conditions:
    """Return the conditions of a clip.

    Args:
        base: the video transformer.
        frames: in [-1, 1] [frames, 3, height, width].
        mask: mask of the object [frames, 1, height, width].
        z_unt: latent of the untextured object [C, F', h, w].
        puzzle: the reference.
        dilate: r.
    """
    hole = dilate_mask(mask, dilate)
    background = base.encode(frames * (1 - hole))
    hole_latent = mask_latent(hole, base.spatial, background.shape[1]).to(background)
    latent = base.encode(puzzle.image[None])
    where = mask_latent(puzzle.mask[None], base.spatial, 1).to(latent)
    c, c_r = control(background, z_unt, hole_latent), reference(latent, where)
    return Conditions(latent[None], c[None], c_r[None])


def guided_velocity(
    base: Base, branch: ControlBranch, z: Tensor, t: Tensor, conditioning: Conditions, sampling: SamplerSettings
) -> Tensor:
    """Return v of a sampling step with classifier-free guidance; at g = 1, that of the conditional pass alone.

    Args:
        base: the video transformer.
        branch: its control branch.
        z: noisy latents [rows, C, F', h, w].
        t: times in [0, 1] [rows].
        conditioning: the conditions.
        sampling: settings, of which ``guidance``, ``scale`` and ``negative`` are used.
    """
    with branch.attached(base.network, conditioning.c, conditioning.c_r, sampling.scale):
        v_c = base.velocity(z, t, conditioning.reference)
    if sampling.guidance == 1:
        return v_c
    v_u = base.velocity(z, t, base.white(z), base.text(sampling.negative))
    return v_u + sampling.guidance * (v_c - v_u)


@torch.no_grad()
def sample_latents(
    base: Base, branch: ControlBranch, conditioning: Conditions, sampling: SamplerSettings, generator: torch.Generator
) -> Tensor:
    """Sample latents from noise [rows, C, F', h, w]; the reference stays clean in every step.

    Args:
        base: the video transformer.
        branch: its control branch.
        conditioning: the conditions of each row.
        sampling: settings of the sampler.
        generator: random generator of the initial noise.
    """
    diffusers = require("diffusers", "vision", "drawing")
    shape = (len(conditioning.c), base.channels, *conditioning.c.shape[2:])
    z = torch.randn(shape, generator=generator).to(conditioning.reference)
    options = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 1.0}
    scheduler = diffusers.UniPCMultistepScheduler(num_train_timesteps=TIMES, **options)
    scheduler.set_timesteps(sampling.steps)
    for sigma, timestep in zip(scheduler.sigmas.tolist(), scheduler.timesteps, strict=False):
        t = torch.full((len(z),), sigma, device=z.device)
        z = scheduler.step(guided_velocity(base, branch, z, t, conditioning, sampling), timestep, z, return_dict=False)[
            0
        ]
    return z


def retexture(
    base: Base,
    branch: ControlBranch,
    remover: TextureRemover,
    clip: tuple[Tensor, Tensor],
    shown: tuple[Tensor, Tensor],
    *,
    sampling: SamplerSettings = SamplerSettings(),
    jigsaw: Jigsaw = Jigsaw(),  # noqa: B008, frozen
    seed: int = 0,
) -> RetexturedClip:
    """Transfer the texture of a reference to an object.

    Args:
        base: the video transformer.
        branch: the control branch.
        remover: the texture remover.
        clip: frames in [-1, 1] [frames, 3, height, width], and the mask of the object [frames, 1, height, width].
        shown: a reference [3, height, width], and the mask of its object [1, height, width]; both in the size of the
            frames.
        sampling: settings of the sampler.
        jigsaw: settings of the jigsaw.
        seed: random seed of all noise and of the jigsaw.

    Raises:
        MethodError: for sizes that do not fit, or an empty mask.
    """
    frames, mask = clip
    check(base, frames, mask, shown)
    generator = torch.Generator().manual_seed(seed)
    puzzle = jigsaw(*shown, np.random.default_rng(seed), smallest=base.token)
    z_fg = base.encode(frames * mask)
    z_unt = remover.remove_texture(z_fg[None], generator, sampling.removal)[0]
    conditioning = conditions(base, frames, mask, z_unt, puzzle, sampling.dilate)
    decoded = base.decode(sample_latents(base, branch, conditioning, sampling, generator)[0])
    return RetexturedClip(decoded, base.decode(z_unt), puzzle)


def check(base: Base, frames: Tensor, mask: Tensor, shown: tuple[Tensor, Tensor]) -> None:
    """Check the inputs of retexturing.

    Args:
        base: the video transformer.
        frames: the clip [frames, 3, height, width].
        mask: mask of the object [frames, 1, height, width].
        shown: the reference [3, height, width] and the mask of its object [1, height, width].

    Raises:
        MethodError: for sizes that do not fit, or an empty mask.
    """
    height, width = frames.shape[-2:]
    base.check_size(height, width)
    if mask.shape != (len(frames), 1, height, width):
        raise MethodError(
            f"a mask {list(mask.shape)} for frames {list(frames.shape)}: give one mask per frame, of the same size"
        )
    if not mask.any():
        raise MethodError("the mask is empty: mark the object in it")
    if (len(frames) - 1) % base.temporal:
        raise MethodError(f"{len(frames)} frames: give a multiple of {base.temporal} plus one")
    image, where = shown
    if image.shape != (3, height, width) or where.shape != (1, height, width):
        raise MethodError(f"a reference of {list(image.shape)}: give one of the frames' size, {height} x {width}")
