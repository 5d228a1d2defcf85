"""Which cells learn which box, and what is lost on them, against sums by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lamella.methods.muranet.assign import corners, overlap, simota
from lamella.methods.muranet.loss import dice, opening_loss, overlap_loss, wall_loss
from lamella.methods.muranet.modules import CellGrid

SIZES, STRIDES = [(8, 8), (4, 4), (2, 2)], (4, 8, 16)


def grid() -> CellGrid:
    return CellGrid.of(SIZES, STRIDES, torch.device("cpu"))


def boxes_by_chance(count: int, seed: int) -> tuple[Tensor, Tensor]:
    drawn = np.random.default_rng(seed)
    centre, sides = drawn.uniform(1, 31, (count, 2)), drawn.uniform(2, 14, (count, 2))
    boxes = torch.from_numpy(np.concatenate([centre, sides], 1)).float()
    return boxes, torch.from_numpy(drawn.integers(2, size=count))


def test_cells_are_counted_level_by_level() -> None:
    here = grid()
    assert len(here.stride) == 64 + 16 + 4
    assert here.centres[9].tolist() == [6, 6] and here.centres[64 + 5].tolist() == [12, 12]


def test_decoding_what_was_encoded_gives_the_box_back() -> None:
    here = grid()
    boxes, _ = boxes_by_chance(84, 0)
    torch.testing.assert_close(here.decode(here.encode(boxes)), boxes, rtol=1e-5, atol=1e-5)


def test_two_boxes_that_want_one_cell_by_hand() -> None:
    """All predicted boxes are 8 x 8 around the corner of their cell; both boxes overlap four of them by 1 / 7.

    So each gets one cell. Both like cell (2, 1) best, since it alone is sure; the second one costs less there, and the
    first one takes (1, 1), which is a little surer than the others.
    """
    here = CellGrid.of([(4, 4)], (8,), torch.device("cpu"))
    cells = torch.zeros(16, 7)
    cells[:, 5:] = -4.0
    cells[1 * 4 + 2, 5:] = torch.tensor([4.0, 6.0])
    cells[1 * 4 + 1, 5] = -3.0
    boxes = torch.tensor([[12.0, 12.0, 8.0, 8.0], [20.0, 12.0, 8.0, 8.0]])
    found = simota(cells, here, boxes, torch.tensor([0, 1]))
    assert dict(zip(found.cell.tolist(), found.box.tolist(), strict=True)) == {5: 0, 6: 1}
    torch.testing.assert_close(found.iou, torch.full((2,), 1 / 7))


def by_loops(cells: Tensor, here: CellGrid, boxes: Tensor, labels: Tensor) -> dict[int, int]:
    """The same assignment in float64, cell by cell."""
    predicted = cells.double().numpy()
    corner, stride = here.corner.double().numpy(), here.stride.double().numpy()
    cost = np.full((len(boxes), len(predicted)), np.inf)
    iou = np.zeros_like(cost)
    near = np.zeros_like(cost, bool)
    for g, (cx, cy, w, h) in enumerate(boxes.double().tolist()):
        for a in range(len(predicted)):
            x, y = (corner[a] + 0.5) * stride[a]
            near[g, a] = max(abs(x - cx), abs(y - cy)) < 1.5 * stride[a]
            (px, py), (pw, ph) = (predicted[a, :2] + corner[a]) * stride[a], np.exp(predicted[a, 2:4]) * stride[a]
            wide = max(0.0, min(cx + w / 2, px + pw / 2) - max(cx - w / 2, px - pw / 2))
            high = max(0.0, min(cy + h / 2, py + ph / 2) - max(cy - h / 2, py - ph / 2))
            iou[g, a] = wide * high / (w * h + pw * ph - wide * high)
    candidates = near.any(0)
    for g, label in enumerate(labels.tolist()):
        for a in np.flatnonzero(candidates):
            p = np.sqrt(1 / (1 + np.exp(-predicted[a, 5:])) / (1 + np.exp(-predicted[a, 4])))
            named = -sum(np.log(p[k]) if k == label else np.log(1 - p[k]) for k in range(len(p)))
            cost[g, a] = named - 3 * np.log(iou[g, a] + 1e-8) + (0 if near[g, a] else 1e6)
    wants: dict[int, list[int]] = {}
    for g in range(len(boxes)):
        best = np.sort(iou[g][candidates])[::-1][:10]
        for a in np.argsort(cost[g])[: max(1, int(best.sum()))]:
            wants.setdefault(int(a), []).append(g)
    match = {a: min(claims, key=lambda g, a=a: cost[g, a]) for a, claims in wants.items()}
    for g in range(len(boxes)):
        if g not in match.values():
            free = [a for a in np.argsort(cost[g]) if int(a) not in match]
            match[int(free[0])] = g
    return match


@pytest.mark.parametrize("seed", range(6))
def test_assignment_is_that_of_loops_in_float64(seed: int) -> None:
    boxes, labels = boxes_by_chance(7, seed)
    here = grid()
    torch.manual_seed(seed)
    cells = torch.randn(84, 7)
    cells[:, :2] += 0.5
    found = simota(cells, here, boxes, labels)
    assert dict(zip(found.cell.tolist(), found.box.tolist(), strict=True)) == by_loops(cells, here, boxes, labels)
    assert len(set(found.cell.tolist())) == len(found.cell)
    assert set(found.box.tolist()) == set(range(7))


def test_a_box_thinner_than_every_stride_gets_a_cell() -> None:
    found = simota(torch.zeros(84, 7), grid(), torch.tensor([[17.3, 9.1, 12.0, 0.5]]), torch.tensor([1]))
    assert len(found.cell) >= 1


def test_overlap_loss_is_0_for_the_same_box_and_1_for_one_elsewhere() -> None:
    boxes, _ = boxes_by_chance(5, 0)
    torch.testing.assert_close(overlap_loss(boxes, boxes), torch.zeros(5), atol=1e-5, rtol=0)
    assert overlap_loss(boxes + torch.tensor([100.0, 0, 0, 0]), boxes).tolist() == [1.0] * 5


def test_overlap_is_that_of_torchvision() -> None:
    ops = pytest.importorskip("torchvision.ops")
    (ours, _), (theirs, _) = boxes_by_chance(40, 0), boxes_by_chance(40, 1)
    expected = ops.box_iou(corners(ours), corners(theirs)).diagonal()
    torch.testing.assert_close(overlap(ours, theirs), expected)


def test_openings_lose_what_the_formula_says() -> None:
    here = grid()
    boxes, labels = boxes_by_chance(3, 2)
    torch.manual_seed(0)
    cells = torch.randn(1, 84, 7).requires_grad_()
    truth = torch.cat([labels[:, None].float(), boxes], 1)
    padded = torch.cat([truth, torch.full((2, 5), -1.0)])[None]
    found = opening_loss(cells, here, padded, closing=True)
    match = by_loops(cells[0].detach(), here, boxes, labels)
    predicted, sums = cells[0].detach().double(), dict.fromkeys(("overlap", "objectness", "classes", "raw"), 0.0)
    for a in range(84):
        p = 1 / (1 + math.exp(-predicted[a, 4]))
        sums["objectness"] -= math.log(p) if a in match else math.log(1 - p)
        if a not in match:
            continue
        g, stride = match[a], float(here.stride[a])
        iou = float(overlap(here.decode(cells.detach())[0, a].double(), boxes[g].double()))
        sums["overlap"] += 5 * (1 - iou**2)
        for k in range(2):
            q, target = 1 / (1 + math.exp(-predicted[a, 5 + k])), iou * (k == int(labels[g]))
            sums["classes"] -= target * math.log(q) + (1 - target) * math.log(1 - q)
        cx, cy, w, h = boxes[g].tolist()
        x, y = here.corner[a].tolist()
        wanted = (cx / stride - x, cy / stride - y, math.log(w / stride), math.log(h / stride))
        sums["raw"] += sum(abs(float(predicted[a, n]) - each) for n, each in enumerate(wanted))
    for name, each in sums.items():
        assert float(found[name].detach()) == pytest.approx(each / len(match), rel=1e-4), name
    torch.stack([*found.values()]).sum().backward()
    assert cells.grad is not None and torch.isfinite(cells.grad).all()


def test_a_plan_without_openings_loses_on_objectness_alone() -> None:
    cells = torch.zeros(1, 84, 7)
    found = opening_loss(cells, grid(), torch.full((1, 3, 5), -1.0), closing=True)
    assert float(found["objectness"]) == pytest.approx(84 * math.log(2), rel=1e-5)
    assert float(found["overlap"]) == float(found["classes"]) == float(found["raw"]) == 0


def test_walls_lose_cross_entropy_and_dice() -> None:
    torch.manual_seed(0)
    logits, truth = torch.randn(2, 4, 5), torch.rand(2, 4, 5) > 0.6
    p = logits.double().sigmoid().numpy()
    t = truth.double().numpy()
    nats = -(t * np.log(p) + (1 - t) * np.log(1 - p)).mean()
    soft = np.mean([1 - (2 * (p[b] * t[b]).sum() + 1) / (p[b].sum() + t[b].sum() + 1) for b in range(2)])
    assert float(wall_loss([logits], truth)) == pytest.approx(nats + soft, rel=1e-5)
    assert float(wall_loss([logits] * 3, truth, (1.0, 0.4, 0.2))) == pytest.approx(
        (1 + 0.4 + 0.2) * (nats + soft), rel=1e-5
    )
    sure = torch.where(truth, 50.0, -50.0)
    assert float(dice(sure, truth.float())) == pytest.approx(0, abs=1e-6)
