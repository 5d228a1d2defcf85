"""Tests of the comparison room by room in the reproduction of agile3d."""

from __future__ import annotations

import sys
from pathlib import Path
from runpy import run_path

import numpy as np
import pytest

from lamella.methods.agile3d.judge import Curve, CurvePoint

REPRODUCTIONS = Path(__file__).parents[2] / "reproductions"


def test_a_room_that_three_seeds_were_judged_in_is_one_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(REPRODUCTIONS), *sys.path])
    from harness.measured import Measured

    room_by_room = run_path(str(REPRODUCTIONS / "agile3d.py"))["room_by_room"]
    ious = np.random.default_rng(0).uniform(0, 1, (24, 2))

    def curves(column: int) -> list[Curve]:
        return [[CurvePoint(clicks, iou) for clicks in range(1, 7)] for iou in ious[:, column]]

    gains = room_by_room({"agile3d": curves(0), "alone": curves(1)})
    once = Measured.over_seeds_and_items([gains])
    thrice = Measured.over_seeds_and_items([gains] * 3)  # seeds that agree add no information on rooms
    assert thrice.figure == pytest.approx(100 * float((ious[:, 0] - ious[:, 1]).mean()))
    assert (thrice.low, thrice.high) == pytest.approx((once.low, once.high))
