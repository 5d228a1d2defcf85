"""The jigsaw: the same cells in another order, and a flag where there are too few."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lamella.errors import MethodError
from lamella.methods.refacade import Jigsaw
from lamella.methods.refacade.jigsaw import centre_object, inscribed


def noise(height: int, width: int) -> Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(0)) * 1.8 - 0.9


def cells(image: Tensor, p: int) -> list[frozenset[bytes]]:
    """Every cell as what it may look like: itself and its two flips."""
    found = []
    for top in range(0, image.shape[1], p):
        for left in range(0, image.shape[2], p):
            cell = image[:, top : top + p, left : left + p]
            ways = (cell, cell.flip(-1), cell.flip(-2))
            found.append(frozenset(each.contiguous().numpy().tobytes() for each in ways))
    return found


def drawn(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_cells_are_the_same_but_for_order_and_flips() -> None:
    image, mask = noise(32, 32), torch.ones(1, 32, 32)
    puzzle = Jigsaw(0.25)(image, mask, drawn(), smallest=4)
    assert (puzzle.side, puzzle.cells, puzzle.fallback) == (8, 16, False)
    before, after = cells(image, 8), cells(puzzle.image, 8)
    for cell in after:
        assert any(cell & known for known in before)
        before.remove(next(known for known in before if cell & known))
    assert not before
    assert not torch.equal(puzzle.image, image)
    assert torch.equal(puzzle.mask, mask)


def test_half_of_the_cells_are_flipped_half_of_those_each_way() -> None:
    image, mask = noise(64, 64), torch.ones(1, 64, 64)
    ways = {"none": 0, "across": 0, "down": 0}
    places = [(top, left) for top in range(0, 64, 4) for left in range(0, 64, 4)]
    known = {image[:, top : top + 4, left : left + 4].contiguous().numpy().tobytes() for top, left in places}
    for seed in range(4):
        puzzle = Jigsaw(1 / 16)(image, mask, drawn(seed), smallest=4)
        for top, left in places:
            cell = puzzle.image[:, top : top + 4, left : left + 4]
            turns = {"none": cell, "across": cell.flip(-1), "down": cell.flip(-2)}
            ways[next(way for way, each in turns.items() if each.contiguous().numpy().tobytes() in known)] += 1
    total = sum(ways.values())
    assert total == 1024
    for way, share in (("none", 0.5), ("across", 0.25), ("down", 0.25)):
        assert abs(ways[way] / total - share) < 0.06  # four standard deviations


def test_every_kept_cell_is_filled_as_far_as_asked() -> None:
    rows, columns = torch.meshgrid(torch.arange(48), torch.arange(48), indexing="ij")
    mask = (((rows - 23.5) ** 2 + (columns - 23.5) ** 2) <= 24**2).float()[None]
    image = torch.where(mask > 0, torch.full((3, 48, 48), -0.5), torch.ones(3, 48, 48))
    for coverage in (0.6, 0.9, 1.0):
        puzzle = Jigsaw(1 / 8, coverage)(image, mask, drawn(), smallest=4)
        filled = mask.reshape(8, 6, 8, 6).mean(dim=(1, 3))  # by hand
        assert puzzle.cells == int((filled >= coverage).sum())
        shown = puzzle.image[:, puzzle.mask[0] > 0]
        assert float((shown < 0.5).float().mean()) >= coverage - 0.01


def test_too_few_cells_are_asked_for_less_and_then_shown_as_they_are() -> None:
    image, mask = noise(32, 32), torch.ones(1, 32, 32)
    image_of = {}
    for hidden in (0, 1):  # of 64 pixels of each cell, so many rows are no object
        cut = mask.clone()
        for top in range(0, 32, 16):
            cut[:, top : top + 16][:, 7 : 7 + 3 * hidden] = 0
        puzzle = Jigsaw(0.5, 0.9)(image, cut, drawn(), smallest=4)
        image_of[hidden] = puzzle
    assert image_of[0].cells == 4 and not image_of[0].fallback
    assert image_of[1].cells == 4  # filled to 13/16 = 0.81: at 0.90 and 0.85 none is, at 0.80 all are
    tall = torch.zeros(1, 32, 32)
    tall[:, 4:28, 10:14] = 1
    puzzle = Jigsaw(0.5)(image, tall, drawn(), smallest=4)
    assert puzzle.fallback and puzzle.cells == 0
    whole, shown = centre_object(image, tall)
    assert torch.equal(puzzle.image, whole) and torch.equal(puzzle.mask, shown)


def test_a_ratio_of_one_is_no_jigsaw() -> None:
    image, mask = noise(32, 48), torch.zeros(1, 32, 48)
    mask[:, 8:24, 12:36] = 1
    puzzle = Jigsaw(1.0)(image, mask, drawn())
    whole, shown = centre_object(image, mask)
    assert torch.equal(puzzle.image, whole) and torch.equal(puzzle.mask, shown)
    assert not puzzle.fallback
    assert float(shown.mean()) == 1.0  # as large as the canvas lets it be


def test_a_seed_is_one_jigsaw() -> None:
    image, mask = noise(40, 40), torch.ones(1, 40, 40)
    one, same, other = (Jigsaw(0.2)(image, mask, drawn(seed), smallest=4) for seed in (1, 1, 2))
    assert torch.equal(one.image, same.image) and not torch.equal(one.image, other.image)


@pytest.mark.parametrize(("height", "width", "side"), [(480, 832, 96), (480, 48, 16), (2000, 2000, 192), (12, 40, 12)])
def test_the_side_of_a_cell_has_its_bounds(height: int, width: int, side: int) -> None:
    assert Jigsaw(0.2).side(height, width) == side


def test_a_image_that_no_cells_divide_is_padded() -> None:
    puzzle = Jigsaw(0.3)(noise(37, 29), torch.ones(1, 37, 29), drawn(), smallest=4)
    assert puzzle.image.shape == (3, 37, 29) and puzzle.cells >= 4 and torch.isfinite(puzzle.image).all()


def test_half_precision_is_taken() -> None:
    puzzle = Jigsaw(0.25)(noise(32, 32).half(), torch.ones(1, 32, 32).half(), drawn(), smallest=4)
    assert puzzle.image.dtype == torch.float32


def test_in_training_cells_are_of_all_sizes_that_fit() -> None:
    image, mask = noise(32, 32), torch.zeros(1, 32, 32)
    mask[:, 4:28, 4:28] = 1
    puzzles = [Jigsaw().for_training(image, mask, drawn(seed), smallest=4) for seed in range(60)]
    sides = [each.side for each in puzzles]
    assert min(sides) < 8 and 16 < max(sides) <= 32 and not any(each.fallback for each in puzzles)


def test_the_largest_square_is_found() -> None:
    mask = np.random.default_rng(0).random((14, 17)) < 0.9
    best = 0
    for top in range(14):
        for left in range(17):
            for side in range(1, min(14 - top, 17 - left) + 1):
                if mask[top : top + side, left : left + side].all():
                    best = max(best, side)
    assert inscribed(mask) == best
    assert inscribed(np.zeros((4, 4), bool)) == 0


def test_bad_values_are_refused() -> None:
    with pytest.raises(MethodError, match="give fractions above 0,"):
        Jigsaw(0.0)
    with pytest.raises(MethodError, match="has no object:"):
        Jigsaw()(noise(16, 16), torch.zeros(1, 16, 16), drawn())
