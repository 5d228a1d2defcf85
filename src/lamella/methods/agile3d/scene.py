"""Scenes to segment (points with colours, in space or in an image), and their tokens."""

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
from lamella.methods.agile3d.sparse import SparseGrid
from lamella.reading import in_utf_8

Floats = NDArray[np.float32]
Labels = NDArray[np.int64]

AXIS = 1 << 20  # cells along one axis, so that a cell id has 63 bits
UNLABELLED = -1


@dataclass(frozen=True)
class ClickScene:
    """P points in D dimensions, validated on construction.

    Attributes:
        coords: positions [P, D]: metres with z up, or pixels (x, y).
        colours: red, green and blue in 0..1 [P, 3]; zeros if unknown.
        objects: the ground-truth object of each point [P], from 1; 0 is background, -1 unlabelled. None if unknown.
        name: name for messages; characters of a file name that are not UTF-8 become question marks.

    Raises:
        CalibrationError: if there is no point, a value is not finite, or the arrays differ in length.
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
                    f"{self.name}: the {what} of point {bad[0]} is not finite ({len(bad)} such points): remove them"
                )
        for what, length in (
            ("colours", len(self.colours)),
            ("objects", count if self.objects is None else len(self.objects)),
        ):
            if length != count:
                raise CalibrationError(f"{self.name} has {count} points and {length} {what}: give one for each point")

    def __len__(self) -> int:
        return len(self.coords)

    @property
    def is_image(self) -> bool:
        """Whether the scene is an image."""
        return self.coords.shape[1] == 2

    @property
    def coords_3d(self) -> Floats:
        """The points in space with z up [P, 3]; an image stands upright and is viewed along y."""
        if not self.is_image:
            return self.coords
        x, y = self.coords.T
        return np.stack([x, np.zeros_like(x), -y], axis=1)

    @property
    def stem(self) -> str:
        """The scene's name, made safe as the beginning of a file name."""
        return re.sub(r"[^\w.-]+", "-", re.sub(r"\.\w{3,4}$", "", self.name)).strip("-.")[:80] or "scene"

    @property
    def suffix(self) -> str:
        """The suffix of files with the labels of this scene."""
        return ".objects.png" if self.is_image else ".labelled.ply"

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of positions and colours; it does not depend on the name or the objects."""
        return hashlib.sha256(_bytes(self.coords) + _bytes(self.colours)).hexdigest()

    def content(self) -> bytes:
        """Return positions, colours and objects as bytes, for hashing."""
        known = () if self.objects is None else (self.objects,)
        return b"".join(map(_bytes, (self.coords, self.colours, *known)))


@dataclass(frozen=True)
class Tokens:
    """A scene as the model sees it: its occupied cells, each represented by the first of its points.

    Attributes:
        scene: the scene of these tokens.
        cells: integer coordinates of each token's cell, from the corner of the scene [N, D].
        kept: index of the point that represents each token [N].
        of_point: index of the token of every point [P].
    """

    scene: ClickScene
    cells: Tensor
    kept: Tensor
    of_point: Tensor

    def __len__(self) -> int:
        return len(self.cells)

    def content(self) -> bytes:
        """Return the content of the scene and its cells as bytes, for hashing."""
        return self.scene.content() + self.cells.cpu().numpy().tobytes()

    @cached_property
    def grid(self) -> SparseGrid:
        """The cells as a grid, which caches its kernel maps."""
        return SparseGrid(self.cells)

    @cached_property
    def coords(self) -> Tensor:
        """Positions of the kept points [N, D]."""
        return self._of_kept(self.scene.coords)

    @cached_property
    def colours(self) -> Tensor:
        """The colours of the kept points [N, 3]."""
        return self._of_kept(self.scene.colours)

    @cached_property
    def objects(self) -> Tensor:
        """Ground-truth objects of the kept points [N]; all unlabelled if the scene has none."""
        if self.scene.objects is None:
            return torch.full_like(self.kept, UNLABELLED)
        return self._of_kept(self.scene.objects)

    def to(self, device: torch.device) -> Tokens:
        """Return the tokens on a device; returns itself, with its caches, if it is there already."""
        if self.cells.device == device:
            return self
        return Tokens(self.scene, self.cells.to(device), self.kept.to(device), self.of_point.to(device))

    def _of_kept(self, values: NDArray[Any]) -> Tensor:
        return torch.from_numpy(values).to(self.kept.device)[self.kept]


def tokenise(scene: ClickScene, size: float) -> Tokens:
    """Return the occupied cells of a scene, in the order of their ids.

    Args:
        scene: the scene.
        size: side of a cell, in the units of the coordinates; the paper's voxels have 0.05 m.

    Raises:
        CalibrationError: for a scene with too many cells along an axis.
    """
    coords = scene.coords.astype(np.float64)
    cells = np.floor((coords - coords.min(axis=0)) / size)  # [P, D]
    if cells.max() >= AXIS:
        raise CalibrationError(
            f"{scene.name} is {cells.max() + 1:.3g} cells of {size:g} wide, more than {AXIS}: give a larger cell size, "
            "or remove outlying points"
        )
    cells = cells.astype(np.int64)
    _, kept, of_point = np.unique(cell_ids(cells), return_index=True, return_inverse=True)
    return Tokens(scene, *map(torch.from_numpy, (cells[kept], kept, of_point)))


def cell_ids(cells: Labels) -> Labels:
    """Return a unique id for each cell [P, D] -> [P].

    Args:
        cells: integer cell coordinates [P, D].
    """
    found = cells[:, 0]
    for axis in range(1, cells.shape[1]):
        found = found * AXIS + cells[:, axis]
    return found


def _bytes(array: NDArray[Any]) -> bytes:
    return f"{array.shape} {array.dtype};".encode() + np.ascontiguousarray(array).tobytes()
