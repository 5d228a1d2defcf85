"""The synthetic shapes: text about an image is true of its pixels, which are parsed here by independent code."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import pytest
from transformers import AutoTokenizer

from lamella.errors import CalibrationError
from lamella.zoo.worlds import NOVEL, TASKS, WORDS, ShapeScene, examples, render, scenes, word_tokenizer

# What anyone would call these colours, by which channels are on.
CHANNELS = {(1, 0, 0): "red", (0, 1, 0): "green", (0, 0, 1): "blue", (1, 1, 0): "yellow", (1, 0, 1): "purple",
            (0, 1, 1): "cyan"}  # fmt: skip
NUMBERS = ["zero", "one", "two", "three", "four"]
PARTS: Any = ("calibration", "test", "novel")


class Seen(NamedTuple):
    shape: str
    colour: str
    row: int
    column: int


def look(image: np.ndarray) -> list[Seen]:
    """Return the objects in an image, from its pixels alone."""
    size = len(image) // 4
    found = []
    for row, column in itertools.product(range(4), range(4)):
        cell = image[row * size : (row + 1) * size, column * size : (column + 1) * size].astype(int)
        if cell.min() > 90:
            found.append(Seen("tile", "grey", row, column))
            continue
        mask = np.ptp(cell, axis=2) > 60
        if mask.any():
            found.append(Seen(shape_of(mask), colour_of(cell[mask]), row, column))
    return found


def colour_of(pixels: np.ndarray) -> str:
    red, green, blue = pixels.mean(axis=0)
    middle = (max(red, green, blue) + min(red, green, blue)) / 2
    return CHANNELS[(int(red > middle), int(green > middle), int(blue > middle))]


def shape_of(mask: np.ndarray) -> str:
    """By the corners of the box around it, else by whether it grows wider below its top, or fills most of the box."""
    rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    top, bottom = box[0, 0] and box[0, -1], box[-1, 0] and box[-1, -1]
    if top or bottom:
        return "square" if top and bottom else "triangle"
    return "circle" if box[1].sum() > box[0].sum() or box.mean() > 0.7 else "cross"


def place(thing: Seen) -> str:
    return f"row {NUMBERS[thing.row + 1]} column {NUMBERS[thing.column + 1]}"


def named(things: list[Seen], colour: str, shape: str) -> list[Seen]:
    return [each for each in things if each.shape == shape and each.colour == colour]


def expected(prompt: str, things: list[Seen]) -> str:
    """The answer to a prompt, from what was seen."""
    shapes = [each for each in things if each.shape != "tile"]
    if prompt == "describe the picture.":
        return " and ".join(f"a {each.colour} {each.shape}" for each in things)
    if prompt == "list the shapes.":
        return " ".join(f"{each.shape} {each.colour} {place(each)}" for each in things)
    if match := re.fullmatch(r"what colour is the (\w+)\?", prompt):
        [one] = [each for each in shapes if each.shape == match[1]]
        return one.colour
    if match := re.fullmatch(r"how many (?:(\w+) )?(\w+) are there\?", prompt):
        plural = {"circles": "circle", "squares": "square", "triangles": "triangle", "crosses": "cross"}
        wanted = [each for each in shapes if match[1] in (None, each.colour)]
        return NUMBERS[len([each for each in wanted if plural.get(match[2], each.shape) == each.shape])]
    if match := re.fullmatch(r"where is the (\w+) (\w+)\?", prompt):
        [one] = named(shapes, match[1], match[2])
        return place(one)
    if match := re.fullmatch(r"where is the (\w+) (\w+) from the (\w+) (\w+)\?", prompt):
        [one], [other] = named(shapes, match[1], match[2]), named(shapes, match[3], match[4])
        words = ["above"] * (one.row < other.row) + ["below"] * (one.row > other.row)
        return " ".join(words + ["left"] * (one.column < other.column) + ["right"] * (one.column > other.column))
    return entailed(prompt, things, shapes)


def entailed(prompt: str, things: list[Seen], shapes: list[Seen]) -> str:
    covered = len(shapes) < len(things)
    matched = re.fullmatch(r"is it true that (.*)\?", prompt)
    assert matched is not None, prompt
    sentence = matched[1]
    if match := re.fullmatch(r"there is a (\w+) (\w+)", sentence):
        return "yes" if named(shapes, match[1], match[2]) else "maybe" if covered else "no"
    if match := re.fullmatch(r"the shape in (row \w+ column \w+) is (\w+)", sentence):
        [one] = [each for each in things if place(each) == match[1]]
        return "maybe" if one.shape == "tile" else "yes" if one.colour == match[2] else "no"
    match = re.fullmatch(r"the (\w+) (\w+) is (above|below|left of|right of) the (\w+) (\w+)", sentence)
    assert match is not None, sentence
    first, second = named(shapes, match[1], match[2]), named(shapes, match[4], match[5])
    if not first or not second:
        return "maybe" if covered else "no"
    [one], [other] = first, second
    holds = {"above": one.row < other.row, "below": one.row > other.row,
             "left of": one.column < other.column, "right of": one.column > other.column}  # fmt: skip
    return "yes" if holds[match[3]] else "no"


@pytest.mark.parametrize("size", [32, 48, 64])
@pytest.mark.parametrize("part", PARTS)
def test_images_show_the_objects_of_the_scene(part: Any, size: int) -> None:
    for number, scene in zip(range(60), scenes(part, seed=4, tiles=True), strict=False):
        image = render(scene, size, seed=number)
        assert image.shape == (size, size, 3) and image.dtype == np.uint8
        assert look(image) == [tuple(each) for each in scene.objects]
        assert look(render(scene, size)) == [tuple(each) for each in scene.objects]


@pytest.mark.parametrize("task", [name for name in TASKS if name != "premise"])
def test_answers_are_true_of_the_pixels(task: str) -> None:
    for each in examples([task], 150, "calibration", seed=1):
        assert expected(each.prompt, look(each.image)) == each.answer, each.prompt


def test_a_premise_is_the_caption_of_the_image() -> None:
    for each in examples(["premise"], 60, seed=2):
        premise, prompt = each.prompt.split(". ")
        things = look(each.image)
        assert premise == expected("describe the picture.", things) and expected(prompt, things) == each.answer


def test_examples_show_no_more_than_they_may() -> None:
    counts = {len(each.scene.objects) for each in examples(["caption", "list"], 60, most=2)}
    assert counts == {1, 2}


def test_parts_never_meet() -> None:
    shown: dict[str, set[ShapeScene]] = {}
    for part in PARTS:
        for seed in range(3):
            some = itertools.islice(scenes(part, seed, (1, 2)), 400)
            shown.setdefault(part, set()).update(some)
    for one, other in itertools.combinations(PARTS, 2):
        assert not shown[one] & shown[other]
    combinations = {
        part: {(e.colour, e.shape) for scene in found for e in scene.objects} for part, found in shown.items()
    }
    assert not (combinations["calibration"] | combinations["test"]) & NOVEL and combinations["novel"] >= NOVEL


def test_the_same_seed_gives_the_same_examples_and_another_one_others() -> None:
    tasks = list(TASKS)
    first, again, other = (examples(tasks, 40, seed=seed) for seed in (3, 3, 4))
    assert all(np.array_equal(a.image, b.image) and a[3:] == b[3:] for a, b in zip(first, again, strict=True))
    assert [each.scene for each in first] != [each.scene for each in other]
    assert [each.task for each in first[: len(tasks)]] == tasks


def test_no_answer_is_right_most_of_the_time() -> None:
    """What a model that sees nothing can score."""
    for task, most in {"colour": 0.3, "count": 0.45, "position": 0.15, "relation": 0.3, "entailment": 0.4}.items():
        answers = Counter(each.answer for each in examples([task], 600, seed=5))
        assert max(answers.values()) / 600 < most, answers
    tiled = Counter((each.answer, each.scene.hides) for each in examples(["entailment"], 900, seed=6))
    for answer in ("yes", "no"):  # a tile alone does not tell
        assert 0.35 < tiled[answer, True] / (tiled[answer, True] + tiled[answer, False]) < 0.65


def test_lists_have_six_words_for_each_thing() -> None:
    lengths = {len(each.answer.split()) for each in examples(["list"], 100, seed=7)}
    assert lengths == {12, 18, 24}


def test_every_word_has_a_token_and_answers_come_back_as_they_were(tmp_path: Any) -> None:
    tokenizer = word_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    opened = AutoTokenizer.from_pretrained(tmp_path)
    used = set()
    for each in examples(list(TASKS), 800, seed=8):
        prompt, answer = opened(each.prompt)["input_ids"], opened(each.answer, add_special_tokens=False)["input_ids"]
        assert tokenizer.unk_token_id not in [*prompt, *answer] and prompt[0] == tokenizer.bos_token_id
        assert (
            len(answer) == len(each.answer.split()) and opened.decode(answer, skip_special_tokens=True) == each.answer
        )
        used |= set(prompt) | set(answer)
    unused = set(range(len(opened))) - used
    assert opened.convert_ids_to_tokens(sorted(unused)) == [
        token for token in opened.convert_ids_to_tokens(range(len(opened))) if token in opened.all_special_tokens
        and token != "<bos>"
    ]  # fmt: skip
    assert opened.image_token == "<image>" and len(opened) == len(tokenizer) == len(set(WORDS)) + 9


def test_what_there_is_not_is_refused_in_one_line() -> None:
    with pytest.raises(CalibrationError, match="no task 'weight': choose among caption"):
        examples(["colour", "weight"], 2)
    with pytest.raises(CalibrationError, match="no part 'train': choose one of calibration"):
        next(scenes("train"))  # type: ignore[arg-type]
    for size in (16, 33):
        with pytest.raises(CalibrationError, match="give a multiple of 4, 32 or more"):
            render(ShapeScene(()), size)
