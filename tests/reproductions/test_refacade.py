"""How far apart the reproduction of refacade says that two sets of pictures are."""

from __future__ import annotations

import sys
from pathlib import Path
from runpy import run_path

import pytest
import torch

REPRODUCTIONS = Path(__file__).parents[2] / "reproductions"


def test_energy_distance_is_nothing_of_one_kind_and_grows_with_what_sets_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "path", [str(REPRODUCTIONS), *sys.path])
    distance = run_path(str(REPRODUCTIONS / "refacade.py"))["energy_distance"]
    drawn = torch.Generator().manual_seed(0)
    one, other, flat = (torch.randn(400, 20, generator=drawn) for _ in range(3))
    assert abs(distance(one, other)) < 0.02
    moved = [distance(one, other + shift) for shift in (0.3, 0.6)]
    assert 0.05 < moved[0] < moved[1]
    assert distance(one, 0.5 * flat) > 0.05  # what is paler is of another kind
    line = distance(torch.tensor([[0.0], [1.0]]), torch.tensor([[3.0], [4.0]]))
    assert line == pytest.approx(2 * 3 - 1 - 1)  # by hand
