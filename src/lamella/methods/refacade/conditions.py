"""What the control branch is told: background, plain object and mask as one tensor, the reference as another.

    c   = [E(X (1 - M_d)) | z_unt | fold(M_d)]       [2 C + s^2, F', H/s, W/s]; 96 channels of Wan
    c_r = [E(ref) | fold(mask of it)]                [C + s^2, 1, H/s, W/s]; 80

The object is cut out by the mask as it is, the hole by the dilated one: a ring is known to neither, and the model fills
it. With one mask for both, a fringe of the old texture stays.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def dilated(mask: Tensor, radius: int) -> Tensor:
    """A mask [frames, 1, height, width] with everything that a box of (2 r + 1)^2 around a pixel reaches."""
    return F.max_pool2d(mask.float(), 2 * radius + 1, stride=1, padding=radius)


def folded(mask: Tensor, s: int) -> Tensor:
    """Each s x s block of a mask [frames, 1, height, width] as s^2 channels [frames, s^2, height / s, width / s]."""
    return F.pixel_unshuffle(mask, s)


def unfolded(channels: Tensor, s: int) -> Tensor:
    """Back."""
    return F.pixel_shuffle(channels, s)


def mask_latent(mask: Tensor, s: int, frames: int) -> Tensor:
    """A mask [frames, 1, height, width] beside latents: [s^2, F', height / s, width / s], the nearest frames of it."""
    channels = folded(mask, s).movedim(1, 0)  # [s^2, frames, height / s, width / s]
    size = (frames, *channels.shape[-2:])
    return F.interpolate(channels[None], size, mode="nearest-exact")[0]


def control(background: Tensor, untextured: Tensor, hole: Tensor) -> Tensor:
    """c, of latents [C, F', h, w] and a mask latent [s^2, F', h, w]."""
    return torch.cat([background, untextured, hole])


def reference(image: Tensor, mask: Tensor) -> Tensor:
    """c_r, of a latent [C, 1, h, w] and a mask latent [s^2, 1, h, w]."""
    return torch.cat([image, mask])
