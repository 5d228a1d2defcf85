"""How an image of any size becomes slices of an encoder's own size, and where each slice lies.

    +----+----+----+     rows x columns slices, at most so many; what is left of the last row and column is mean colour.
    |    |    |    |     One more tile shows the whole image, made as small as a slice: the view.
    +----+----+----+     tiles = [view, slice 0 0, slice 0 1, ..., slice 1 0, ...]
    |    |    | ///|
    +----+----+----+

The paper says that the grid follows size and proportions, and no more; the rule here is ours. Beside the pixels a model
gets the size of the image inside its grid, from which everything else follows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lamella.errors import MethodError

View = Literal["whole", "sampled", "none"]
Order = Literal["raster", "slices"]
END = -1  # in an order of tokens: the learnt one that ends a row, or a slice


class Grid(NamedTuple):
    """How one image lies in its slices.

    Attributes:
        rows, columns: of slices.
        height, width: pixels of the image inside them, from the upper left corner.
    """

    rows: int
    columns: int
    height: int
    width: int


@dataclass(frozen=True)
class Slicing:
    """How images are cut.

    Attributes:
        side: pixels of a slice.
        patch: pixels of a patch, both on a side.
        most: M, the most slices of an image.
        overlap: pixels that neighbouring slices share; 0 in the paper.
        view: whether the whole image is shown beside its slices, with all its tokens, sampled as they are, or not.
        window: k: a sampler makes one token of k x k.
        order: in which tokens are read: row by row of the whole image, or slice by slice.

    Raises:
        MethodError: for sizes that do not fit each other.
    """

    side: int
    patch: int
    most: int = 16
    overlap: int = 0
    view: View = "whole"
    window: int = 2
    order: Order = "raster"

    def __post_init__(self) -> None:
        if min(self.patch, self.window) < 1 or self.side % self.patch or self.side // self.patch % self.window:
            raise MethodError(
                f"hires-llava: slices of {self.side} pixels in patches of {self.patch} are no multiple of windows of "
                f"{self.window} patches: choose another window"
            )
        if self.most < 1 or not 0 <= self.overlap < self.side or self.overlap % self.patch:
            raise MethodError(
                f"hires-llava: at most {self.most} slices that share {self.overlap} pixels: give 1 or more, and whole "
                f"patches of {self.patch} pixels below {self.side}"
            )

    @property
    def across(self) -> int:
        """Patches of a slice, on a side."""
        return self.side // self.patch

    @property
    def cells(self) -> int:
        """Tokens of a slice behind a sampler, on a side."""
        return self.across // self.window

    def reach(self, slices: int) -> int:
        """Pixels that so many slices in a row cover."""
        return self.side + (slices - 1) * (self.side - self.overlap)

    def steps(self, pixels: int) -> int:
        """How many slices in a row cover so many pixels."""
        return max(1, math.ceil((pixels - self.overlap) / (self.side - self.overlap)))

    def fit(self, height: int, width: int) -> Grid:
        """The grid of an image, which is made smaller where it would take more slices than there may be.

        >>> Slicing(336, 14, most=4, window=3).fit(1000, 500)
        Grid(rows=2, columns=1, height=672, width=336)
        >>> Slicing(32, 4).fit(50, 90)
        Grid(rows=2, columns=3, height=50, width=90)
        """
        rows, columns = self.steps(height), self.steps(width)
        if rows * columns <= self.most:
            return Grid(rows, columns, height, width)
        scale = max(
            min(self.reach(rows) / height, self.reach(self.most // rows) / width) for rows in range(1, self.most + 1)
        )
        small = [max(1, math.floor(pixels * scale + 1e-6)) for pixels in (height, width)]
        return self.known(*small)

    def known(self, height: int, width: int) -> Grid:
        """The grid of an image that fits."""
        return Grid(self.steps(height), self.steps(width), height, width)

    def tokens(self, height: int, width: int) -> int:
        """How many positions of a prompt an image takes, whose size in its grid is this."""
        shown = {"whole": self.across**2, "sampled": self.cells**2, "none": -1}[self.view] + 1  # and what ends it
        return shown + len(self.reading(self.known(height, width)))

    def reading(self, grid: Grid) -> list[int]:
        """In which order the tokens of slices are read.

        Returns:
            Numbers of tokens, counted slice by slice and row by row inside a slice, without those of which nothing is
            image; ``END`` behind each row, or each slice.
        """
        return list(_reading(self, grid))

    def real(self, grid: Grid) -> Tensor:
        """Which patches of each slice show some of the image [slices, across, across] bool."""
        step = self.side - self.overlap
        at = torch.arange(self.across) * self.patch
        down = (torch.arange(grid.rows)[:, None] * step + at) < grid.height  # [rows, across]
        along = (torch.arange(grid.columns)[:, None] * step + at) < grid.width
        return (down[:, None, :, None] & along[None, :, None, :]).flatten(0, 1)


@lru_cache(maxsize=1024)
def _reading(slicing: Slicing, grid: Grid) -> tuple[int, ...]:
    cells, window = slicing.cells, slicing.window
    real = slicing.real(grid)[:, ::window, ::window]  # a cell is image where its first patch is
    number = torch.arange(real.numel()).view(grid.rows, grid.columns, cells, cells)
    number = number.masked_fill(~real.view_as(number), END - 1)
    if slicing.order == "raster":
        number = number.transpose(1, 2)
    lines = number.reshape(grid.rows * cells if slicing.order == "raster" else grid.rows * grid.columns, -1)
    found: list[int] = []
    for line in lines.tolist():
        kept = [each for each in line if each >= 0]
        found += [*kept, END] if kept else []
    return tuple(found)


@dataclass(frozen=True)
class Slices:
    """Where the tiles of a batch lie: what a layer of the encoder is told beside them.

    Attributes:
        slicing: how they were cut.
        grids: of the images.
    """

    slicing: Slicing
    grids: tuple[Grid, ...]

    @property
    def shown(self) -> int:
        """Tiles before the slices of each image: its view, if there is one."""
        return int(self.slicing.view != "none")

    @cached_property
    def starts(self) -> list[int]:
        """The number of each image's first tile, and that of all tiles."""
        starts = [0]
        for grid in self.grids:
            starts.append(starts[-1] + self.shown + grid.rows * grid.columns)
        return starts

    @cached_property
    def views(self) -> Tensor:
        """The tiles that are views [images], or none."""
        return torch.tensor(self.starts[:-1] if self.shown else [], dtype=torch.long)

    @cached_property
    def groups(self) -> list[tuple[tuple[int, int], Tensor, Tensor]]:
        """Images whose grids have one shape, together: rows and columns; their slices [images, rows * columns]; and
        which patches are image [images, rows * columns, across, across] bool."""
        alike: dict[tuple[int, int], list[int]] = {}
        for image, grid in enumerate(self.grids):
            alike.setdefault(grid[:2], []).append(image)
        found = []
        for (rows, columns), images in alike.items():
            first = torch.tensor([self.starts[image] + self.shown for image in images])
            tiles = first[:, None] + torch.arange(rows * columns)
            found.append(
                ((rows, columns), tiles, torch.stack([self.slicing.real(self.grids[each]) for each in images]))
            )
        return found


