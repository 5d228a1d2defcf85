"""A floor plan: its picture, and what is known of it."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lamella.methods.muranet.drawing import Drawing


@dataclass(frozen=True)
class FloorPlan:
    """One plan.

    Attributes:
        name: of it.
        picture: colours [height, width, 3].
        walls: where a wall is, its openings among it [height, width]; None where nobody has said.
        boxes: class, cx, cy, w, h of each opening, in pixels [n, 5]; None likewise.
        classes: what the classes are called.
        drawing: the vectors, of a plan that was made of them.
    """

    name: str
    picture: NDArray[np.uint8]
    walls: NDArray[np.bool_] | None = None
    boxes: NDArray[np.float32] | None = None
    classes: tuple[str, ...] = ()
    drawing: Drawing | None = None

    @property
    def labelled(self) -> bool:
        return self.walls is not None and self.boxes is not None

    def content(self) -> bytes:
        """Of everything that is known of it, for a digest."""
        parts = [self.picture, self.walls, self.boxes]
        told = json.dumps([self.name, self.classes, [None if each is None else each.shape for each in parts]])
        return b"".join([told.encode(), *(each.tobytes() for each in parts if each is not None)])
