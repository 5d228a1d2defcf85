"""What the reproduction of muranet compares, and what it makes of networks that never get where they should."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from runpy import run_path

import pytest
import torch

REPRODUCTIONS = Path(__file__).parents[2] / "reproductions"


def test_a_seed_in_which_one_of_two_never_arrives_is_won_or_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(REPRODUCTIONS), *sys.path])
    ratios = run_path(str(REPRODUCTIONS / "muranet.py"))["ratios"]
    assert ratios([30, 60, math.inf, math.inf], [60, math.inf, 60, math.inf], 120) == [0.5, 0.5, 2.0]


def test_networks_to_compare_with_have_one_task_and_as_many_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(REPRODUCTIONS), *sys.path])
    script = run_path(str(REPRODUCTIONS / "muranet.py"))
    built = {name: build(script["FULL"]) for name, build in script["ARMS"].items()}
    sizes = {name: sum(each.numel() for each in network.parameters()) for name, network in built.items()}
    for ours, theirs in (("UNET", "ONLY_WALLS"), ("YOLO", "ONLY_OPENINGS"), ("WITHOUT", "BOTH")):
        assert sizes[script[ours]] == pytest.approx(sizes[script[theirs]], rel=0.05), sizes
    x = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    walls, openings = (built[script[name]].eval()(x) for name in ("UNET", "YOLO"))
    assert walls.walls[0].shape == (2, 64, 64) and walls.cells is None
    assert openings.walls == [] and openings.cells.shape == (2, 16**2 + 8**2 + 4**2, 7)
