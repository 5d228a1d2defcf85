"""Seams, entities, and the commands of hires-llava."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lamella
from lamella.data import ImageText, ImageTextRow, InputContext, Processing
from lamella.errors import CalibrationError, MethodError
from lamella.methods.hires_llava import (
    CUTS,
    EntityGrid,
    HiResLlava,
    Restoring,
    Seams,
    Slicing,
    build,
    compare_neighbours,
    entity_questions,
    hires_llava,
    judge,
    patch_maps,
    probe_entities,
    seams,
)
from lamella.methods.hires_llava.entities import (
    ENTITIES,
    NUMBERS,
    STRENGTHS,
    TURNS,
    PlacedEntity,
    covers,
    question,
    render,
)
from lamella.methods.hires_llava.page import figures
from lamella.runner import run
from lamella.stack import open_model
from lamella.train import TrainConfig
from lamella.zoo.nano import nano
from lamella.zoo.vlm import shapes_vlm

CONFIG = TrainConfig(steps=4, lr=1e-3, batch=4, save_every=2)


@pytest.fixture(scope="module")
def llava() -> Any:
    model, processor = shapes_vlm("llava", num_hidden_layers=2)
    return open_model(model), processor


@pytest.fixture(scope="module")
def folder(llava: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("llava")
    llava[0].model.save_pretrained(place)
    llava[1].save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def grid(llava: Any) -> EntityGrid:
    reader = InputContext(lambda: llava[1].tokenizer, processing_opener=lambda: Processing(llava[1]))
    return EntityGrid.open("entities", reader, questions=54)


# Entities


def test_questions_are_answered_by_what_is_drawn() -> None:
    seen: Counter[tuple[str, str]] = Counter()
    for each in islice(entity_questions("calibration"), 270):
        seen[each.task, each.cut] += 1
        names = [thing.name for thing in each.things]
        assert each.about in each.things and each.image.shape == (64, 64, 3)
        if each.task == "identification":
            assert each.answer == each.about.name
            assert each.about.position in each.prompt or len(names) == 1
        elif each.task == "position":
            assert (
                each.answer == each.about.position
                and names.count(each.about.name) == 1
                and each.about.name in each.prompt
            )
        elif each.prompt == "how many things are there?":
            assert each.answer == NUMBERS[len(names)]
        else:
            wanted = each.prompt.removesuffix("?").split()[-1]
            assert each.answer == NUMBERS[sum(thing.entity == wanted for thing in each.things)]
    assert set(seen) == set(product(("identification", "position", "counting"), CUTS))


def test_training_never_sees_how_a_test_is_drawn() -> None:
    looks = [
        {
            (thing.name, thing.turn, thing.strength)
            for each in islice(entity_questions(part), 300)
            for thing in each.things
        }
        for part in ("calibration", "test")
    ]
    assert looks[0].isdisjoint(looks[1])
    assert {name for name, *_ in looks[0]} & {name for name, *_ in looks[1]}


def test_turns_and_strengths_can_be_seen() -> None:
    """No two of them are drawn alike, so that what training never sees is new."""
    y, x = (np.mgrid[:96, :96] - 47.5) / 40
    for entity in ENTITIES:
        seen = {}
        for turn, strength in product(range(TURNS), range(STRENGTHS)):
            mask = covers(PlacedEntity(entity, "red", 0, 0, turn, strength), y, x)
            assert seen.setdefault(mask.tobytes(), (turn, strength)) == (turn, strength), entity


def test_the_same_number_is_the_same_question() -> None:
    for one, other in zip(
        islice(entity_questions("test", 3), 5), (question(n, "test", 3) for n in range(5)), strict=True
    ):
        assert one[:5] == other[:5] and (one.image == other.image).all()
    assert (question(0, "test", 3).image != question(0, "test", 4).image).any()


@pytest.mark.parametrize(("row", "column"), list(product(range(3), range(3))))
def test_a_thing_is_cut_by_as_many_seams_as_it_says(row: int, column: int) -> None:
    thing = PlacedEntity("square", "red", row, column, 0, 3)
    red = render([thing], 32, np.random.default_rng(0))[..., 0] > 150
    slices = [red[32 * r : 32 * r + 32, 32 * c : 32 * c + 32].any() for r in (0, 1) for c in (0, 1)]
    assert sum(slices) == {0: 1, 1: 2, 2: 4}[thing.seams]


def test_two_things_never_meet() -> None:
    pairs = (each.things for each in islice(entity_questions("calibration"), 200) if len(each.things) == 2)
    for first, second in pairs:
        assert max(abs(first.row - second.row), abs(first.column - second.column)) == 2


@pytest.mark.parametrize("bad", [{"part": "novel"}, {"tasks": ("taste",)}, {"tasks": ()}, {"side": 8}])
def test_questions_that_cannot_be_drawn_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(CalibrationError, match="must be calibration or test"):
        next(entity_questions(**{"part": "test"} | bad))


# Seams


def test_distances_of_neighbours_are_what_loops_say(llava: Any, grid: EntityGrid) -> None:
    model, processor, _ = build(llava[0], grid, Restoring(restore="none", sampler="all"))
    maps = patch_maps(model, processor, [np.ascontiguousarray(grid.questions[0].image[:50]), grid.questions[1].image])
    assert [tuple(f.shape[:2]) for f in (maps[0][0], maps[1][0])] == [(13, 16), (16, 16)]
    found = compare_neighbours(maps, 8)
    for layer in range(len(maps[0])):
        apart: dict[bool, list[float]] = {True: [], False: []}
        for of_image in maps:
            f = of_image[layer].double().numpy()
            for i, j in product(range(f.shape[0]), range(f.shape[1])):
                for di, dj in ((1, 0), (0, 1)):
                    if i + di < f.shape[0] and j + dj < f.shape[1]:
                        a, b = f[i, j], f[i + di, j + dj]
                        crosses = (i + di) // 8 != i // 8 or (j + dj) // 8 != j // 8
                        apart[crosses].append(1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b))
        assert found.across[layer] == pytest.approx(np.mean(apart[True]), abs=1e-5)
        assert found.inside[layer] == pytest.approx(np.mean(apart[False]), abs=1e-5)


def test_adapters_go_where_the_difference_rises_most() -> None:
    found = Seams([0.0, 0.3, 0.4, 0.9, 1.9], [0.0, 0.1, 0.1, 0.5, 0.6])
    assert np.allclose(found.scores, [0, 0.2, 0.3, 0.4, 1.3])
    assert found.rising(2, 4) == [0, 3] and found.rising(1, 3) == [0] and found.rising(9, 4) == [0, 1, 2, 3]


def test_a_probe_reads_what_is_there_and_nothing_else() -> None:
    questions, slicing = list(islice(entity_questions("calibration"), 270)), Slicing(32, 4)
    entities = sorted({each.about.entity for each in questions})
    told = [[torch.zeros(16, 16, 8) + torch.eye(8)[entities.index(each.about.entity)]] for each in questions]
    assert all(share == [1.0] for share in probe_entities(told, questions, slicing).values())
    blind = [[torch.zeros(16, 16, 8)] for _ in questions]
    assert max(share[0] or 0 for share in probe_entities(blind, questions, slicing).values()) < 0.5


# Commands


def test_only_what_is_new_and_the_projector_train(llava: Any, grid: EntityGrid) -> None:
    before = {name: each.clone() for name, each in llava[0].model.state_dict().items()}
    made = hires_llava(llava[0], grid, config=CONFIG)
    moved = {name for name, each in made.model.state_dict().items() if name in before and not each.equal(before[name])}
    assert moved and all("multi_modal_projector" in name for name in moved)
    assert all(each.equal(before[name]) for name, each in llava[0].model.state_dict().items())
    gate = made.model.get_parameter("model.vision_tower.encoder.layers.0.slice_restore.local.gate")
    assert gate.abs().max() > 0


@pytest.mark.parametrize("language", ["lora", "full"])
def test_the_language_model_trains_where_that_is_wanted(llava: Any, grid: EntityGrid, language: Any) -> None:
    made = hires_llava(llava[0], grid, language=language, rank=2, config=CONFIG).model
    before, after = llava[0].model.state_dict(), made.state_dict()
    assert all(".lora_" not in name for name in after)
    text = [name for name in before if "language_model.layers" in name and "proj" in name]
    assert text and not all(torch.equal(before[name], after[name]) for name in text)
    tower = [name for name in before if "vision_tower" in name]
    assert all(torch.equal(before[name], after[name]) for name in tower)


def test_adapters_stand_where_they_are_wanted(llava: Any, grid: EntityGrid) -> None:
    assert build(llava[0], grid, Restoring(restore="even"))[0].config.restored == [0]
    assert build(llava[0], grid, Restoring(restore="all"))[0].config.restored == [0, 1]
    assert build(llava[0], grid, Restoring(restore="none"))[0].config.restored == []
    assert build(llava[0], grid, Restoring(layers=(1,)))[0].config.restored == [1]
    made, _, measured = build(llava[0], grid, Restoring(restore="seams"))
    rises = np.diff(np.subtract(measured["across"], measured["inside"]))  # type: ignore[index]
    assert made.config.restored == [int(rises.argmax())]


def test_a_model_that_was_made_keeps_what_no_option_changes(llava: Any, grid: EntityGrid) -> None:
    first = Restoring(sampler="learnt", most_slices=4, layers=(1,), order="slices")
    made, processor, _ = build(llava[0], grid, first)
    rows = EntityGrid(grid.questions, Processing(processor))
    again, _, _ = build(open_model(made), rows, Restoring(view="sampled"))
    said = [getattr(again.config, name) for name in ("sampler", "most_slices", "restored", "order", "view")]
    assert said == ["learnt", 4, [1], "slices", "sampled"]
    assert torch.equal(again.model.sampler.queries, made.model.sampler.queries)
    back, _, _ = build(open_model(made), rows, Restoring(sampler="mine", restore="even"))
    assert (back.config.sampler, back.config.restored, back.config.most_slices) == ("mine", [0], 4)


def test_a_model_that_was_made_is_judged_measured_and_trained_on(folder: Path, tmp_path: Path) -> None:
    first = run("hires-llava", str(folder), "entities", questions=18, steps=2, out=tmp_path / "one")
    assert first.evidence.findings["adapters"] == [0]
    opened = lamella.open(tmp_path / "one")
    assert isinstance(opened.model, HiResLlava)
    judged = run("hires-llava", str(tmp_path / "one"), command="judge", questions=27, out=tmp_path / "judged")
    found = judged.evidence.findings
    assert found["questions"] == 27 and set(found["cuts"]) == set(CUTS)
    shares, questions = figures(judged.evidence)
    assert shares.values == found["positions"] and len(questions.images) == len(found["samples"]) > 0
    assert "Accuracy" in (tmp_path / "judged" / "report.html").read_text()
    measured = run("hires-llava", str(tmp_path / "one"), "entities", command="seams", questions=36, adapters=1)
    assert len(measured.evidence.findings["recommended"]) == 1 and "probe" in measured.evidence.findings
    second = run("hires-llava", str(tmp_path / "one"), "entities", questions=18, steps=2, out=tmp_path / "two")
    assert second.evidence.findings["adapters"] == [0]


def test_entities_are_a_data_set_that_is_read_as_any_other(llava: Any, folder: Path, tmp_path: Path) -> None:
    run("hires-llava", str(folder), command="entities", rows=9, held_out=3, out=tmp_path / "data")
    rows = [json.loads(line) for line in (tmp_path / "data" / "data.jsonl").read_text().splitlines()]
    assert len(rows) == 12 and {row["part"] for row in rows} == {"train", "test"}
    reader = InputContext(lambda: llava[1].tokenizer, split="test", processing_opener=lambda: Processing(llava[1]))
    read = ImageText.open(tmp_path / "data", reader)
    assert [each.answer for each in read] == [question(n, "test", side=32).answer for n in range(3)]
    assert (read[0].images[0] == question(0, "test", side=32).image).all()


def test_answers_are_judged_by_what_is_written(llava: Any) -> None:
    """The share that generation answers, word for word, of a model that has begun to count."""
    reader = InputContext(lambda: llava[1].tokenizer, processing_opener=lambda: Processing(llava[1]))
    grid = EntityGrid.open("entities:counting", reader, questions=27)
    config = TrainConfig(steps=30, lr=3e-3, batch=8)
    made = hires_llava(llava[0], grid, language="full", config=config)
    processing = Processing(made.processor)
    prompts = processing.prompts(grid.items)
    written = made.model.generate(**prompts, max_new_tokens=3, do_sample=False)[:, prompts["input_ids"].shape[1] :]
    said = processing.tokenizer.batch_decode(written, skip_special_tokens=True)
    right = [text.strip() == each.answer for text, each in zip(said, grid.questions, strict=True)]
    found = judge(open_model(made.model), EntityGrid(grid.questions, processing))
    assert 0 < sum(right) < len(right) and found["accuracy"] == pytest.approx(np.mean(right))
    for cut in CUTS:
        assert found["cuts"][cut] == pytest.approx(
            np.mean([r for r, e in zip(right, grid.questions, strict=True) if e.cut == cut])
        )


def test_what_cannot_be_used_is_one_line(folder: Path, grid: EntityGrid) -> None:
    with pytest.raises(MethodError, match="works on models of images and text"):
        run("hires-llava", nano("llama"), "entities")
    with pytest.raises(CalibrationError, match="give entities"):
        run("hires-llava", str(folder), command="judge", test="shapes")
    with pytest.raises(MethodError, match="layers must be different and between 0 and 1"):
        run("hires-llava", str(folder), "entities", layers=(5,), steps=1)


def test_seams_of_a_plain_model_are_measured_without_adapters(llava: Any, grid: EntityGrid) -> None:
    found = seams(llava[0], grid, adapters=1)
    assert found["recommended"] == [int(np.diff(found["scores"]).argmax())] and len(found["scores"]) == 3


def test_images_without_seams_or_no_images_are_refused(llava: Any, grid: EntityGrid) -> None:
    small = ImageText.open("shapes:colour", InputContext(processing_opener=lambda: grid.processing), rows=4)
    with pytest.raises(CalibrationError, match="no image has a seam"):
        seams(llava[0], small)
    with pytest.raises(CalibrationError, match="no image has a seam"):
        build(llava[0], small, Restoring(restore="seams"))
    said = ({"role": "user", "content": "where?"}, {"role": "assistant", "content": "there"})
    with pytest.raises(CalibrationError, match="have no images"):
        seams(llava[0], ImageText([ImageTextRow((), said)], grid.processing))
    with pytest.raises(CalibrationError, match="fewer than two classes for the probe"):
        seams(llava[0], EntityGrid(grid.questions[:2], grid.processing))


@pytest.mark.parametrize("kind", ["qwen2_vl", "idefics3"])
def test_other_models_that_read_images_are_judged_too(kind: str) -> None:
    model, processor = shapes_vlm(kind, num_hidden_layers=2)
    reader = InputContext(processing_opener=lambda: Processing(processor))
    found = judge(open_model(model), EntityGrid.open("entities", reader, questions=9, slice_side=16))
    assert found["questions"] == 9
    assert EntityGrid.open("entities", reader, questions=1).questions[0].image.shape[0] in (448, 64)
