"""Sparse convolution over the occupied cells of a mostly empty space, in plain PyTorch.

A dense convolution would compute at every cell. A *grid* here is the list of occupied cells; for each of the k^D
offsets of a kernel it has the list of pairs of occupied cells at that offset. A convolution gathers, multiplies and
adds::

    out[i] = sum over offsets o of  x[j] W[o],  for the occupied j = i + o         [N, C_out]

The pairs of a grid are found once, by a binary search among sorted cell ids.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate, product

import torch
from torch import Tensor, nn

Pairs = list[tuple[Tensor, Tensor]]  # for each kernel offset: indices of source cells and of target cells


class SparseGrid:
    """The occupied cells of one scene.

    Args:
        cells: distinct integer cell coordinates, in any order [N, D].
    """

    def __init__(self, cells: Tensor) -> None:
        self.cells = cells
        self._neighbours: dict[int, Pairs] = {}

    def __len__(self) -> int:
        return len(self.cells)

    def neighbours(self, size: int) -> Pairs:
        """Return the pairs of a kernel with an odd side of ``size`` cells, in the order of a dense kernel's entries."""
        if size not in self._neighbours:
            self._neighbours[size] = self._look_up(size // 2)
        return self._neighbours[size]

    def _look_up(self, reach: int) -> Pairs:
        numbers, step = _numbered(self.cells, reach)
        ordered, order = numbers.sort()
        pairs = []
        for offset in product(range(-reach, reach + 1), repeat=len(step)):
            neighbour = numbers + sum(o * s for o, s in zip(offset, step, strict=True))
            index = torch.searchsorted(ordered, neighbour).clamp(max=len(self) - 1)
            found = torch.nonzero(ordered[index] == neighbour).squeeze(1)
            pairs.append((order[index[found]], found))
        return pairs

    @cached_property
    def coarser(self) -> tuple[SparseGrid, Pairs]:
        """The grid of cells twice as wide, and the pairs from fine to coarse cells.

        There is one list of pairs for each of the 2^D positions within a coarse cell.
        """
        wide = self.cells // 2
        distinct, parent = _numbered(wide)[0].unique(return_inverse=True)
        cells = wide.new_empty(len(distinct), wide.shape[1])
        cells[parent] = wide
        index, _ = _numbered(self.cells % 2, extent=[2] * wide.shape[1])  # [N], in 0 .. 2^D - 1
        within = [torch.nonzero(index == each).squeeze(1) for each in range(2 ** wide.shape[1])]
        return SparseGrid(cells), [(fine, parent[fine]) for fine in within]


def _numbered(cells: Tensor, reach: int = 0, extent: list[int] | None = None) -> tuple[Tensor, list[int]]:
    """Return an id for each cell [N], and the difference of ids between neighbours along each axis.

    Args:
        cells: integer cell coordinates [N, D].
        reach: margin around the cells, so that ids of neighbours up to this distance do not wrap around.
        extent: number of cells along each axis, from 0; if None, the extent of ``cells``.
    """
    if extent is None:
        low = cells.min(dim=0).values - reach
        extent = (cells.max(dim=0).values + reach + 1 - low).tolist()
        cells = cells - low
    step = [math.prod(extent[axis + 1 :]) for axis in range(len(extent))]
    return (cells * cells.new_tensor(step)).sum(dim=1), step


class SparseGrids:
    """The concatenated grids of several scenes, with no pairs across scenes."""

    def __init__(self, grids: Sequence[SparseGrid]) -> None:
        self.grids = list(grids)
        self._starts = [0, *accumulate(map(len, self.grids))]
        self._neighbours: dict[int, Pairs] = {}

    def __len__(self) -> int:
        return self._starts[-1]

    def neighbours(self, size: int) -> Pairs:
        """Return the pairs of a kernel, see :meth:`SparseGrid.neighbours`."""
        if size not in self._neighbours:
            each = [grid.neighbours(size) for grid in self.grids]
            self._neighbours[size] = _joined(each, self._starts, self._starts)
        return self._neighbours[size]

    @cached_property
    def coarser(self) -> tuple[SparseGrids, Pairs]:
        """The coarser grids and the pairs from fine to coarse, see :attr:`SparseGrid.coarser`."""
        coarse, pairs = zip(*(grid.coarser for grid in self.grids), strict=True)
        joined = SparseGrids(coarse)
        return joined, _joined(pairs, self._starts, joined._starts)


def _joined(each: Sequence[Pairs], sources: list[int], targets: list[int]) -> Pairs:
    """Concatenate the pairs of several scenes, whose cells start at these offsets."""
    if len(each) == 1:
        return each[0]
    return [
        (
            torch.cat([source + start for (source, _), start in zip(scenes, sources, strict=False)]),
            torch.cat([target + start for (_, target), start in zip(scenes, targets, strict=False)]),
        )
        for scenes in zip(*each, strict=True)
    ]


class SparseConv(nn.Module):
    """A convolution along pairs, without bias; the pairs determine whether it is plain, strided or transposed.

    Args:
        channels_in: number of input channels.
        channels_out: number of output channels.
        offsets: number of kernel offsets, k^D.
    """

    def __init__(self, channels_in: int, channels_out: int, offsets: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(offsets, channels_in, channels_out))
        bound = math.sqrt(6 / ((channels_in + channels_out) * offsets))  # Glorot and Bengio, 2010
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: Tensor, pairs: Pairs, cells: int) -> Tensor:
        """Convolve features [N, C_in] to features of the target cells [cells, C_out].

        Args:
            x: input features [N, C_in].
            pairs: source and target indices for each kernel offset.
            cells: number of target cells.
        """
        out = x.new_zeros(cells, self.weight.shape[2])
        for (source, target), W in zip(pairs, self.weight, strict=True):
            if len(source):
                out.index_add_(0, target, x[source] @ W)
        return out


def transposed(pairs: Pairs) -> Pairs:
    """Return the pairs with source and target exchanged."""
    return [(target, source) for source, target in pairs]
