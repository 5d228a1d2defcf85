"""Synthetic plans, plans in a folder, and invalid input of either kind."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import minimum_filter

from lamella.data import InputContext
from lamella.errors import CalibrationError
from lamella.methods.muranet import FloorPlan, FloorPlans, floor_plans, synthetic_floor_plan
from lamella.methods.muranet.drawing import OUTSIDE, Box, Drawing, draw
from lamella.methods.muranet.frame import Frame, rotated
from lamella.methods.muranet.raster import _inner

Image = pytest.importorskip("PIL.Image")


def drawing(plan: FloorPlan) -> Drawing:
    assert plan.drawing is not None
    return plan.drawing


def some(count: int = 12, side: int = 128) -> list[FloorPlan]:
    return [synthetic_floor_plan(seed, side) for seed in range(count)]


def test_the_same_seed_gives_the_same_bytes_and_parts_differ() -> None:
    first, again, other = (next(floor_plans(part, seed=3)) for part in ("train", "train", "test"))
    assert first.content() == again.content() != other.content()
    assert {plan.name for plan in islice(floor_plans("train"), 20)}.isdisjoint(
        plan.name for plan in islice(floor_plans("test"), 20)
    )


@pytest.mark.parametrize("side", [64, 128, 200])
def test_every_opening_lies_inside_the_walls(side: int) -> None:
    for plan in some(side=side):
        assert plan.walls is not None and plan.boxes is not None and len(plan.boxes) == len(drawing(plan).openings) > 0
        for _, cx, cy, w, h in plan.boxes:
            y, x = (np.arange(side) + 0.5 for _ in range(2))
            inside = (abs(y - cy) < h / 2)[:, None] & (abs(x - cx) < w / 2)[None]
            assert inside.any() and plan.walls[inside].all()


def test_openings_do_not_overlap() -> None:
    for plan in some():
        boxes = [each.box for each in drawing(plan).openings]
        for n, a in enumerate(boxes):
            for b in boxes[n + 1 :]:
                assert min(a.x1, b.x1) <= max(a.x0, b.x0) or min(a.y1, b.y1) <= max(a.y0, b.y0)


def counted(rooms: Sequence[Box], side: int) -> np.ndarray:
    """How many rooms each pixel lies in, one after another [side, side]."""
    found = np.zeros((side, side), int)
    for y in range(side):
        for x in range(side):
            found[y, x] = sum(r.x0 <= x < r.x1 and r.y0 <= y < r.y1 for r in rooms)
    return found


@pytest.mark.parametrize("side", [64, 128])
def test_rooms_partition_the_footprint(side: int) -> None:
    """Each pixel of a rectangle lies in one room, and none outside it does; a room at its corner may be missing."""
    left_out = 0
    for seed in range(8):
        whole, less = (draw(np.random.default_rng(seed), side, corner=corner) for corner in (False, True))
        inside = counted(whole.rooms, side)
        (y0, x0), (y1, x1) = (np.argwhere(inside).min(0), np.argwhere(inside).max(0) + 1)
        assert all(round(0.06 * side) <= each <= round(0.14 * side) for each in (x0, y0, side - x1, side - y1))
        assert (inside[y0:y1, x0:x1] == 1).all() and inside.sum() == (x1 - x0) * (y1 - y0)
        assert all(min(room.width, room.height) >= side // 5 for room in whole.rooms)
        missing = set(whole.rooms) - set(less.rooms)
        assert set(less.rooms) <= set(whole.rooms) and len(missing) == (len(whole.rooms) > 3)
        for room in missing:
            left_out += 1
            assert {room.x0, room.x1} & {x0, x1} and {room.y0, room.y1} & {y0, y1}
            assert np.array_equal(counted(less.rooms, side), inside - counted([room], side))
    assert left_out


def test_walls_stand_on_every_edge_of_every_room() -> None:
    for plan in some(6):
        here = drawing(plan)
        for number, room in enumerate(here.rooms):
            mine = [wall for wall in here.walls if number in wall.rooms]
            assert sum(wall.span[1] - wall.span[0] for wall in mine) == 2 * (room.width + room.height)


@pytest.mark.parametrize("side", [64, 96, 128, 512])
def test_openings_do_not_cut_the_walls_that_meet_theirs(side: int) -> None:
    for seed in range(20):
        here = draw(np.random.default_rng(seed), side, corner=seed % 2 == 0)
        for each in here.openings:
            for wall in here.walls:
                apart = min(each.box.x1, wall.box.x1) <= max(each.box.x0, wall.box.x0) or min(
                    each.box.y1, wall.box.y1
                ) <= max(each.box.y0, wall.box.y0)
                assert apart or wall.across == each.across


@pytest.mark.parametrize("side", [64, 96, 128, 512])
def test_every_room_can_be_walked_to(side: int) -> None:
    for seed in range(40):
        here = draw(np.random.default_rng(seed), side, corner=seed % 2 == 0, reachable=True)
        reached = {0}
        for _ in here.rooms:
            for wall in here.walls:
                a, b = wall.rooms
                door = any(
                    each.kind == "door" and each.across == wall.across
                    and wall.box.x0 <= each.box.x0 and each.box.x1 <= wall.box.x1
                    and wall.box.y0 <= each.box.y0 and each.box.y1 <= wall.box.y1
                    for each in here.openings
                )  # fmt: skip
                if door and OUTSIDE not in (a, b) and {a, b} & reached:
                    reached |= {a, b}
        assert reached == set(range(len(here.rooms)))


@pytest.mark.parametrize("thin", [0.0, 1.5, float("nan")])
def test_walls_that_leave_no_room_for_doors_are_refused(thin: float) -> None:
    with pytest.raises(CalibrationError, match="at most 1"):
        synthetic_floor_plan(0, thin=thin)


def test_styles_differ_and_no_threshold_solves_them() -> None:
    for style in ("grey", "double"):
        plan = synthetic_floor_plan(0, style=style)  # type: ignore[arg-type]
        assert plan.walls is not None
        grey = plan.image.mean(axis=2) / 255
        best = max(
            (plan.walls & (grey < t)).sum() / (plan.walls | (grey < t)).sum() for t in np.linspace(0.05, 0.95, 19)
        )
        assert best < 0.85


def test_a_tilted_plan_keeps_its_openings_in_their_boxes() -> None:
    straight, tilted = (synthetic_floor_plan(1, tilt=tilt) for tilt in (0.0, 4.0))
    assert straight.boxes is not None and tilted.boxes is not None and tilted.walls is not None
    for (_, cx, cy, w, h), (_, tx, ty, tw, th) in zip(straight.boxes, tilted.boxes, strict=True):
        angle = np.deg2rad(4.0)
        x, y = cx - 64, cy - 64
        assert (tx - 64, ty - 64) == pytest.approx(
            (x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)), abs=1e-3
        )
        assert tw >= w * np.cos(angle) and th >= h * np.cos(angle)
        assert tilted.walls[int(ty), int(tx)]


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("quarters", range(4))
def test_flips_and_turns_keep_openings_on_walls(flip: bool, quarters: int) -> None:
    plan = synthetic_floor_plan(2)
    row = Frame.of(plan, 128, False).row(plan)
    x, walls, boxes = rotated(row["x"], row["walls"], row["boxes"], flip, quarters)
    expected = np.rot90(plan.image[:, ::-1] if flip else plan.image, quarters)
    assert np.array_equal(x.permute(1, 2, 0).numpy(), expected)
    for _, cx, cy, w, h in boxes.tolist():
        where = torch.arange(128) + 0.5
        inside = ((where - cy).abs() < h / 2)[:, None] & ((where - cx).abs() < w / 2)[None]
        assert inside.any() and walls[inside].all()


@pytest.mark.parametrize("letterbox", [False, True])
def test_a_frame_moves_boxes_and_maps_there_and_back(letterbox: bool) -> None:
    plan = synthetic_floor_plan(3, 128)
    assert plan.walls is not None and plan.boxes is not None
    wide = FloorPlan(plan.name, plan.image[:96], plan.walls[:96], plan.boxes[plan.boxes[:, 2] < 90], plan.classes)
    frame = Frame.of(wide, 256, letterbox)
    row = frame.row(wide)
    assert row["x"].shape == (3, 256, 256) and row["walls"].shape == (256, 256)
    assert (frame.height == 192) == letterbox
    k, cx, cy, w, h = row["boxes"].unbind(1)
    corners = torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], 1)
    assert wide.boxes is not None
    there = torch.from_numpy(wide.boxes)
    expected = torch.cat([there[:, 1:3] - there[:, 3:] / 2, there[:, 1:3] + there[:, 3:] / 2], 1)
    torch.testing.assert_close(frame.boxes_back(corners, wide), expected, atol=1e-3, rtol=0)
    assert k.tolist() == there[:, 0].tolist()
    back = frame.back(row["walls"].float(), wide).numpy() > 0.5
    assert wide.walls is not None and (back == wide.walls).mean() > 0.97


@pytest.mark.parametrize(("height", "width", "low", "across"), [(333, 1000, 43, 128), (1000, 333, 128, 43)])
def test_boxes_are_scaled_as_the_image_that_keeps_its_shape(height: int, width: int, low: int, across: int) -> None:
    """43 pixels hold what 42.62 would: the box of the whole plan is its whole image."""
    whole = np.array([[0, width / 2, height / 2, width, height]], np.float32)
    image = np.zeros((height, width, 3), np.uint8)
    plan = FloorPlan("long", image, np.ones((height, width), bool), whole, ("door", "window"))
    frame = Frame.of(plan, 128, True)
    row = frame.row(plan)
    ink = (row["x"] == 0).all(0)
    assert (int(ink.any(1).sum()), int(ink.any(0).sum())) == (low, across)
    torch.testing.assert_close(row["boxes"], torch.tensor([[0, across / 2, low / 2, across, low]]))
    back = frame.boxes_back(torch.tensor([[0.0, 0.0, across, low]]), plan)
    torch.testing.assert_close(back, torch.tensor([[0.0, 0.0, width, height]]))


# Folders


def put(folder: Path, plan: FloorPlan, **changes: Any) -> Path:
    """A folder of one plan; ``changes`` replaces parts of its document."""
    assert plan.walls is not None and plan.boxes is not None
    Image.fromarray(plan.image).save(folder / "a.png")
    Image.fromarray(plan.walls.astype(np.uint8) * 255).save(folder / "a.walls.png")
    boxes = [
        {"id": n, "image_id": 7, "category_id": int(k) + 1, "bbox": [cx - w / 2, cy - h / 2, w, h]}
        for n, (k, cx, cy, w, h) in enumerate(plan.boxes.tolist())
    ]
    document = {
        "images": [{"id": 7, "file_name": "a.png", "width": 128, "height": 128}],
        "annotations": boxes,
        "categories": [{"id": 1, "name": "door"}, {"id": 2, "name": "window"}],
    }
    (folder / "annotations.json").write_text(json.dumps(document | changes))
    return folder


def test_a_folder_is_read_as_it_was_written(tmp_path: Path) -> None:
    plan = synthetic_floor_plan(0)
    found = FloorPlans.open(put(tmp_path, plan), InputContext())
    found.check_labels()
    (again,) = found
    assert found.classes == ("door", "window") and again.name == "a.png"
    assert np.array_equal(again.image, plan.image) and np.array_equal(again.walls, plan.walls)
    assert again.boxes is not None and plan.boxes is not None
    np.testing.assert_allclose(again.boxes, plan.boxes, atol=1e-4)


def test_images_alone_can_be_read_and_not_trained_on(tmp_path: Path) -> None:
    plan = synthetic_floor_plan(0)
    Image.fromarray(plan.image).save(tmp_path / "b.jpg")
    for given in (tmp_path, tmp_path / "b.jpg"):
        found = FloorPlans.open(given, InputContext())
        assert len(found) == 1 and not found[0].labelled
        with pytest.raises(CalibrationError, match=r"b\.jpg has no b\.walls\.png: "):
            found.check_labels()


BROKEN: list[tuple[str, Any, str]] = [
    ("not a document", "{", r"no boxes in COCO format"),
    ("no bbox", {"annotations": [{"image_id": 7, "category_id": 1}]}, "no boxes in COCO format"),
    ("another image", {"annotations": [{"image_id": 8, "category_id": 1, "bbox": [0, 0, 4, 4]}]}, "COCO format"),
    ("no class", {"categories": []}, "COCO format|0 categories"),
    ("no image", {"images": [], "annotations": []}, "lists no image"),
    ("outside", {"annotations": [{"image_id": 7, "category_id": 1, "bbox": [120, 0, 9, 4]}]}, "is not inside a.png"),
    ("empty", {"annotations": [{"image_id": 7, "category_id": 1, "bbox": [20, 5, 0, 4]}]}, "is not inside a.png"),
    ("nan", {"annotations": [{"image_id": 7, "category_id": 1, "bbox": [float("nan"), 5, 2, 4]}]}, "is not inside"),
    ("leads out", {"images": [{"id": 7, "file_name": "../a.png"}]}, "outside the folder"),
    ("no file can have", {"images": [{"id": 7, "file_name": "a\0b.png"}]}, "there is no image"),
    ("is too long", {"images": [{"id": 7, "file_name": "x" * 5000}]}, "there is no image"),
    ("missing", {"images": [{"id": 7, "file_name": "c.png"}]}, "there is no image 'c.png'"),
]


@pytest.mark.parametrize(("document", "message"), [each[1:] for each in BROKEN], ids=[each[0] for each in BROKEN])
def test_a_broken_document_is_one_line(tmp_path: Path, document: Any, message: str) -> None:
    folder = put(tmp_path, synthetic_floor_plan(0), **(document if isinstance(document, dict) else {}))
    if isinstance(document, str):
        (folder / "annotations.json").write_text(document)
    with pytest.raises(CalibrationError, match=message) as error:
        FloorPlans.open(folder, InputContext())
    assert "\n" not in str(error.value)


def test_a_mask_of_another_size_without_walls_or_damaged_is_one_line(tmp_path: Path) -> None:
    folder = put(tmp_path, synthetic_floor_plan(0))
    mask = folder / "a.walls.png"
    for content, message in (
        (np.full((64, 128), 255, np.uint8), r"128 x 64 pixels, but a.png has 128 x 128"),
        (np.zeros((128, 128), np.uint8), "shows no wall"),
    ):
        Image.fromarray(content).save(mask)
        with pytest.raises(CalibrationError, match=message):
            FloorPlans.open(folder, InputContext())
    mask.write_bytes(b"\x89PNG\r\n\x1a\n and nothing behind it")
    with pytest.raises(CalibrationError, match="cannot be read"):
        FloorPlans.open(folder, InputContext())
    mask.unlink()
    with pytest.raises(CalibrationError, match=r"has no a\.walls\.png"):
        FloorPlans.open(folder, InputContext()).check_labels()


def test_what_is_no_source_is_one_line(tmp_path: Path) -> None:
    for given, how, message in (
        (tmp_path, {}, "holds no image"),
        (tmp_path / "nothing", {}, "no floor plans"),
        ("synthetic", {"count": 0}, "count 0"),
        ("synthetic", {"side": 9}, "side 9"),
        ("synthetic", {"style": "baroque"}, "choose one of mixed"),
    ):
        with pytest.raises(CalibrationError, match=message):
            FloorPlans.open(given, InputContext(), **how)  # type: ignore[arg-type]


def test_eroding_a_mask_removes_what_is_near_its_edge() -> None:
    mask = np.random.default_rng(0).random((40, 30)) < 0.97
    expected = minimum_filter(mask, 5, mode="wrap")
    assert 0 < expected.sum() < mask.sum() and np.array_equal(_inner(mask, 2), expected)
