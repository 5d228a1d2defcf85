"""A floor plan: its image and its labels."""

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
        name: its name.
        image: RGB values [height, width, 3].
        walls: mask of walls, including their openings [height, width]; None if unlabelled.
        boxes: class, cx, cy, w, h of each opening, in pixels [n, 5]; None if unlabelled.
        classes: names of the classes.
        drawing: the vectors, for a synthetic plan.
    """

    name: str
    image: NDArray[np.uint8]
    walls: NDArray[np.bool_] | None = None
    boxes: NDArray[np.float32] | None = None
    classes: tuple[str, ...] = ()
    drawing: Drawing | None = None

    @property
    def labelled(self) -> bool:
        """Whether walls and openings are known."""
        return self.walls is not None and self.boxes is not None

    def content(self) -> bytes:
        """Return all data of the plan as bytes, for a digest."""
        parts = [self.image, self.walls, self.boxes]
        header = json.dumps([self.name, self.classes, [None if each is None else each.shape for each in parts]])
        return b"".join([header.encode(), *(each.tobytes() for each in parts if each is not None)])
