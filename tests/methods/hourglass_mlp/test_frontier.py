"""The search for shapes: its families, its data, and that what it says is what it measured."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lamella.errors import BudgetError, CalibrationError, MethodError
from lamella.files import Work
from lamella.measure import Recording
from lamella.methods.hourglass_mlp import MLPShape, ShapeGrid, Vectors, frontier, psnr
from lamella.methods.hourglass_mlp.frontier import TRAINING, front, point
from lamella.methods.hourglass_mlp.page import frontiers, summary
from lamella.methods.hourglass_mlp.vectors import Noisy, noisy
from lamella.result import Evidence

SCENES = Vectors.open("scenes:denoise", rows=60, side=4)
GRID = ShapeGrid(d_z=(20,), d_h=(4,), depth=(1, 2), wide=(24,), wide_depth=(1,))
SMALL: dict[str, Any] = {"grid": GRID, "lrs": (1e-3, 1e-1), "seeds": 2, "config": replace(TRAINING, steps=3, batch=16)}


def test_families_differ_in_their_maps_and_in_what_is_wide() -> None:
    shapes = {each.family: each for each in GRID.shapes(("hourglass", "frozen", "conventional", "lean"), 16, 16)}
    assert {name: (each.d_z, each.d_h) for name, each in shapes.items()} == {
        "hourglass": (20, 4), "frozen": (20, 4), "conventional": (16, 24), "lean": (16, 24),
    }  # fmt: skip
    maps = 2 * 20 * 16
    assert shapes["hourglass"].size(16, 16) == (maps + 2 * 20 * 8, maps + 2 * 20 * 8)
    assert shapes["frozen"].size(16, 16) == (maps + 2 * 20 * 8, maps // 2 + 2 * 20 * 8)
    assert shapes["conventional"].size(16, 16).total == 2 * 16 * 16 + 2 * 16 * 24
    assert shapes["lean"].size(16, 16).total == 2 * 16 * 24
    for shape in shapes.values():
        network = shape.network(16, 16, seed=1)
        assert sum(each.numel() for each in network.parameters()) == shape.size(16, 16).trainable


def test_no_family_is_lean_where_input_and_output_differ() -> None:
    assert {each.family for each in GRID.shapes(("conventional", "lean"), 4, 16)} == {"conventional"}


def test_a_narrow_network_whose_skip_is_no_wider_than_its_input_is_called_a_bottleneck() -> None:
    grid = replace(GRID, d_z=(12, 16, 17, 20), depth=(1,))
    found = grid.shapes(("hourglass", "frozen", "bottleneck"), 16, 16)
    assert [(each.family, each.d_z) for each in found] == [
        ("hourglass", 17), ("hourglass", 20), ("frozen", 17), ("frozen", 20), ("bottleneck", 12), ("bottleneck", 16),
    ]  # fmt: skip
    assert found[4].size(16, 16) == (2 * 12 * 16 + 2 * 12 * 4,) * 2


def test_the_frontier_is_what_nothing_smaller_beats_on_held_out_rows() -> None:
    drawn = np.random.default_rng(0)
    points = [{"family": "lean", "total": int(a), "held_out": float(b)} for a, b in drawn.integers(0, 8, (40, 2))]
    expected = [
        place for place, one in enumerate(points)
        if not any(o != one and o["total"] <= one["total"] and o["held_out"] >= one["held_out"] for o in points)
    ]  # fmt: skip
    assert sorted(front(points, "total")) == sorted(front(points, "total", "lean")) == expected
    assert front(points, "total", "frozen") == []


def test_rates_and_the_frontier_are_chosen_on_held_out_rows_and_never_on_test_rows() -> None:
    shapes = GRID.shapes(("hourglass",), 16, 16)
    runs = {1e-3: [[20.0, 9.0], [22.0, 8.0]], 1e-2: [[21.5, 30.0], [20.0, 31.0]]}  # the means: 21 and 20.75
    small, large = (point(SCENES, shape, runs) for shape in shapes)
    assert (small["lr"], small["held_out"], small["test"]) == (1e-3, 21.0, 8.5)
    assert small["spread"] == pytest.approx(0.5**0.5)
    assert front([small, large | {"held_out": 20.9, "test": 99.0}], "total") == [0]


@pytest.mark.slow
def test_a_search_says_what_the_networks_reach_and_goes_on_after_a_stop(tmp_path: Path) -> None:
    study = frontier(SCENES, families=("hourglass", "lean"), **SMALL, work=Work(tmp_path))
    assert [one["total"] for one in study["points"]] == [768, 640 + 160, 640 + 320]
    for one in study["points"]:
        assert one["held_out"] == max(one["rates"].values()) == one["rates"][f"{one['lr']:g}"]
    lines = (tmp_path / "frontier.jsonl").read_text().splitlines()
    assert len(lines) == 1 + 3 * 2 * 2
    assert [file.name for file in tmp_path.iterdir()] == ["frontier.jsonl"]  # checkpoints are gone
    (tmp_path / "frontier.jsonl").write_text("\n".join(lines[:6]) + "\n")
    again = frontier(SCENES, families=("hourglass", "lean"), **SMALL, work=Work(tmp_path))
    assert again.findings == study.findings


def test_noise_is_fresh_in_training_and_fixed_where_it_is_judged() -> None:
    class Seen(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.x = x
            return x

    seen, loss = Seen(), Noisy(0.25)
    batch = {"x": torch.full((4000, 4), 0.5), "y": torch.full((4000, 4), 0.5)}
    first = float(loss(seen.train(), batch))
    noise = seen.x - 0.5
    assert float(loss(seen, batch)) != first
    clamped = torch.linspace(-8, 8, 400_001, dtype=torch.float64)
    density = (-(clamped**2) / 2).exp()
    expected = float(((0.25 * clamped).clamp(-0.5, 0.5) ** 2 * density).sum() / density.sum())
    assert first == pytest.approx(expected, rel=0.05) and float(noise.abs().max()) <= 0.5
    assert float(loss(seen.eval(), batch)) == 0


def test_tasks_are_made_as_they_are_described() -> None:
    images = torch.rand(30, 4, 4, generator=torch.Generator().manual_seed(0))
    classes = torch.arange(30) % 3
    made = {task: Vectors.of(task, images, task, 20, 5, 0.25, classes) for task in ("prototype", "denoise", "upscale")}
    flat = images.flatten(1)
    for task in made.values():
        assert [len(part) for part in (task.train, task.held_out, task.test)] == [15, 5, 10]
    assert torch.equal(made["prototype"].test.y, flat[[int(each) for each in classes[20:]]])  # 0, 1, 2 come first
    assert torch.equal(made["denoise"].train.x, flat[:15]) and torch.equal(made["denoise"].test.y, flat[20:])
    assert not torch.equal(made["denoise"].test.x, flat[20:]) and made["denoise"].sigma == 0.25
    assert float(made["denoise"].test.x.min()) >= 0 and float(made["denoise"].test.x.max()) <= 1
    assert (made["upscale"].d_in, made["upscale"].d_out) == (4, 16)
    constant = Vectors.of("c", torch.full((30, 4, 4), 0.3), "upscale", 20, 5, 0.0)
    torch.testing.assert_close(constant.train.x, torch.full((15, 4), 0.3))
    again = Vectors.of("denoise", images, "denoise", 20, 5, 0.25)
    assert torch.equal(again.test.x, made["denoise"].test.x)


def test_psnr_is_that_of_the_definition() -> None:
    rows = Recording(torch.zeros(5, 4), torch.full((5, 4), 0.1))
    assert psnr(nn.Identity(), rows) == pytest.approx(20, abs=1e-5)
    assert noisy(torch.zeros(3, 3), 0.0).abs().max() == 0


def test_pairs_of_vectors_are_read_from_a_file_and_refused_in_one_line(tmp_path: Path) -> None:
    drawn = np.random.default_rng(0)
    file = tmp_path / "pairs.npz"
    np.savez(file, x=drawn.normal(size=(50, 3)), y=drawn.uniform(size=(50, 2)))
    task = Vectors.open(str(file))
    assert (task.d_in, task.d_out) == (3, 2) and [len(task.train), len(task.held_out), len(task.test)] == [35, 5, 10]
    for content, said in (
        ({"x": np.zeros((50, 3)), "y": 2 * np.ones((50, 2))}, "must be between 0 and 1"),
        ({"x": np.zeros((5, 3)), "y": np.zeros((5, 2))}, "40 or more"),
        ({"x": np.zeros((50, 3))}, "x and y of real numbers are missing"),
        ({"x": np.array([{}] * 50), "y": np.zeros((50, 2))}, "pickled objects are not loaded"),
        ({"x": np.full((50, 3), 1j), "y": np.zeros((50, 2))}, "real numbers"),
        ({"x": np.array(["a"] * 50), "y": np.zeros((50, 2))}, "real numbers"),
        ({"x": np.full((50, 3), np.nan), "y": np.zeros((50, 2))}, "not finite"),
        ({"x": np.full((50, 3), 1e300), "y": np.zeros((50, 2))}, "not finite"),
        ({"x": np.zeros((50, 3)), "y": np.zeros((50, 0))}, r"y \[50, 0\]"),
    ):
        np.savez(file, **content)
        with pytest.raises(CalibrationError, match=said) as error:
            Vectors.open(str(file))
        assert "\n" not in str(error.value)
    for name in ("digits", "scenes:prototype", "letters:denoise", "digits:paint"):
        with pytest.raises(CalibrationError, match="there is no task"):
            Vectors.open(name)
    with pytest.raises(CalibrationError, match="side 5"):
        Vectors.open("scenes:denoise", side=5)


def test_a_budget_below_the_smallest_shape_is_refused_with_that_shape() -> None:
    with pytest.raises(BudgetError, match=r"most: 700 .* smallest shape, lean 16 x 24 x 1 with 768"):
        frontier(SCENES, most=700, **SMALL)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"families": ("hourglass", "tall")}, "families hourglass, tall"),
        ({"grid": ShapeGrid(d_z=(18,), d_h=(18,))}, "hourglass 18 x 18 x 4: a hourglass network needs d_h below d_z"),
        (
            {"grid": ShapeGrid(d_z=(16,), d_h=(4,)), "families": ("frozen",)},
            "frozen: no network of these shapes takes 16 inputs",
        ),
        ({"config": replace(TRAINING, batch=1)}, "batch 1: give at least 2"),
        ({"config": replace(TRAINING, lr=1e-2)}, "lr 0.01: every shape is trained with all of lrs 0.001, 0.1"),
        ({"grid": ShapeGrid(wide=(8,))}, "conventional 16 x 8 x 1: a conventional network needs d_h above d_z"),
    ],
)
def test_what_cannot_be_searched_is_refused_in_one_line(options: dict[str, Any], said: str) -> None:
    with pytest.raises(MethodError, match=said) as error:
        frontier(SCENES, **(SMALL | options))
    assert "\n" not in str(error.value)


def test_the_page_draws_a_line_for_each_family(tmp_path: Path) -> None:
    study = frontier(SCENES, **(SMALL | {"lrs": (1e-3,), "seeds": 1}), work=Work(tmp_path))
    drawn, points = frontiers(study.findings), study.findings["points"]
    assert {"hourglass", "frozen", "conventional", "lean"} <= set(drawn.points)
    assert {family: list(each.at) for family, each in drawn.points.items()} == {
        family: sorted((points[place][study.findings["counted"]] / 1000, points[place]["test"]) for place in places)
        for family, places in study.findings["fronts"].items()
        if places
    }
    assert drawn.x.endswith("parameters, thousands") and drawn.y == "PSNR on test rows, dB"
    evidence = Evidence(kind="study", provenance={"method": "hourglass-mlp"}, environment={}, findings=study.findings)
    result = summary(evidence)
    assert len(result.tables[0].rows) == 6 and "dB on test rows" in result.verdict
    assert all(math.isfinite(row[6]) for row in result.tables[0].rows)


def test_shapes_are_named_by_family_and_sizes() -> None:
    assert MLPShape("hourglass", 66, 10, 4).name == "hourglass 66 x 10 x 4"
