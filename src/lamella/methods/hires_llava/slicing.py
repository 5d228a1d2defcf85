"""Cut an image of any size into slices of the encoder's input size, and keep track of the layout.

    +----+----+----+     rows x columns slices, at most M; the rest of the last row and column has the mean colour.
    |    |    |    |     One more tile shows the whole image, scaled to the size of a slice: the view.
    +----+----+----+     tiles = [view, slice 0 0, slice 0 1, ..., slice 1 0, ...]
    |    |    | ///|
    +----+----+----+

The paper only says that the grid follows size and aspect ratio; this rule is Lamella's. In addition to the pixels, a
model gets the size of the image inside its grid, from which the layout is computed.
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
END = -1  # in an order of tokens: the learned token that ends a row, or a slice


class SliceGrid(NamedTuple):
    """The grid of slices of one image.

    Attributes:
        rows, columns: number of slices.
        height, width: size of the image inside them in pixels, from the upper left corner.
    """

    rows: int
    columns: int
    height: int
    width: int


@dataclass(frozen=True)
class Slicing:
    """How images are cut.

    Attributes:
        side: pixels per side of a slice.
        patch: pixels per side of a patch.
        most: M, the maximum number of slices per image.
        overlap: pixels shared by neighbouring slices; 0 in the paper.
        view: whether the whole image is added beside its slices with all its tokens, sampled like the slices, or not.
        window: k: a sampler makes one token of k x k patches.
        order: order of the tokens: row by row of the whole image, or slice by slice.

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
                f"hires-llava: slices of {self.side} pixels in patches of {self.patch} cannot be divided into windows "
                f"of {self.window} x {self.window} patches: choose another window"
            )
        if self.most < 1 or not 0 <= self.overlap < self.side or self.overlap % self.patch:
            raise MethodError(
                f"hires-llava: at most {self.most} slices with an overlap of {self.overlap} pixels: give at least one "
                f"slice, and an overlap that is a multiple of the patch size {self.patch} and below {self.side}"
            )

    @property
    def across(self) -> int:
        """Patches per side of a slice."""
        return self.side // self.patch

    @property
    def cells(self) -> int:
        """Tokens per side of a slice after the sampler."""
        return self.across // self.window

    def reach(self, slices: int) -> int:
        """Pixels covered by a row of ``slices`` slices."""
        return self.side + (slices - 1) * (self.side - self.overlap)

    def steps(self, pixels: int) -> int:
        """Number of slices in a row that covers ``pixels`` pixels."""
        return max(1, math.ceil((pixels - self.overlap) / (self.side - self.overlap)))

    def fit(self, height: int, width: int) -> SliceGrid:
        """Compute the grid of an image, which is scaled down if it would need more than M slices.

        Args:
            height: height of the image in pixels.
            width: width of the image in pixels.

        >>> Slicing(336, 14, most=4, window=3).fit(1000, 500)
        SliceGrid(rows=2, columns=1, height=672, width=336)
        >>> Slicing(32, 4).fit(50, 90)
        SliceGrid(rows=2, columns=3, height=50, width=90)
        """
        rows, columns = self.steps(height), self.steps(width)
        if rows * columns <= self.most:
            return SliceGrid(rows, columns, height, width)
        scale = max(
            min(self.reach(rows) / height, self.reach(self.most // rows) / width) for rows in range(1, self.most + 1)
        )
        small = [max(1, math.floor(pixels * scale + 1e-6)) for pixels in (height, width)]
        return self.known(*small)

    def known(self, height: int, width: int) -> SliceGrid:
        """Return the grid of an image that fits into M slices.

        Args:
            height: height of the image in pixels.
            width: width of the image in pixels.
        """
        return SliceGrid(self.steps(height), self.steps(width), height, width)

    def tokens(self, height: int, width: int) -> int:
        """Return the number of prompt tokens of an image, with its end tokens.

        Args:
            height: height in pixels, at which the image fits into M slices.
            width: width in pixels.
        """
        shown = {"whole": self.across**2, "sampled": self.cells**2, "none": -1}[self.view] + 1  # with its end token
        return shown + len(self.reading(self.known(height, width)))

    def reading(self, grid: SliceGrid) -> list[int]:
        """Order in which the language model gets the tokens of slices.

        Returns:
            Indices of tokens, counted slice by slice and row by row inside a slice, without those outside the image;
            ``END`` after each row, or each slice.
        """
        return list(_reading(self, grid))

    def real(self, grid: SliceGrid) -> Tensor:
        """Which patches of each slice belong to the image [slices, across, across] bool."""
        step = self.side - self.overlap
        at = torch.arange(self.across) * self.patch
        down = (torch.arange(grid.rows)[:, None] * step + at) < grid.height  # [rows, across]
        along = (torch.arange(grid.columns)[:, None] * step + at) < grid.width
        return (down[:, None, :, None] & along[None, :, None, :]).flatten(0, 1)


@lru_cache(maxsize=1024)
def _reading(slicing: Slicing, grid: SliceGrid) -> tuple[int, ...]:
    cells, window = slicing.cells, slicing.window
    real = slicing.real(grid)[:, ::window, ::window]  # a token belongs to the image if its first patch does
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
class TileLayout:
    """Layout of the tiles of a batch, passed to the layers of the encoder.

    Attributes:
        slicing: how they were cut.
        grids: the grid of each image.
    """

    slicing: Slicing
    grids: tuple[SliceGrid, ...]

    @property
    def shown(self) -> int:
        """Tiles before the slices of each image: 1 with a view, else 0."""
        return int(self.slicing.view != "none")

    @cached_property
    def starts(self) -> list[int]:
        """Index of each image's first tile, and the total number of tiles."""
        starts = [0]
        for grid in self.grids:
            starts.append(starts[-1] + self.shown + grid.rows * grid.columns)
        return starts

    @cached_property
    def views(self) -> Tensor:
        """Indices of the tiles that are views [images]; empty without views."""
        return torch.tensor(self.starts[:-1] if self.shown else [], dtype=torch.long)

    @cached_property
    def groups(self) -> list[tuple[tuple[int, int], Tensor, Tensor]]:
        """Images grouped by the shape of their grids.

        Each group has the rows and columns; the tile indices of the slices [images, rows * columns]; and which patches
        belong to the image [images, rows * columns, across, across] bool.
        """
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
    """Merge slices into one map: [images, rows * columns, h, w, ...] -> [images, rows * h, columns * w, ...].

    Args:
        x: the slices.
        rows: rows of slices.
        columns: columns of slices.
    """
    x = x.unflatten(1, (rows, columns)).transpose(2, 3)  # [images, rows, h, columns, w, ...]
    return x.flatten(3, 4).flatten(1, 2)


def cut(x: Tensor, rows: int, columns: int) -> Tensor:
    """Cut a map into slices, the inverse of :func:`merge`.

    Args:
        x: the map.
        rows: rows of slices.
        columns: columns of slices.
    """
    x = x.unflatten(1, (rows, -1)).unflatten(3, (columns, -1))  # [images, rows, h, columns, w, ...]
    return x.transpose(2, 3).flatten(1, 2)


def make_tiles(image: Tensor, slicing: Slicing, resize: Any, fill: Sequence[float]) -> tuple[Tensor, SliceGrid]:
    """Cut an image into tiles.

    Args:
        image: [3, height, width].
        slicing: how it is cut.
        resize: function of an image and its new height and width.
        fill: colour of the padding [3].

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
