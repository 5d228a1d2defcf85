"""Inputs of the control branch: background, untextured object and mask as one tensor, the reference as another.

    c   = [E(X (1 - M_d)) | z_unt | fold(M_d)]       [2 C + s^2, F', H/s, W/s]; 96 channels for Wan
    c_r = [E(ref) | fold(mask of it)]                [C + s^2, 1, H/s, W/s]; 80 channels

The object is cut out by the original mask, the hole by the dilated one: neither contains the ring in between, which the
model fills. With one mask for both, a fringe of the old texture remains.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def dilate_mask(mask: Tensor, radius: int) -> Tensor:
    """Dilate a mask with a box of (2 r + 1)^2 pixels.

    Args:
        mask: the mask [frames, 1, height, width].
        radius: r, in pixels.
    """
    return F.max_pool2d(mask.float(), 2 * radius + 1, stride=1, padding=radius)


def fold_mask(mask: Tensor, s: int) -> Tensor:
    """Move each s x s block of a mask to channels [frames, s^2, height / s, width / s].

    Args:
        mask: the mask [frames, 1, height, width]; both sides are multiples of s.
        s: spatial downsampling of the latents.
    """
    return F.pixel_unshuffle(mask, s)


def unfold_mask(channels: Tensor, s: int) -> Tensor:
    """Invert :func:`fold_mask`.

    Args:
        channels: the folded mask [frames, s^2, height / s, width / s].
        s: spatial downsampling of the latents.
    """
    return F.pixel_shuffle(channels, s)


def mask_latent(mask: Tensor, s: int, frames: int) -> Tensor:
    """Return a mask in the size of latents [s^2, F', height / s, width / s].

    Latent frames take the nearest frames of the mask.

    Args:
        mask: the mask [frames, 1, height, width].
        s: spatial downsampling of the latents.
        frames: F', the number of latent frames.
    """
    channels = fold_mask(mask, s).movedim(1, 0)  # [s^2, frames, height / s, width / s]
    size = (frames, *channels.shape[-2:])
    return F.interpolate(channels[None], size, mode="nearest-exact")[0]


def control(background: Tensor, untextured: Tensor, hole: Tensor) -> Tensor:
    """Concatenate c, the condition of the video [2 C + s^2, F', h, w].

    Args:
        background: latent of the background [C, F', h, w].
        untextured: latent of the untextured object [C, F', h, w].
        hole: mask latent of the hole in the background [s^2, F', h, w].
    """
    return torch.cat([background, untextured, hole])


def reference(image: Tensor, mask: Tensor) -> Tensor:
    """Concatenate c_r, the condition of the reference [C + s^2, 1, h, w].

    Args:
        image: latent of the reference image [C, 1, h, w].
        mask: mask latent of its object [s^2, 1, h, w].
    """
    return torch.cat([image, mask])
