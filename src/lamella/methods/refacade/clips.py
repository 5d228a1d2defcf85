"""Clips of objects, with where these are in them and their plain twins where they are known."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lamella.methods.refacade.frames import TEXTURED
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


def of_object(each: TexturedObject) -> Clip:
    """What is seen of an object whose truth is known."""
    composite, mask, untextured = (torch.from_numpy(part) for part in (each.composite, each.mask, each.untextured))
    return Clip(composite, mask, untextured)
