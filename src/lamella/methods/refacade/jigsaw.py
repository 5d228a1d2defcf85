"""Jigsaw permutation: a reference that shows its texture and nothing of its shape.

    crop to the object, scale to the canvas     cut into P x P cells, keep those the object fills
    permute, flip each by chance                fold into a rectangle, centre it on white

What is longer than a cell (a logo, text, wide stripes) is destroyed on purpose. Where fewer than four cells are whole
the object stays as it is: its outline may then leak into the result, so that is told.
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
FEWEST = 4  # cells
EASIER = ((0.05, 0.75), (0.10, 0.60))  # what the coverage falls by where they are fewer, and where that ends
LARGEST = 192  # pixels, of a cell's side


class Puzzle(NamedTuple):
    """A reference as the network is shown it.

    Attributes:
        image: from -1 to 1 [3, height, width].
        mask: where it shows texture [1, height, width], of 0 and 1.
        fallback: whether too few cells were whole, so that it is not jigsawed.
        cells: how many are shown.
        side: P, of a cell, in pixels.
    """

    image: Tensor
    mask: Tensor
    fallback: bool
    cells: int
    side: int


@dataclass(frozen=True)
class Jigsaw:
    """How a reference is cut and put together anew.

    Attributes:
        ratio: side of a cell over the shorter side of the picture; the pipeline's 0.2 (its demo has 0.1). 1: no jigsaw.
        coverage: share of a cell that the object must fill; the pipeline's 0.9 (its demo has 0.8).

    Raises:
        MethodError: for values out of range.
    """

    ratio: float = 0.2
    coverage: float = 0.9

    def __post_init__(self) -> None:
        if not (0 < self.ratio <= 1 and 0 < self.coverage <= 1):
            raise MethodError(f"ratio {self.ratio:g}, coverage {self.coverage:g}: give shares above 0, up to 1")

    def side(self, height: int, width: int, smallest: int = 16) -> int:
        """P for a picture of this size; at least a token's side, 16 pixels of Wan."""
        return int(np.clip(round(self.ratio * min(height, width)), smallest, min(LARGEST, height, width)))

    def __call__(
        self, image: Tensor, mask: Tensor, drawn: np.random.Generator, smallest: int = 16, side: int | None = None
    ) -> Puzzle:
        """Cut a reference, and put it together anew.

        Args:
            image: from -1 to 1 [3, height, width].
            mask: where the object is [1, height, width], of 0 and 1.
            drawn: decides the order and the flips.
            smallest: the least side of a cell, in pixels.
            side: of a cell, whatever ratio says.

        Raises:
            MethodError: for a mask that shows no object.
        """
        height, width = image.shape[-2:]
        p = side or self.side(height, width, smallest)
        image, mask = image.float(), mask.float()  # fold and unfold know no half precision on a processor
        padded, shown = centred(reflected(image, p), padded_to(mask, p))
        whole = centred(image, mask)
        if self.ratio == 1:
            return Puzzle(*whole, False, 0, p)
        cells, covered = cut(reflected(padded, p), p), cut(padded_to(shown, p), p).mean(dim=(1, 2, 3))
        for less, least in ((0.0, 0.0), *EASIER):
            kept = cells[covered >= max(self.coverage - less, min(least, self.coverage))]
            if len(kept) >= FEWEST:
                return Puzzle(*self._assembled(kept, drawn, height, width), False, len(kept), p)
        return Puzzle(*whole, True, 0, p)

    def _assembled(self, kept: Tensor, drawn: np.random.Generator, height: int, width: int) -> tuple[Tensor, Tensor]:
        kept = kept[torch.from_numpy(drawn.permutation(len(kept)))]
        flips = drawn.choice(["none", "across", "down"], size=len(kept), p=[0.5, 0.25, 0.25])
        turned = [cell.flip({"across": -1, "down": -2}[how]) if how != "none" else cell
                  for cell, how in zip(kept, flips, strict=True)]  # fmt: skip
        p = kept.shape[-1]
        columns = min(math.isqrt(len(kept)), max(1, width // p))
        rows = len(kept) // columns
        sheet = torch.stack(turned[: rows * columns]).unflatten(0, (rows, columns))  # [rows, columns, 3, P, P]
        sheet = sheet.permute(2, 0, 3, 1, 4).reshape(3, rows * p, columns * p)
        return on_white(sheet, torch.ones_like(sheet[:1]), height, width)

    def for_training(self, image: Tensor, mask: Tensor, drawn: np.random.Generator, smallest: int = 16) -> Puzzle:
        """The same with cells of a size by chance: from the smallest to the largest square within the object.

        Where less than four of that size are whole, they are half as large, and so on.
        """
        _, shown = centred(image, mask)
        largest = max(smallest, inscribed(shown[0].numpy() > 0.5))
        side = int(drawn.integers(smallest, largest + 1))
        puzzle = self(image, mask, drawn, smallest, side)
        while puzzle.fallback and side > smallest:
            side = max(smallest, side // 2)
            puzzle = self(image, mask, drawn, smallest, side)
        return puzzle


def cut(image: Tensor, p: int) -> Tensor:
    """The cells of a picture [channels, height, width], row by row [cells, channels, P, P]."""
    channels = image.shape[0]
    return F.unfold(image[None], p, stride=p)[0].T.reshape(-1, channels, p, p)


def reflected(image: Tensor, p: int) -> Tensor:
    """Padded below and on the right to multiples of P by its mirror image."""
    down, across = (-image.shape[-2]) % p, (-image.shape[-1]) % p
    while down or across:  # a mirror shows no more than there is
        here, there = min(down, image.shape[-2] - 1), min(across, image.shape[-1] - 1)
        image = F.pad(image[None], (0, there, 0, here), mode="reflect")[0]
        down, across = down - here, across - there
    return image


def padded_to(mask: Tensor, p: int) -> Tensor:
    """The same for a mask, by nothing."""
    return F.pad(mask, (0, (-mask.shape[-1]) % p, 0, (-mask.shape[-2]) % p))


def centred(image: Tensor, mask: Tensor, size: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
    """The object of a picture alone, as large as the canvas lets it be, in the middle of white.

    Args:
        size: height and width of the canvas; the picture's when left out.

    Raises:
        MethodError: for a mask that shows no object.
    """
    rows, columns = (torch.nonzero(mask[0].amax(dim=axis) > 0.5)[:, 0] for axis in (1, 0))
    if not len(rows):
        raise MethodError("the reference shows no object: give a mask that marks one")
    box = (slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1))
    return on_white(image[:, *box], mask[:, *box], *(size or image.shape[-2:]))


def on_white(image: Tensor, mask: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """A picture scaled to fit a canvas, in its middle; what its mask leaves out is white."""
    times = min(height / image.shape[-2], width / image.shape[-1])
    size = tuple(
        max(1, min(most, round(times * side))) for most, side in zip((height, width), image.shape[-2:], strict=True)
    )
    if size != tuple(image.shape[-2:]):
        image = F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
        mask = F.interpolate(mask[None], size, mode="nearest")[0]
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    canvas, shown = image.new_full((3, height, width), WHITE), mask.new_zeros(1, height, width)
    there = (slice(None), slice(top, top + size[0]), slice(left, left + size[1]))
    canvas[there] = torch.where(mask > 0.5, image, WHITE)
    shown[there] = (mask > 0.5).float()
    return canvas, shown


def inscribed(mask: np.ndarray) -> int:
    """The side of the largest square within a mask [height, width]."""
    sums = np.pad(mask.astype(int).cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
    fits, most = 0, min(mask.shape)
    while fits < most:
        side = (fits + most + 1) // 2
        filled = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
        fits, most = (side, most) if filled.max() == side * side else (fits, side - 1)
    return fits
