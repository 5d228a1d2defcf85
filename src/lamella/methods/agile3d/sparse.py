"""Convolution over the occupied cells of a space that is nearly empty, in plain PyTorch.

A dense convolution would compute at every cell. Here a *grid* is the list of the occupied ones, and for each of the
k^D offsets of a kernel the list of pairs of cells that lie so far apart; a convolution gathers, multiplies and adds::

    out[i] = sum over offsets o of  x[j] W[o],  for the occupied j = i + o         [N, C_out]

Pairs are found once for a grid, by looking numbers of cells up among sorted ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate, product

import torch
from torch import Tensor, nn

Pairs = list[tuple[Tensor, Tensor]]  # for each offset: from which cells, to which cells


class Grid:
    """The occupied cells of one scene.

    Args:
        cells: in whole cells, each once, in any order [N, D].
    """

    def __init__(self, cells: Tensor) -> None:
        self.cells = cells
        self._neighbours: dict[int, Pairs] = {}

    def __len__(self) -> int:
        return len(self.cells)

    def neighbours(self, size: int) -> Pairs:
        """The pairs of a kernel of ``size`` cells a side, odd, in the order of a dense kernel's entries."""
        if size not in self._neighbours:
            self._neighbours[size] = self._look_up(size // 2)
        return self._neighbours[size]

    def _look_up(self, reach: int) -> Pairs:
        numbers, step = _numbered(self.cells, reach)
        ordered, order = numbers.sort()
        pairs = []
        for offset in product(range(-reach, reach + 1), repeat=len(step)):
            wanted = numbers + sum(o * s for o, s in zip(offset, step, strict=True))
            place = torch.searchsorted(ordered, wanted).clamp(max=len(self) - 1)
            found = torch.nonzero(ordered[place] == wanted).squeeze(1)
            pairs.append((order[place[found]], found))
        return pairs

    @cached_property
    def coarser(self) -> tuple[Grid, Pairs]:
        """The grid of cells twice as wide, and for each of the 2^D places within one the pairs from here to there."""
        wide = self.cells // 2
        distinct, parent = _numbered(wide)[0].unique(return_inverse=True)
        cells = wide.new_empty(len(distinct), wide.shape[1])
        cells[parent] = wide
        place, _ = _numbered(self.cells % 2, extent=[2] * wide.shape[1])  # [N], in 0 .. 2^D - 1
        within = [torch.nonzero(place == each).squeeze(1) for each in range(2 ** wide.shape[1])]
        return Grid(cells), [(fine, parent[fine]) for fine in within]


def _numbered(cells: Tensor, reach: int = 0, extent: list[int] | None = None) -> tuple[Tensor, list[int]]:
    """A number for each cell [N], and by how much it grows with a step along each axis.

    Args:
        reach: how far from a cell numbers are looked for: none of them leads round an edge.
        extent: cells along each axis, from 0; where left out, as many as there are, from the lowest.
    """
    if extent is None:
        low = cells.min(dim=0).values - reach
        extent = (cells.max(dim=0).values + reach + 1 - low).tolist()
        cells = cells - low
    step = [math.prod(extent[axis + 1 :]) for axis in range(len(extent))]
    return (cells * cells.new_tensor(step)).sum(dim=1), step


class Grids:
    """The grids of several scenes behind one another, whose pairs never lead from one scene into another."""

    def __init__(self, grids: Sequence[Grid]) -> None:
        self.grids = list(grids)
        self._starts = [0, *accumulate(map(len, self.grids))]
        self._neighbours: dict[int, Pairs] = {}

    def __len__(self) -> int:
        return self._starts[-1]

    def neighbours(self, size: int) -> Pairs:
        """As of one grid."""
        if size not in self._neighbours:
            each = [grid.neighbours(size) for grid in self.grids]
            self._neighbours[size] = _joined(each, self._starts, self._starts)
        return self._neighbours[size]

    @cached_property
    def coarser(self) -> tuple[Grids, Pairs]:
        """As of one grid."""
        coarse, pairs = zip(*(grid.coarser for grid in self.grids), strict=True)
        joined = Grids(coarse)
        return joined, _joined(pairs, self._starts, joined._starts)


def _joined(each: Sequence[Pairs], sources: list[int], targets: list[int]) -> Pairs:
    """The pairs of several scenes, whose cells begin at these places."""
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
    """A convolution along pairs, without bias; which pairs, makes it a plain, a strided or a transposed one.

    Args:
        channels_in, channels_out: of features.
        offsets: of the kernel: k^D.
    """

    def __init__(self, channels_in: int, channels_out: int, offsets: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(offsets, channels_in, channels_out))
        bound = math.sqrt(6 / ((channels_in + channels_out) * offsets))  # Glorot and Bengio, 2010
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: Tensor, pairs: Pairs, cells: int) -> Tensor:
        """Features [N, C_in] along pairs to those of so many cells [cells, C_out]."""
        out = x.new_zeros(cells, self.weight.shape[2])
        for (source, target), W in zip(pairs, self.weight, strict=True):
            if len(source):
                out.index_add_(0, target, x[source] @ W)
        return out


def transposed(pairs: Pairs) -> Pairs:
    """The same pairs the other way round."""
    return [(target, source) for source, target in pairs]
