"""CubiCasa5K: floor plans with vectors, of which walls, doors and windows are read.

    cubicasa5k/  train.txt, val.txt, test.txt              a folder of a plan on each line, such as /high_quality/17/
                 high_quality/17/F1_scaled.png             the image
                                 model.svg                 its vectors, in pixels of that image

In the vectors, ``<g class="Wall External">`` is a wall, and ``<g class="Door ...">`` and ``<g class="Window ...">`` are
openings, each with a polygon. Walls include their openings; an opening is the rectangle in the wall, without the swing
of a door. The box of an opening in a slanted wall encloses it.

The file is parsed by Python's expat without a document type: entities are refused, so that nothing is expanded or
loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.parsers import expat

import numpy as np
from numpy.typing import NDArray

from lamella.data import Lazy
from lamella.data.images import inside, read_image
from lamella.data.sources import Split
from lamella.errors import CalibrationError
from lamella.extras import require
from lamella.methods.muranet.drawing import KINDS
from lamella.methods.muranet.floor_plan import FloorPlan
from lamella.reading import DEEPEST, check_in_folder, read_lines, read_text

IMAGE, VECTORS = "F1_scaled.png", "model.svg"
TRAIN, TEST = "train.txt", "test.txt"
GROUPS = ("Wall", *(kind.capitalize() for kind in KINDS))
LEAST = 1.0  # smallest width and height of an opening in pixels
Points = NDArray[np.float64]  # x and y [corners, 2]


def is_cubicasa(folder: Path) -> bool:
    """Return whether a folder is CubiCasa5K, or one of its plans."""
    return (folder / VECTORS).is_file() or all((folder / name).is_file() for name in (TRAIN, TEST))


def open_cubicasa(folder: Path, split: Split, count: int) -> Lazy[FloorPlan]:
    """Return the plans of the data set's own training or test split, or one plan; they are read on access.

    Args:
        folder: the folder of the data set, or of a plan.
        split: the split.
        count: maximum number of plans.

    Raises:
        CalibrationError: for a list that names a folder outside.
    """
    if (folder / VECTORS).is_file():
        return Lazy([folder], read_plan)
    name = TEST if split == "test" else TRAIN
    lines = [line.strip("/ ") for _, line in read_lines(folder / name)][:count]
    return Lazy([inside(folder, f"{line}/{VECTORS}", name).parent for line in lines], read_plan)


def read_plan(folder: Path) -> FloorPlan:
    """Read a plan.

    Args:
        folder: its folder.

    Raises:
        CalibrationError: for files that are damaged, or a plan without a wall.
    """
    image = read_image(check_in_folder(folder / IMAGE), str(folder))
    polygons = read_polygons(folder / VECTORS)
    walls = filled(polygons["Wall"], image.shape[:2])
    if not walls.any():
        raise CalibrationError(f"{folder / VECTORS} has no wall within {IMAGE}: remove this plan")
    boxes = [
        [label, *box]
        for label, kind in enumerate(KINDS)
        for polygon in polygons[kind.capitalize()]
        if (box := box_of(polygon, image.shape[:2])) is not None
    ]
    truth = np.array(boxes, np.float32).reshape(-1, 5)
    return FloorPlan(f"{folder.name}.png", image, walls, truth, KINDS)


def filled(polygons: Sequence[Points], size: tuple[int, ...]) -> NDArray[np.bool_]:
    """Return the pixels inside any of some polygons [height, width].

    Args:
        polygons: the polygons.
        size: height and width in pixels.
    """
    fill = require("skimage.draw", "vision", "floor plans").polygon
    found = np.zeros(size, bool)
    for polygon in polygons:
        x, y = polygon.T - 0.5  # from corners to centres of pixels
        found[fill(y, x, size)] = True
    return found


def box_of(polygon: Points, size: tuple[int, ...]) -> tuple[float, float, float, float] | None:
    """Return cx, cy, w and h of the box around a polygon, clipped to the image; None if nothing is left of it.

    Args:
        polygon: the polygon.
        size: height and width of the image in pixels.
    """
    ends = np.array([size[1], size[0]], float)
    low, high = polygon.min(0).clip(0, ends), polygon.max(0).clip(0, ends)
    if (high - low < LEAST).any():
        return None
    (cx, cy), (w, h) = (low + high) / 2, high - low
    return float(cx), float(cy), float(w), float(h)


def read_polygons(file: Path) -> dict[str, list[Points]]:
    """Read the polygons of walls, doors and windows.

    Args:
        file: the SVG file.

    Raises:
        CalibrationError: for a file that is missing or damaged, or that declares or uses entities.
    """
    text = read_text(check_in_folder(file), "give a plan of CubiCasa5K")
    found = _Polygons()
    parser = expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler = found.start, found.end
    parser.EntityDeclHandler = parser.SkippedEntityHandler = parser.ExternalEntityRefHandler = _refuse
    try:
        parser.Parse(text, True)
    except (expat.ExpatError, ValueError) as error:
        raise CalibrationError(f"{file}: not a plan of CubiCasa5K ({error}): download it again") from None
    return found.of_group


def _refuse(*_: Any) -> int:
    raise ValueError("it has entities, which are not read")


@dataclass
class _Polygons:
    """The first polygon of every group of walls, doors or windows.

    Attributes:
        of_group: the polygons by group.
        open: kind of each element that is not closed yet, or an empty string.
    """

    of_group: dict[str, list[Points]] = field(default_factory=lambda: {name: [] for name in GROUPS})
    open: list[str] = field(default_factory=list)

    def start(self, name: str, attributes: Mapping[str, str]) -> None:
        if len(self.open) >= DEEPEST:
            raise ValueError("nested too deeply")
        if name == "polygon" and self.open and self.open[-1]:
            self.of_group[self.open[-1]].append(_points(attributes.get("points", "")))
            self.open[-1] = ""  # further polygons of a group are parts of its drawing
        words = attributes.get("class", "").split() if name == "g" else []
        self.open.append(words[0] if words and words[0] in GROUPS else "")

    def end(self, name: str) -> None:
        self.open.pop()


def _points(text: str) -> Points:
    """Parse ``x,y x,y ...``."""
    found = np.array([float(each) for each in text.replace(",", " ").split()])
    if len(found) < 6 or len(found) % 2 or not (np.abs(found) < 1e6).all():
        raise ValueError(f"a polygon has the points '{text[:60]}'")
    return found.reshape(-1, 2)
