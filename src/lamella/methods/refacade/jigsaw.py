"""Jigsaw permutation: the reference shows its texture, but not its shape.

    crop to the object, scale to the canvas     cut into P x P cells, keep those that the object fills
    permute, flip each at random                assemble to a rectangle, centre it on white

Structures larger than a cell (a logo, text, wide stripes) are destroyed on purpose. With fewer than four whole cells
the object stays as it is: its outline may then leak into the result, which is reported.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lamella.errors import MethodError

WHITE = 1.0
FEWEST = 4  # minimum number of cells
EASIER = ((0.05, 0.75), (0.10, 0.60))  # with fewer cells: reductions of the coverage, and their lower limits
LARGEST = 192  # maximum side of a cell in pixels


class Puzzle(NamedTuple):
    """A reference as network input.

    Attributes:
        image: in [-1, 1] [3, height, width].
        mask: mask of the texture [1, height, width], 0 or 1.
        fallback: whether there were too few whole cells, so that it is not jigsawed.
        cells: number of cells.
        side: P, the side of a cell in pixels.
    """

    image: Tensor
    mask: Tensor
    fallback: bool
    cells: int
    side: int


@dataclass(frozen=True)
class Jigsaw:
    """Settings of the jigsaw of a reference.

    Attributes:
        ratio: side of a cell over the shorter side of the image; 0.2 in the authors' pipeline (0.1 in its demo). 1: no
            jigsaw.
        coverage: fraction of a cell that the object must fill; 0.9 in the authors' pipeline (0.8 in its demo).

    Raises:
        MethodError: for values out of range.
    """

    ratio: float = 0.2
    coverage: float = 0.9

    def __post_init__(self) -> None:
        if not (0 < self.ratio <= 1 and 0 < self.coverage <= 1):
            raise MethodError(f"ratio {self.ratio:g}, coverage {self.coverage:g}: give fractions above 0, up to 1")

    def side(self, height: int, width: int, smallest: int = 16) -> int:
        """Return P, the side of a cell in pixels, for an image of this size.

        Args:
            height: height of the image in pixels.
            width: width of the image in pixels.
            smallest: minimum of P: the side of a token, 16 pixels for Wan.
        """
        return int(np.clip(round(self.ratio * min(height, width)), smallest, min(LARGEST, height, width)))

    def __call__(
        self, image: Tensor, mask: Tensor, rng: np.random.Generator, smallest: int = 16, side: int | None = None
    ) -> Puzzle:
        """Cut a reference into cells and assemble them in random order.

        Args:
            image: in [-1, 1] [3, height, width].
            mask: mask of the object [1, height, width], 0 or 1.
            rng: random number generator of the order and the flips.
            smallest: minimum side of a cell in pixels.
            side: side of a cell; overrides ratio.

        Raises:
            MethodError: for an empty mask.
        """
        height, width = image.shape[-2:]
        p = side or self.side(height, width, smallest)
        image, mask = image.float(), mask.float()  # fold and unfold do not support half precision on the CPU
        padded, shown = centre_object(pad_reflect(image, p), pad_zero(mask, p))
        whole = centre_object(image, mask)
        if self.ratio == 1:
            return Puzzle(*whole, False, 0, p)
        cells, covered = cut_cells(pad_reflect(padded, p), p), cut_cells(pad_zero(shown, p), p).mean(dim=(1, 2, 3))
        for less, least in ((0.0, 0.0), *EASIER):
            chosen = cells[covered >= max(self.coverage - less, min(least, self.coverage))]
            if len(chosen) >= FEWEST:
                return Puzzle(*self._assemble(chosen, rng, height, width), False, len(chosen), p)
        return Puzzle(*whole, True, 0, p)

    def _assemble(self, chosen: Tensor, rng: np.random.Generator, height: int, width: int) -> tuple[Tensor, Tensor]:
        chosen = chosen[torch.from_numpy(rng.permutation(len(chosen)))]
        flips = rng.choice(["none", "across", "down"], size=len(chosen), p=[0.5, 0.25, 0.25])
        flipped = [cell.flip({"across": -1, "down": -2}[how]) if how != "none" else cell
                  for cell, how in zip(chosen, flips, strict=True)]  # fmt: skip
        p = chosen.shape[-1]
        columns = min(math.isqrt(len(chosen)), max(1, width // p))
        rows = len(chosen) // columns
        mosaic = torch.stack(flipped[: rows * columns]).unflatten(0, (rows, columns))  # [rows, columns, 3, P, P]
        mosaic = mosaic.permute(2, 0, 3, 1, 4).reshape(3, rows * p, columns * p)
        return on_white(mosaic, torch.ones_like(mosaic[:1]), height, width)

    def for_training(self, image: Tensor, mask: Tensor, rng: np.random.Generator, smallest: int = 16) -> Puzzle:
        """Jigsaw with cells of random size: from the smallest to the largest square within the object.

        With fewer than four whole cells of that size, the size is halved repeatedly.

        Args:
            image: in [-1, 1] [3, height, width].
            mask: mask of the object [1, height, width], 0 or 1.
            rng: random number generator.
            smallest: minimum side of a cell in pixels.
        """
        _, shown = centre_object(image, mask)
        largest = max(smallest, inscribed(shown[0].numpy() > 0.5))
        side = int(rng.integers(smallest, largest + 1))
        puzzle = self(image, mask, rng, smallest, side)
        while puzzle.fallback and side > smallest:
            side = max(smallest, side // 2)
            puzzle = self(image, mask, rng, smallest, side)
        return puzzle


def cut_cells(image: Tensor, p: int) -> Tensor:
    """Cut an image into square cells, row by row [cells, channels, P, P].

    Args:
        image: the image [channels, height, width]; an incomplete row or column of cells is dropped.
        p: P, the side of a cell in pixels.
    """
    channels = image.shape[0]
    return F.unfold(image[None], p, stride=p)[0].T.reshape(-1, channels, p, p)


def pad_reflect(image: Tensor, p: int) -> Tensor:
    """Pad an image at the bottom and on the right to multiples of P, by reflection.

    Args:
        image: the image [channels, height, width].
        p: P, the side of a cell in pixels.
    """
    down, across = (-image.shape[-2]) % p, (-image.shape[-1]) % p
    while down or across:  # reflection cannot exceed the size of the image
        bottom, right = min(down, image.shape[-2] - 1), min(across, image.shape[-1] - 1)
        image = F.pad(image[None], (0, right, 0, bottom), mode="reflect")[0]
        down, across = down - bottom, across - right
    return image


def pad_zero(mask: Tensor, p: int) -> Tensor:
    """Pad a mask at the bottom and on the right to multiples of P, with zeros.

    Args:
        mask: the mask [..., height, width].
        p: P, the side of a cell in pixels.
    """
    return F.pad(mask, (0, (-mask.shape[-1]) % p, 0, (-mask.shape[-2]) % p))


def centre_object(image: Tensor, mask: Tensor, size: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
    """Return the object of an image, scaled to the canvas and centred on white.

    Args:
        image: in [-1, 1] [3, height, width].
        mask: mask of the object [1, height, width].
        size: height and width of the canvas; defaults to those of the image.

    Raises:
        MethodError: for an empty mask.
    """
    rows, columns = (torch.nonzero(mask[0].amax(dim=axis) > 0.5)[:, 0] for axis in (1, 0))
    if not len(rows):
        raise MethodError("the reference has no object: give a mask with one")
    box = (slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1))
    return on_white(image[:, *box], mask[:, *box], *(size or image.shape[-2:]))


def on_white(image: Tensor, mask: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Scale an image to fit a canvas and centre it; pixels outside its mask become white.

    Args:
        image: values in [-1, 1] [3, old height, old width].
        mask: mask of the object, 0 or 1 [1, old height, old width].
        height: height of the canvas in pixels.
        width: width of the canvas in pixels.
    """
    times = min(height / image.shape[-2], width / image.shape[-1])
    size = tuple(
        max(1, min(most, round(times * side))) for most, side in zip((height, width), image.shape[-2:], strict=True)
    )
    if size != tuple(image.shape[-2:]):
        image = F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
        mask = F.interpolate(mask[None], size, mode="nearest")[0]
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    canvas, shown = image.new_full((3, height, width), WHITE), mask.new_zeros(1, height, width)
    target = (slice(None), slice(top, top + size[0]), slice(left, left + size[1]))
    canvas[target] = torch.where(mask > 0.5, image, WHITE)
    shown[target] = (mask > 0.5).float()
    return canvas, shown


def inscribed(mask: np.ndarray) -> int:
    """Return the side of the largest square within a mask [height, width]."""
    sums = np.pad(mask.astype(int).cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
    fits, most = 0, min(mask.shape)
    while fits < most:
        side = (fits + most + 1) // 2
        filled = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
        fits, most = (side, most) if filled.max() == side * side else (fits, side - 1)
    return fits
