"""From masks and boxes to outlines, and openings in their walls."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from lamella.methods.muranet import FloorPlan, Readings, synthetic_floor_plan, vector
from lamella.methods.muranet.assign import corners
from lamella.methods.muranet.drawing import Box
from lamella.methods.muranet.judge import Recognition
from lamella.methods.muranet.page import figures
from lamella.methods.muranet.vector import area, outlines, snap
from lamella.results import Evidence

pytest.importorskip("skimage")


def ring() -> np.ndarray:
    """A square room of walls 4 thick [40, 50]."""
    walls = np.zeros((40, 50), np.float32)
    walls[5:35, 5:45] = 1
    walls[9:31, 9:41] = 0
    return walls


def test_outlines_enclose_the_walls_and_their_holes() -> None:
    found = outlines(ring())
    assert len(found) == 2
    inner, outer = sorted(found, key=lambda line: abs(area(line)))
    # the corner of a pixel is cut off at each corner, an eighth of it
    assert abs(area(outer)) == pytest.approx(30 * 40, abs=1) and abs(area(inner)) == pytest.approx(22 * 32, abs=1)
    assert outer.min(0) == pytest.approx([5, 5], abs=0.01) and outer.max(0) == pytest.approx([45, 35], abs=0.01)


def test_a_wall_at_the_border_is_closed() -> None:
    walls = np.zeros((20, 20), np.float32)
    walls[:4] = 1
    (line,) = outlines(walls)
    assert abs(area(line)) == pytest.approx(80, abs=1)


def test_an_opening_is_put_into_the_nearest_wall_and_gets_its_thickness() -> None:
    mask = ring() > 0.5
    lying = snap(Box(20, 6.5, 30, 12), "door", 0.9, mask)
    assert lying.snapped and lying.across and lying.box == Box(20, 5, 30, 9)
    standing = snap(Box(40, 15, 43, 25), "window", 0.8, mask)
    assert standing.snapped and not standing.across and standing.box == Box(41, 15, 45, 25)
    alone = Box(20, 19, 30, 22)
    assert snap(alone, "door", 0.5, mask) == snap(alone, "door", 0.5, None)
    assert not snap(alone, "door", 0.5, mask).snapped


@pytest.mark.parametrize("tilt", [-20.0, -8.0, 5.0, 12.0, 30.0])
def test_openings_in_slanted_walls_have_their_angle_length_and_thickness(tilt: float) -> None:
    plan = synthetic_floor_plan(4, 256, tilt=tilt)
    assert plan.drawing is not None and plan.walls is not None and plan.boxes is not None
    turn = -np.deg2rad(tilt)  # y points down
    matrix = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    found = [snap(Box(*box), "door", 0.9, plan.walls) for box in corners(torch.from_numpy(plan.boxes)[:, 1:]).tolist()]
    right = 0
    for ours, truth in zip(found, plan.drawing.openings, strict=True):
        box = truth.box
        true = (np.array([(box.x0, box.y0), (box.x1, box.y0), (box.x1, box.y1), (box.x0, box.y1)]) - 128) @ matrix + 128
        near = np.abs(ours.corners[:, None] - true[None]).max(-1).min(1)  # of each corner, to the nearest true one
        right += ours.snapped and abs(ours.angle + tilt) < 3 and near.max() < 3
    assert right >= 0.9 * len(found)  # the others lie beside walls that meet theirs


def test_an_opening_in_a_straight_wall_has_no_angle() -> None:
    plan = synthetic_floor_plan(4)
    assert plan.boxes is not None
    for box in corners(torch.from_numpy(plan.boxes)[:, 1:]).tolist():
        assert snap(Box(*box), "door", 0.9, plan.walls).angle == 0


def seen_as_it_is(plan: FloorPlan) -> Recognition:
    assert plan.walls is not None and plan.boxes is not None
    true = torch.from_numpy(plan.boxes)
    return Recognition(
        plan.walls.astype(np.float32), corners(true[:, 1:]), torch.full((len(true),), 0.9), true[:, 0].long()
    )


def test_a_perfect_reading_gives_back_the_vectors(tmp_path: Path) -> None:
    plan = synthetic_floor_plan(4)
    assert plan.drawing is not None and plan.walls is not None
    found = Readings.of([plan, plan], [seen_as_it_is(plan)] * 2, plan.classes)
    found.write(tmp_path)
    names = {"the plan.svg", "the plan.json", "the plan.walls.png", "annotations.json"}
    assert names < {each.name for each in tmp_path.iterdir()} and len(list(tmp_path.iterdir())) == 7
    result = json.loads((tmp_path / "the plan.json").read_text())
    turned = {id(wall): area(np.array(wall)) for wall in result["walls"]}
    assert abs(sum(turned.values())) == pytest.approx(plan.walls.sum(), rel=0.02)  # holes go round the other way
    for ours, truth in zip(result["openings"], plan.drawing.openings, strict=True):
        box = truth.box
        assert ours["kind"] == truth.kind and ours["snapped"]
        assert ours["bbox"] == pytest.approx([box.x0, box.y0, box.width, box.height], abs=1.0)
    image = Image().open(tmp_path / "the plan.walls.png")
    assert np.array_equal(np.asarray(image) > 0, plan.walls)
    coco = json.loads((tmp_path / "annotations.json").read_text())
    assert len(coco["images"]) == 2 and len(coco["annotations"]) == 2 * len(plan.drawing.openings)


def test_no_plan_takes_the_name_of_a_file_of_lamella() -> None:
    plans = [replace(synthetic_floor_plan(0), name=f"{name}.png") for name in ("annotations", "evidence", "a", "a")]
    found = Readings.of(plans, [seen_as_it_is(each) for each in plans], plans[0].classes)
    drawn = {name for name in found.contents if name.endswith(".svg")}
    assert drawn == {"0000-annotations.svg", "0001-evidence.svg", "a.svg", "0003-a.svg"}
    assert len(json.loads(found.contents["annotations.json"])["images"]) == 4 and "evidence.json" not in found.contents


def test_no_plan_overwrites_the_files_of_another() -> None:
    plans = [replace(synthetic_floor_plan(0), name=name) for name in ("0002-a.png", "a.png", "a.png")]
    found = Readings.of(plans, [seen_as_it_is(each) for each in plans], plans[0].classes)
    drawn = {name for name in found.contents if name.endswith(".svg")}
    assert drawn == {"0002-a.svg", "a.svg", "0002-0002-a.svg"} and len(found.contents) == 3 * 3 + 1


def test_the_page_says_how_many_images_of_a_plan_there_are() -> None:
    plan = synthetic_floor_plan(0)
    for given, result in (
        (plan, "the plan, the prediction, and the ground truth"),
        (replace(plan, walls=None, boxes=None), "the plan and the prediction"),
    ):
        found = Readings.of([given], [seen_as_it_is(plan)], plan.classes)
        (drawn,) = figures(Evidence(kind="readings", provenance={}, environment={}, findings=found.findings))
        assert f"{result}. Doors" in drawn.caption and drawn.alt.endswith(result)
        assert drawn.images == [found.findings["images"][0]["image"]]


def Image() -> type:
    return pytest.importorskip("PIL.Image")


def test_what_is_drawn_is_svg_whatever_a_class_is_called() -> None:
    openings = [snap(Box(20, 6, 30, 9), '"><script>', 0.9, ring() > 0.5)]
    svg, result = vector(ring(), openings, (40, 50))
    root = ElementTree.fromstring(svg)
    kinds = [each.get("data-kind") for each in root.iter() if each.get("data-kind")]
    assert kinds == ['"><script>'] and not any(each.tag.endswith("script") for each in root.iter())
    assert result["height"] == 40 and root.get("viewBox") == "0 0 50 40"
    drawn = synthetic_floor_plan(0).drawing
    assert drawn is not None
    shapes = [each for each in ElementTree.fromstring(drawn.svg()).iter() if each.tag.endswith("rect")]
    assert len(shapes) == len(drawn.walls) + len(drawn.openings)
    json.dumps(drawn.document())


def test_a_plan_without_walls_is_named() -> None:
    plan = synthetic_floor_plan(0)
    found = Readings.of([plan], [Recognition(np.zeros((128, 128), np.float32))], plan.classes)
    assert found.notes == ["the plan: the network recognises no wall: is it a floor plan?"]
    assert found.findings["plans"][0]["outlines"] == 0
