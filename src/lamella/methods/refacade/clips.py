"""Clips of objects, with where these are in them and their plain twins where they are known."""

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
        frames: from -1 to 1 [frames, 3, height, width].
        mask: where the object is [frames, 1, height, width].
        plain: the object in plain grey material, on mid grey, where that is known.
        name: what to call it.
    """

    frames: Tensor
    mask: Tensor
    plain: Tensor | None
    name: str = TEXTURED

    def fitted(self, height: int, width: int) -> Clip:
        """The same clip in another size."""
        plain = None if self.plain is None else scaled(self.plain, height, width)
        return Clip(scaled(self.frames, height, width), resized(self.mask, height, width), plain, self.name)


def of_object(each: TexturedObject) -> Clip:
    """What is seen of an object whose truth is known."""
    composite, mask, untextured = (torch.from_numpy(part) for part in (each.composite, each.mask, each.untextured))
    return Clip(composite, mask, untextured)


def resized(mask: Tensor, height: int, width: int) -> Tensor:
    """A mask [frames, 1, ...] in another size."""
    if mask.shape[-2:] == (height, width):
        return mask
    return F.interpolate(mask, (height, width), mode="nearest-exact")
