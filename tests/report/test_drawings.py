"""Drawings that need no script: what is in them, and when there are none."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from lamella.report.chart import chart
from lamella.report.figure import figure
from lamella.report.plane import plane


def ticks(svg: str) -> list[float]:
    """The numbers at the axes."""
    texts = [each.text or "" for each in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    return [float(each) for each in texts if re.fullmatch(r"-?\d+(\.\d+)?(e-?\d+)?", each)]


def test_nothing_is_drawn_of_nothing() -> None:
    assert chart({"training": []}, "loss", "point") == ""
    assert plane({}, "step", "loss") == plane({"training": []}, "step", "loss") == ""
    assert figure("", "a caption") == ""


def test_a_training_with_one_point_in_its_log_is_a_dot() -> None:
    svg = chart({"training": [2.5], "held out": [2.0, 1.5]}, "loss", "point")
    assert svg.count("<circle") == 1
    ElementTree.fromstring(svg)


def test_a_caption_is_escaped_once() -> None:
    assert figure("<svg/>", "a < b & c") == "<figure><svg/><figcaption>a &lt; b &amp; c</figcaption></figure>"
    assert figure("<svg/>") == "<figure><svg/></figure>"


@pytest.mark.parametrize("values", [[0.08], [0.08, 0.08], [0.0, 3.0], [0.01, 9.0], [0.0]])
def test_an_axis_of_quantities_that_are_not_negative_has_no_negative_tick(values: list[float]) -> None:
    assert min(ticks(plane({"loss": list(enumerate(values))}, "layer", "loss"))) >= 0


@pytest.mark.parametrize("values", [[-0.08], [-3.0, -1.0]])
def test_an_axis_of_negative_quantities_has_no_positive_tick(values: list[float]) -> None:
    assert max(ticks(plane({"gain": [(each, each) for each in values]}, "gain", "gain"))) <= 0


def test_an_axis_of_both_signs_has_room_on_both_sides() -> None:
    found = ticks(plane({"gain": [(-1.0, -1.0), (1.0, 1.0)]}, "gain", "gain"))
    assert min(found) < -1 and max(found) > 1
