"""Sparse convolution against dense convolution, and grids against looking at every cell."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv3d, conv_transpose3d

from lamella.methods.agile3d.sparse import SparseConv, SparseGrid, SparseGrids, transposed

SIDE = 6


def occupied(seed: int, share: float = 0.3) -> Tensor:
    """Some cells of a cube, in no order [N, 3]."""
    drawn = torch.Generator().manual_seed(seed)
    cells = torch.nonzero(torch.rand(SIDE, SIDE, SIDE, generator=drawn) < share)
    return cells[torch.randperm(len(cells), generator=drawn)]


def dense(cells: Tensor, x: Tensor, side: int = SIDE) -> Tensor:
    """Features of cells as a cube, zero elsewhere [1, C, side, side, side]."""
    cube = x.new_zeros(x.shape[1], side, side, side)
    cube[:, *cells.T] = x.T
    return cube[None]


@pytest.mark.parametrize("size", [1, 3, 5])
def test_a_convolution_is_the_dense_one_at_occupied_cells(size: int) -> None:
    cells = occupied(0)
    x, conv = torch.randn(len(cells), 4, dtype=torch.float64), SparseConv(4, 5, size**3).double()
    ours = conv(x, SparseGrid(cells).neighbours(size), len(cells))
    kernel = conv.weight.reshape(size, size, size, 4, 5).permute(4, 3, 0, 1, 2)
    theirs = conv3d(dense(cells, x), kernel, padding=size // 2)[0][:, *cells.T].T
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)


def test_a_strided_convolution_is_the_dense_one_at_cells_twice_as_wide() -> None:
    cells = occupied(1)
    x, conv = torch.randn(len(cells), 4, dtype=torch.float64), SparseConv(4, 5, 2**3).double()
    coarse, pairs = SparseGrid(cells).coarser
    ours = conv(x, pairs, len(coarse))
    kernel = conv.weight.reshape(2, 2, 2, 4, 5).permute(4, 3, 0, 1, 2)
    theirs = conv3d(dense(cells, x), kernel, stride=2)[0]
    torch.testing.assert_close(ours, theirs[:, *coarse.cells.T].T, atol=1e-10, rtol=0)
    assert {*map(tuple, coarse.cells.tolist())} == {tuple(each) for each in (cells // 2).tolist()}


def test_a_transposed_convolution_is_the_dense_one_at_the_finer_cells() -> None:
    cells = occupied(2, share=0.1)
    coarse, pairs = SparseGrid(cells).coarser
    x, conv = torch.randn(len(coarse), 4, dtype=torch.float64), SparseConv(4, 5, 2**3).double()
    ours = conv(x, transposed(pairs), len(cells))
    kernel = conv.weight.reshape(2, 2, 2, 4, 5).permute(3, 4, 0, 1, 2)
    theirs = conv_transpose3d(dense(coarse.cells, x, SIDE // 2), kernel, stride=2)[0]
    torch.testing.assert_close(ours, theirs[:, *cells.T].T, atol=1e-10, rtol=0)


def test_gradients_are_those_of_finite_differences() -> None:
    cells = occupied(3, share=0.05)
    x, conv = torch.randn(len(cells), 2, dtype=torch.float64, requires_grad=True), SparseConv(2, 3, 3**3).double()
    pairs = SparseGrid(cells).neighbours(3)
    assert torch.autograd.gradcheck(
        lambda x, W: torch.func.functional_call(conv, {"weight": W}, (x, pairs, len(x))), (x, conv.weight)
    )


def test_pairs_in_the_plane_are_those_of_every_two_cells() -> None:
    cells = occupied(4)[:, :2].unique(dim=0)
    offsets = [(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1)]
    for offset, (source, target) in zip(offsets, SparseGrid(cells).neighbours(3), strict=True):
        apart = (cells[None] - cells[:, None] == torch.tensor(offset)).all(dim=2)  # [from i, to j]
        assert {*zip(target.tolist(), source.tolist(), strict=True)} == {*map(tuple, torch.nonzero(apart).tolist())}


def test_pairs_of_several_scenes_stay_within_each() -> None:
    each = [occupied(seed) for seed in (5, 6, 7)]
    grids, starts = SparseGrids([SparseGrid(cells) for cells in each]), [0, len(each[0]), len(each[0]) + len(each[1])]
    scene = torch.repeat_interleave(torch.arange(3), torch.tensor([len(cells) for cells in each]))
    for number, (source, target) in enumerate(grids.neighbours(3)):
        assert torch.equal(scene[source], scene[target])
        alone = [SparseGrid(cells).neighbours(3)[number] for cells in each]
        assert torch.equal(source, torch.cat([one + start for (one, _), start in zip(alone, starts, strict=True)]))
    coarse, pairs = grids.coarser
    assert sum(len(source) for source, _ in pairs) == len(grids)
    assert len(coarse) == sum(len(SparseGrid(cells).coarser[0]) for cells in each)
