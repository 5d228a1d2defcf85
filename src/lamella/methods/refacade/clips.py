"""Clips of objects, with masks of the objects and their untextured versions if known."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lamella.methods.refacade.frames import TEXTURED, scaled
from lamella.methods.refacade.objects import TexturedObject


class Clip(NamedTuple):
    """A clip of an object.

    Attributes:
        frames: in [-1, 1] [frames, 3, height, width].
        mask: mask of the object [frames, 1, height, width].
        plain: the object in plain grey material on mid grey, if known.
        name: name of the clip.
    """

    frames: Tensor
    mask: Tensor
    plain: Tensor | None
    name: str = TEXTURED

    def fitted(self, height: int, width: int) -> Clip:
        """Return the clip in another size; the aspect ratio may change.

        Args:
            height: new height in pixels.
            width: new width in pixels.
        """
        plain = None if self.plain is None else scaled(self.plain, height, width)
        return Clip(scaled(self.frames, height, width), resized(self.mask, height, width), plain, self.name)


def of_object(each: TexturedObject) -> Clip:
    """Return the clip of a synthetic object."""
    composite, mask, untextured = (torch.from_numpy(part) for part in (each.composite, each.mask, each.untextured))
    return Clip(composite, mask, untextured)


def resized(mask: Tensor, height: int, width: int) -> Tensor:
    """Resize a mask, with nearest neighbours [frames, 1, height, width].

    Args:
        mask: the mask [frames, 1, old height, old width].
        height: new height in pixels.
        width: new width in pixels.
    """
    if mask.shape[-2:] == (height, width):
        return mask
    return F.interpolate(mask, (height, width), mode="nearest-exact")
