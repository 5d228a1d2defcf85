"""Average precision against COCO's protocol written out, and walls counted over all pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lamella.methods.muranet import FloorPlan, RecogniserShape, synthetic_floor_plan
from lamella.methods.muranet.assign import corners
from lamella.methods.muranet.judge import Recognition, WallCount, grey_floor, precision, recognise

pytest.importorskip("pycocotools")
CLASSES = ("door", "window")
IOUS = [0.5 + 0.05 * n for n in range(10)]


def plan(boxes: Tensor) -> FloorPlan:
    return FloorPlan("a plan", np.zeros((64, 64, 3), np.uint8), None, boxes.float().numpy(), CLASSES)


def some(seed: int) -> tuple[list[Recognition], list[FloorPlan]]:
    """Boxes, and what might be found of them: moved, doubled, missed and made up."""
    drawn = np.random.default_rng(seed)
    found, plans = [], []
    for _ in range(4):
        count = int(drawn.integers(1, 6))
        true = np.concatenate([drawn.integers(2, size=(count, 1)), drawn.uniform(10, 54, (count, 2)),
                               drawn.uniform(4, 20, (count, 2))], 1)  # fmt: skip
        plans.append(plan(torch.from_numpy(true)))
        boxes = np.repeat(true, drawn.integers(0, 3, count), 0)
        extra = np.concatenate([drawn.integers(2, size=(2, 1)), drawn.uniform(10, 54, (2, 2)),
                                drawn.uniform(4, 20, (2, 2))], 1)  # fmt: skip
        boxes = np.concatenate([boxes, extra])
        boxes[:, 1:] += drawn.normal(0, 0.8, (len(boxes), 4))
        scores = torch.from_numpy(drawn.permutation(len(boxes)) / len(boxes) + 0.01 * drawn.random()).float()
        moved = corners(torch.from_numpy(boxes[:, 1:])).float()
        found.append(Recognition(None, moved, scores, torch.from_numpy(boxes[:, 0]).long()))
    return found, plans


def iou(a: list[float], b: list[float]) -> float:
    wide, high = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(0.0, wide) * max(0.0, high)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def written_out(found: list[Recognition], plans: list[FloorPlan], label: int, least: float) -> float:
    """COCO's average precision: greedy by score, each true box once, 101 points of recall."""
    hits: list[tuple[float, bool]] = []
    truths = 0
    for seen, each in zip(found, plans, strict=True):
        assert each.boxes is not None
        true = corners(torch.from_numpy(each.boxes[each.boxes[:, 0] == label][:, 1:])).tolist()
        truths += len(true)
        free = set(range(len(true)))
        mine = [n for n in seen.scores.argsort(descending=True).tolist() if seen.labels[n] == label]
        for n in mine:
            box = seen.boxes[n].tolist()
            best = max(free, key=lambda t, box=box, true=true: iou(box, true[t]), default=None)
            hit = best is not None and iou(box, true[best]) >= least
            free -= {best} if hit else set()
            hits.append((float(seen.scores[n]), hit))
    hits.sort(key=lambda each: -each[0])
    right = np.cumsum([hit for _, hit in hits])
    recall, sure = right / truths, right / np.arange(1, len(hits) + 1)
    points = [max((p for r, p in zip(recall, sure, strict=True) if r >= at - 1e-12), default=0.0)
              for at in np.linspace(0, 1, 101)]  # fmt: skip
    return float(np.mean(points))


@pytest.mark.parametrize("seed", range(4))
def test_precision_is_that_of_the_protocol_written_out(seed: int) -> None:
    found, plans = some(seed)
    scores = precision(found, plans, CLASSES)
    for label, name in enumerate(CLASSES):
        curve = [written_out(found, plans, label, least) for least in IOUS]
        ours = scores[name]
        assert (ours["ap50"], ours["ap75"], ours["ap"]) == pytest.approx((curve[0], curve[5], np.mean(curve)), abs=1e-6)


def exact(plans: list[FloorPlan]) -> list[Recognition]:
    found = []
    for each in plans:
        assert each.boxes is not None
        true = torch.from_numpy(each.boxes)
        found.append(Recognition(None, corners(true[:, 1:]), torch.full((len(true),), 0.9), true[:, 0].long()))
    return found


def test_what_is_exact_is_1_what_is_empty_0_and_what_is_doubled_less() -> None:
    _, plans = some(0)
    perfect = exact(plans)
    for each in precision(perfect, plans, CLASSES).values():
        assert each["ap50"] == each["ap"] == pytest.approx(1.0)
    for each in precision([Recognition(None)] * len(plans), plans, CLASSES).values():
        assert each["ap50"] == each["ap"] == 0.0
    twice = [Recognition(None, *(torch.cat([part, part]) for part in (each.boxes, each.scores, each.labels)))
             for each in perfect]  # fmt: skip
    for each in precision(twice, plans, CLASSES).values():
        assert each["ap50"] is not None and each["ap50"] < 1.0


def test_a_class_without_true_boxes_has_no_precision() -> None:
    plans = [plan(torch.tensor([[0.0, 20, 20, 10, 4]]))]
    scores = precision(exact(plans), plans, CLASSES)
    assert scores["door"]["ap"] == pytest.approx(1.0) and scores["window"] == {
        "ap50": None, "ap75": None, "ap": None, "boxes": 0
    }  # fmt: skip
    nothing = [plan(torch.zeros(0, 5))]
    assert precision([Recognition(None)], nothing, CLASSES)["door"]["ap"] is None


def test_walls_are_counted_over_all_plans_and_not_averaged() -> None:
    count = WallCount()
    small, large = np.zeros((10, 10), bool), np.ones((10, 10), bool)
    small[0, 0] = True
    count.add(small, small)  # an IoU of 1
    count.add(small, large)  # of 0.01
    assert count.iou == pytest.approx(2 / 101)


def test_the_floor_calls_dark_pixels_wall() -> None:
    image = np.full((4, 4, 3), 255, np.uint8)
    image[0] = 100  # a grey of 0.39
    walls = np.zeros((4, 4), bool)
    walls[0, :2] = True
    scores = grey_floor([FloorPlan("a plan", image, walls)])
    assert scores == {"0.3": 0.0, "0.5": 0.5, "0.7": 0.5}


@pytest.mark.parametrize("task", ["walls", "openings"])
def test_an_output_that_overflows_is_reported_with_its_plan(task: str) -> None:
    network = RecogniserShape(encoder="nano", size=64, tasks=task).build(2).eval()  # type: ignore[arg-type]
    plan = synthetic_floor_plan(0, 64)
    recognise(network, plan, (64, False))
    with torch.no_grad():
        next(network.encoder.parameters()).fill_(torch.inf)
    with pytest.warns(UserWarning, match=f"{plan.name}.*overflows"):
        assert recognise(network, plan, (64, False)).boxes.numel() == 0
