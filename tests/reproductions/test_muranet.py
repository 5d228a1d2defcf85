"""What the reproduction of muranet makes of networks that never get where they should."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from runpy import run_path

import pytest

REPRODUCTIONS = Path(__file__).parents[2] / "reproductions"


def test_a_seed_in_which_one_of_two_never_arrives_is_won_or_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(REPRODUCTIONS), *sys.path])
    ratios = run_path(str(REPRODUCTIONS / "muranet.py"))["ratios"]
    assert ratios([30, 60, math.inf, math.inf], [60, math.inf, 60, math.inf], 120) == [0.5, 0.5, 2.0]