def merge(x: Tensor, rows: int, columns: int) -> Tensor:
    """Slices as one map: [images, rows * columns, h, w, ...] -> [images, rows * h, columns * w, ...]."""
    x = x.unflatten(1, (rows, columns)).transpose(2, 3)  # [images, rows, h, columns, w, ...]
    return x.flatten(3, 4).flatten(1, 2)


def cut(x: Tensor, rows: int, columns: int) -> Tensor:
    """The map as slices again, the inverse of :func:`merge`."""
    x = x.unflatten(1, (rows, -1)).unflatten(3, (columns, -1))  # [images, rows, h, columns, w, ...]
    return x.transpose(2, 3).flatten(1, 2)


def tiled(image: Tensor, slicing: Slicing, resize: Any, fill: Sequence[float]) -> tuple[Tensor, Grid]:
    """An image as tiles.

    Args:
        image: [3, height, width].
        slicing: how it is cut.
        resize: from an image and its new height and width to that.
        fill: the colour of what is no image [3].

    Returns:
        [view and slices, 3, side, side], and the grid.
    """
    grid = slicing.fit(*image.shape[1:])
    rows, columns, height, width = grid
    inside = image if image.shape[1:] == (height, width) else resize(image, height, width)
    padded = torch.tensor(fill, dtype=image.dtype)[:, None, None].repeat(1, slicing.reach(rows), slicing.reach(columns))
    padded[:, :height, :width] = inside
    step = slicing.side - slicing.overlap
    found = padded.unfold(1, slicing.side, step).unfold(2, slicing.side, step)  # [3, rows, columns, side, side]
    slices = found.permute(1, 2, 0, 3, 4).flatten(0, 1)
    if slicing.view == "none":
        return slices, grid
    return torch.cat([resize(image, slicing.side, slicing.side)[None], slices]), grid
