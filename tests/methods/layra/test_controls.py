"""What LayRA is compared with, what is forgotten at equal new loss, and which ends are on the front."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lamella.errors import MethodError
from lamella.files import Work
from lamella.methods.layra import (
    ArmComparison,
    ArmResult,
    Edges,
    Language,
    arms,
    at_equal_loss,
    common_loss,
    compare,
    follow,
    layra,
)
from lamella.search import pareto
from lamella.stack import Stack
from lamella.train import TrainConfig, blocks
from lamella.zoo.nano import nano

CONFIG = TrainConfig(lr=1e-2, schedule="linear", steps=8, batch=4, eval_every=4)
EDGES = Edges(4, 1, 1)
ARMS = arms(EDGES, replay=0.5)


def language(seed: int, low: int) -> Language:
    words = torch.randint(low, low + 8, (24, 4), generator=torch.Generator().manual_seed(seed))
    rows = blocks(words.repeat(1, 3), loss_on="all")
    return Language(rows[:18], rows[18:], 100)


ENG, SWH, URD = language(0, 3), language(1, 40), language(2, 80)
WATCHED = {"eng": ENG, "swh": SWH, "urd": URD}


def weights(model: Any) -> dict[str, Tensor]:
    return {name: each.detach().clone() for name, each in model.named_parameters()}


def followed(name: str, work: Path, languages: Any = None, seed: int = 0) -> tuple[Stack, ArmResult, Stack]:
    stack, options = Stack(nano("llama")), {}
    if ARMS[name].replay:
        options["old"] = ENG.samples
    course, after = follow(stack, ARMS[name], languages or {"swh": SWH}, WATCHED, replace(CONFIG, seed=seed), work=work,
                           curves=["eng", "swh"], **options)  # fmt: skip
    return stack, course, after


def test_controls_have_the_size_and_the_places_that_their_names_say() -> None:
    known = arms(Edges(30, 10, 2))
    twelve = {name: known[name].layers for name in ("layra", "lora, middle", "lora, first", "lora, last")}
    assert {len(layers or ()) for layers in twelve.values()} == {12}
    assert twelve["lora, middle"] == tuple(range(9, 21)) and twelve["lora, last"] == tuple(range(18, 30))
    assert known["lora"].layers == tuple(range(30)) and known["lora"].r == 8
    assert known["lora, same parameters"].r == 3  # 8 * 12 / 30 = 3.2
    assert known["full"].layers is None and known["full"].r is known["full, same layers"].r is None
    assert "layra, replay" not in known and ARMS["layra, replay"].replay == 0.5


@pytest.mark.parametrize("name", ARMS)
def test_each_arm_trains_its_own_part_and_nothing_else(name: str, tmp_path: Path) -> None:
    stack, course, after = followed(name, tmp_path)
    arm, before, now = ARMS[name], weights(Stack(nano("llama")).model), weights(after.model)
    changed = {key for key in before if not torch.equal(before[key], now[key])}
    places = {key.split(".")[2] if ".layers." in key else "outside" for key in changed}
    wanted = {str(layer) for layer in arm.layers} if arm.layers is not None else {"0", "1", "2", "3", "outside"}
    assert places == wanted
    assert all(torch.equal(each, before[key]) for key, each in weights(stack.model).items())
    if arm.r is None:
        assert course.trainable == sum(now[key].numel() for key in changed)
    else:
        assert all(key.endswith("_proj.weight") for key in changed)
    assert [len(row) for row in course.rows] == [3, 3]
    assert course.rows[1]["swh"] < course.rows[0]["swh"] or arm.replay  # which leaves it half of the steps
    assert {each: len(values) for each, values in course.curve.items()} == {"eng": 3, "swh": 3}  # steps 0, 4 and 8
    assert course.curve["swh"][0] == pytest.approx(course.rows[0]["swh"], rel=1e-5)
    assert course.curve["swh"][-1] == pytest.approx(course.rows[1]["swh"], rel=1e-4)


def test_equal_parameters_are_equal_where_the_ranks_divide(tmp_path: Path) -> None:
    sizes = [followed(name, tmp_path / name)[1].trainable for name in ("layra", "lora, same parameters", "lora")]
    assert sizes[0] == sizes[1] == sizes[2] / 2


def test_the_arm_layra_is_layra(tmp_path: Path) -> None:
    stack, course, after = followed("layra", tmp_path, {"swh": SWH, "urd": URD}, seed=4)
    made = layra(stack, {"swh": SWH, "urd": URD}, {"eng": ENG}, first=1, last=1, config=replace(CONFIG, seed=4))
    for name, each in made.stack.model.named_parameters():
        torch.testing.assert_close(each, after.model.get_parameter(name), atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(made.matrix.rows, course.rows, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_more_languages_go_on_from_what_is_learnt_already(tmp_path: Path) -> None:
    whole = followed("full", tmp_path / "whole", {"swh": SWH, "urd": URD})[1]
    first = followed("full", tmp_path / "steps")[1]
    changed = {path: path.stat().st_mtime_ns for path in (tmp_path / "steps").rglob("*.safetensors")}
    again = followed("full", tmp_path / "steps", {"swh": SWH, "urd": URD})[1]
    assert all(path.stat().st_mtime_ns == time for path, time in changed.items())
    assert again == whole and again.rows[:2] == first.rows
    assert ArmResult(**json.loads(json.dumps(again.as_dict()))) == again


def test_replay_needs_something_to_replay_and_lowers_what_is_forgotten(tmp_path: Path) -> None:
    with pytest.raises(MethodError, match="replays old text: give old text"):
        follow(Stack(nano("llama")), ARMS["layra, replay"], {"swh": SWH}, WATCHED, CONFIG, work=tmp_path)
    rows = [followed(name, tmp_path / name)[1].rows[1]["eng"] for name in ("layra, replay", "layra")]
    assert rows[0] < rows[1]


@pytest.mark.exhaustive
def test_a_comparison_runs_every_arm_with_every_rate_and_chooses_on_other_text_than_it_reports(tmp_path: Path) -> None:
    stack, short = Stack(nano("llama")), replace(CONFIG, steps=4, eval_every=2)
    found = compare(stack, {"swh": SWH}, {"eng": ENG}, first=1, last=1, rates=(1e-3, 1e-2), replay=0.5, config=short,
                    work=Work(tmp_path))  # fmt: skip
    assert set(found.results) == set(ARMS) and all(len(of) == 2 for of in found.results.values())
    goal, forgotten = found.at_equal_loss()
    for name, course in found.best().items():
        chosen = [at_equal_loss(*found.curves(each, True), common_loss(
            {key: [found.curves(one, True)[0] for one in of] for key, of in found.results.items()}
        )) for each in found.results[name]]  # fmt: skip
        mine = chosen[found.results[name].index(course)]
        assert mine == min(each for each in chosen if each is not None)
        assert forgotten[name] == at_equal_loss(course.curve["swh"], course.curve["eng"], goal) - course.curve["eng"][0]
    assert json.loads(json.dumps(found.findings))["front"] and found.notes[0].startswith("At ")
    assert found.results["layra"][0].curve["swh"] != found.results["layra"][0].curve["swh, to choose by"]
    again = compare(stack, {"swh": SWH}, {"eng": ENG}, first=1, last=1, rates=(1e-3, 1e-2), replay=0.5, config=short,
                    work=Work(tmp_path))  # fmt: skip
    assert again == found


def test_a_better_place_than_the_edges_is_named() -> None:
    def course(name: str, rise: float) -> ArmResult:
        curve = {"swh": [4.0, 2.0], "eng": [1.0, 1.0 + rise]}
        curve |= {f"{each}, to choose by": values for each, values in curve.items()}
        return ArmResult(name, 1e-3, 1, [{"swh": 4.0, "eng": 1.0}, {"swh": 2.0, "eng": 1.0 + rise}], curve)

    rises = {"layra": 0.5, "lora, last": 0.25, "lora, middle": 0.75}
    found = ArmComparison(
        language="swh", old=("eng",), results={name: [course(name, rise)] for name, rise in rises.items()}
    )
    assert found.at_equal_loss() == (2.0, rises)
    assert "lora, last forgets less" in found.notes[1]
    assert found.ends()["layra", 1e-3] == (2.0, 0.5)


def test_a_comparison_needs_one_new_language_an_old_one_and_text_to_choose_by(tmp_path: Path) -> None:
    stack = Stack(nano("llama"))
    for new, old in (({"swh": SWH, "urd": URD}, {"eng": ENG}), ({"swh": SWH}, {})):
        with pytest.raises(MethodError, match="give one new and at least one old language"):
            compare(stack, new, old)
    few = Language(SWH.samples, SWH.held_out[:1], 20)
    with pytest.raises(MethodError, match="'swh' has one held-out sample"):
        compare(stack, {"swh": few}, {"eng": ENG})


def test_losses_between_two_points_of_a_curve_lie_on_a_line() -> None:
    new, old = [4.0, 3.0, 3.5, 2.0], [1.0, 2.0, 2.5, 4.0]
    assert at_equal_loss(new, old, 3.25) == 1.75  # the first time, not after the loss rose again
    assert at_equal_loss(new, old, 3.0) == 2.0
    assert at_equal_loss(new, old, 2.6) == pytest.approx(2.5 + 0.6 * 1.5)
    assert at_equal_loss(new, old, 5.0) == 1.0 and at_equal_loss(new, old, 1.0) is None


def test_the_common_loss_is_the_lowest_that_the_slowest_arm_reaches() -> None:
    assert common_loss({"a": [[4.0, 1.0], [4.0, 2.0]], "b": [[4.0, 1.5, 1.6]]}) == 1.5


def test_the_front_is_what_nothing_beats_found_by_brute_force() -> None:
    drawn = torch.randint(0, 6, (40, 2), generator=torch.Generator().manual_seed(1)).tolist()
    points = {number: (float(x), float(y)) for number, (x, y) in enumerate(drawn)}
    front = pareto(points)
    for name, (x, y) in points.items():
        beaten = [1 for a, b in points.values() if (a <= x and b < y) or (a < x and b <= y)]
        assert (name in front) == (not beaten)
