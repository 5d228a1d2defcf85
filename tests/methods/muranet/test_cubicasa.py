"""Plans of CubiCasa5K: what is read of their vectors, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lamella.data import InputContext
from lamella.errors import CalibrationError
from lamella.methods.muranet import FloorPlans
from lamella.methods.muranet.cubicasa import box_of, read_polygons

Image = pytest.importorskip("PIL.Image")

WALL = '<g id="Wall" class="Wall External"><polygon points="{wall}"/>{inside}</g>'
DOOR = '<g id="Door" class="Door Swing Beside"><polygon points="20,10 30,10 30,14 20,14 "/>'
DOOR += '<g class="Panel"><polygon points="0,0 90,0 90,90"/></g><polygon points="1,1 5,1 5,5"/></g>'
SLANTED = '<g id="Window" class="Window Regular"><polygon points="40,40 52,49 50,52 38,43"/></g>'
HEAD = '<?xml version="1.0" encoding="UTF-8"?>'


def svg(inside: str = DOOR, more: str = SLANTED, head: str = HEAD) -> str:
    wall = WALL.format(wall="10,10 60,10 60,14 10,14", inside=inside)
    slanted = WALL.format(wall="30,35 70,65 67,69 27,39", inside="")
    floor = f'<g class="Model"><g class="Floor">{wall}{slanted}{more}</g></g>'
    return f'{head}<svg xmlns="http://www.w3.org/2000/svg">{floor}</svg>'


def plan(folder: Path, vectors: str) -> Path:
    folder.mkdir(parents=True)
    Image.new("RGB", (100, 80), "white").save(folder / "F1_scaled.png")
    (folder / "model.svg").write_text(vectors)
    return folder


def test_walls_include_their_openings_and_openings_are_boxes_around_their_polygons(tmp_path: Path) -> None:
    plans = FloorPlans.open(plan(tmp_path / "17", svg()), InputContext())
    plans.check_labels()
    (found,) = plans
    assert plans.classes == ("door", "window") and found.name == "17.png" and found.image.shape == (80, 100, 3)
    assert found.walls is not None and found.boxes is not None
    expected = np.zeros((80, 100), bool)
    expected[10:14, 10:60] = True
    assert np.array_equal(found.walls[:16], expected[:16])  # the door is wall, and its panel is not
    band = found.walls[30:]
    assert band.sum() == pytest.approx(50 * 5, rel=0.05) and found.walls[52, 48]  # a wall of 50 x 5 pixels, slanted
    assert found.boxes.tolist() == [[0, 25, 12, 10, 4], [1, 45, 46, 14, 12]]


def test_a_split_is_what_its_list_names(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        plan(tmp_path / "high_quality" / name, svg())
    (tmp_path / "train.txt").write_text("/high_quality/a/\n/high_quality/b/\n")
    (tmp_path / "test.txt").write_text("/high_quality/c/\n")
    names = {split: [each.name for each in FloorPlans.open(tmp_path, InputContext(split=split))]
             for split in ("calibration", "test")}  # type: ignore[arg-type]  # fmt: skip
    assert names == {"calibration": ["a.png", "b.png"], "test": ["c.png"]}
    assert len(FloorPlans.open(tmp_path, InputContext(), count=1)) == 1
    (tmp_path / "train.txt").write_text("/high_quality/../../elsewhere/\n")
    with pytest.raises(CalibrationError, match="outside the folder"):
        FloorPlans.open(tmp_path, InputContext())


def test_a_box_ends_at_the_image() -> None:
    corners = np.array([(-5.0, 10), (20, 10), (20, 16), (-5, 16)])
    assert box_of(corners, (80, 100)) == (10, 13, 20, 6)
    assert box_of(corners - [50, 0], (80, 100)) is None


NESTED = "<g>" * 200 + "</g>" * 200
REFUSED = {
    "an entity": (svg(head='<!DOCTYPE svg [<!ENTITY a "aaaa">]>'), "has entities"),
    "a file as an entity": (svg(head='<!DOCTYPE svg [<!ENTITY a SYSTEM "file:///etc/hostname">]>'), "has entities"),
    "an entity that grows": (svg(head='<!DOCTYPE svg [<!ENTITY a "b"><!ENTITY c "&a;&a;&a;">]>'), "has entities"),
    "a parameter entity": (svg(head='<!DOCTYPE svg [<!ENTITY % a SYSTEM "http://127.0.0.1/a"> %a;]>'), "has entities"),
    "an unknown entity": (svg(more="&nbsp;"), "undefined entity"),
    "broken XML": (svg()[:-9], "not a plan"),
    "no XML": ("a plan", "not a plan"),
    "deep nesting": (svg(more=NESTED), "nested too deeply"),
    "two corners": (svg(inside=DOOR.replace("20,10 30,10 30,14 20,14 ", "1,2 3,4")), "polygon has the points"),
    "words": (svg(inside=DOOR.replace("20,10", "far,away")), "not a plan"),
    "not a number": (svg(inside=DOOR.replace("20,10", "nan,inf")), "polygon has the points"),
    "no wall": ('<svg xmlns="http://www.w3.org/2000/svg"/>', "has no wall"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_plan_that_is_damaged_or_declares_entities_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    vectors, message = REFUSED[name]
    with pytest.raises(CalibrationError, match=message) as error:
        FloorPlans.open(plan(tmp_path / "17", vectors), InputContext())
    assert "\n" not in str(error.value)


def test_a_document_type_without_entities_is_read_and_loads_nothing(tmp_path: Path) -> None:
    head = '<!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" "http://127.0.0.1:9/svg11.dtd">'
    folder = plan(tmp_path / "17", svg(head=HEAD + head))
    assert {name: len(each) for name, each in read_polygons(folder / "model.svg").items()} == {
        "Wall": 2, "Door": 1, "Window": 1,
    }  # fmt: skip
