"""What is segmented: points with colours, in space or in a picture, and the tokens that they are to a model."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lamella.errors import CalibrationError
from lamella.methods.agile3d.sparse import Grid
from lamella.reading import in_utf_8

Floats = NDArray[np.float32]
Labels = NDArray[np.int64]

AXIS = 1 << 20  # cells along one axis, so that a cell's number has 63 bits
UNLABELLED = -1


@dataclass(frozen=True)
class Scene:
    """P points in D dimensions, checked.

    Attributes:
        coords: where they are [P, D]: metres with z up, or pixels (x, y).
        colours: red, green and blue in 0..1 [P, 3]; zeros where nothing is known.
        objects: the true object of each [P], from 1; 0 is background, -1 unlabelled. None where it is not known.
        name: for messages. Of a file name that is not UTF-8, each character that the page and JSON lack is a
            question mark.

    Raises:
        CalibrationError: when there is no point, a number is not finite, or the parts do not fit each other.
    """

    coords: Floats
    colours: Floats
    objects: Labels | None = None
    name: str = "the scene"

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", in_utf_8(self.name))
        count = len(self.coords)
        if count == 0:
            raise CalibrationError(f"{self.name} has no points: give a scene with at least one")
        for what, array in (("position", self.coords), ("colour", self.colours)):
            bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
            if len(bad):
                raise CalibrationError(
                    f"{self.name}: the {what} of point {bad[0]} is not finite, one of {len(bad)} such: leave them out"
                )
        for what, given in (
            ("colours", len(self.colours)),
            ("objects", count if self.objects is None else len(self.objects)),
        ):
            if given != count:
                raise CalibrationError(f"{self.name} has {count} points and {given} {what}: give one for each")

    def __len__(self) -> int:
        return len(self.coords)

    @property
    def flat(self) -> bool:
        """Whether it is a picture."""
        return self.coords.shape[1] == 2

    @property
    def placed(self) -> Floats:
        """The points in space, z up [P, 3]; a picture stands upright and is looked at along y."""
        if not self.flat:
            return self.coords
        x, y = self.coords.T
        return np.stack([x, np.zeros_like(x), -y], axis=1)

    @property
    def stem(self) -> str:
        """Its name as the beginning of that of a file."""
        return re.sub(r"[^\w.-]+", "-", re.sub(r"\.\w{3,4}$", "", self.name)).strip("-.")[:80] or "scene"

    @property
    def ending(self) -> str:
        """How the name of a file with its labels ends."""
        return ".objects.png" if self.flat else ".labelled.ply"

    @cached_property
    def digest(self) -> str:
        """Of positions and colours: equal scenes have equal ones, whoever named and labelled them."""
        return hashlib.sha256(_bytes(self.coords) + _bytes(self.colours)).hexdigest()

    def content(self) -> bytes:
        """All of it but its name."""
        known = () if self.objects is None else (self.objects,)
        return b"".join(map(_bytes, (self.coords, self.colours, *known)))


@dataclass(frozen=True)
class Tokens:
    """A scene as a model sees it: its occupied cells, each seen through the first of its points.

    Attributes:
        scene: of which they are.
        cells: the cell of each token, in whole cells from the corner of the scene [N, D].
        kept: the point that stands for it [N].
        of_point: the token of every point [P].
    """

    scene: Scene
    cells: Tensor
    kept: Tensor
    of_point: Tensor

    def __len__(self) -> int:
        return len(self.cells)

    def content(self) -> bytes:
        """Of the scene, and its cells."""
        return self.scene.content() + self.cells.cpu().numpy().tobytes()

    @cached_property
    def grid(self) -> Grid:
        """The cells as a grid, whose pairs are found once."""
        return Grid(self.cells)

    @cached_property
    def coords(self) -> Tensor:
        """Where the kept points are [N, D]."""
        return self._of_kept(self.scene.coords)

    @cached_property
    def colours(self) -> Tensor:
        """The colours of the kept points [N, 3]."""
        return self._of_kept(self.scene.colours)

    @cached_property
    def objects(self) -> Tensor:
        """The true objects of the kept points [N]; unlabelled where the scene has none."""
        if self.scene.objects is None:
            return torch.full_like(self.kept, UNLABELLED)
        return self._of_kept(self.scene.objects)

    def to(self, device: torch.device) -> Tokens:
        """The same on another device; itself, with all that was found, where it is there already."""
        if self.cells.device == device:
            return self
        return Tokens(self.scene, self.cells.to(device), self.kept.to(device), self.of_point.to(device))

    def _of_kept(self, values: NDArray[Any]) -> Tensor:
        return torch.from_numpy(values).to(self.kept.device)[self.kept]


def tokenise(scene: Scene, size: float) -> Tokens:
    """The occupied cells of a scene, in the order of their numbers.

    Args:
        size: of a cell, in the units of the coordinates; the paper's voxels have 0.05 m.

    Raises:
        CalibrationError: for a scene of more cells along an axis than can be numbered.
    """
    coords = scene.coords.astype(np.float64)
    cells = np.floor((coords - coords.min(axis=0)) / size)  # [P, D]
    if cells.max() >= AXIS:
        raise CalibrationError(
            f"{scene.name} is {cells.max() + 1:.3g} cells of {size:g} wide, more than {AXIS}: give larger cells, or "
            "leave out points that lie far away"
        )
    cells = cells.astype(np.int64)
    _, kept, of_point = np.unique(number(cells), return_index=True, return_inverse=True)
    return Tokens(scene, *map(torch.from_numpy, (cells[kept], kept, of_point)))


def number(cells: Labels) -> Labels:
    """One number for each cell [P, D], other cells having other numbers."""
    found = cells[:, 0]
    for axis in range(1, cells.shape[1]):
        found = found * AXIS + cells[:, axis]
    return found


def _bytes(array: NDArray[Any]) -> bytes:
    return f"{array.shape} {array.dtype};".encode() + np.ascontiguousarray(array).tobytes()
