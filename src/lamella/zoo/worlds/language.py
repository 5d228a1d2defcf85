"""Text about a scene: captions, lists, questions with their answers, and sentences that it entails or not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from lamella.errors import CalibrationError
from lamella.zoo.worlds.shapes import (
    COLOURS,
    GREY,
    MOST,
    SHAPES,
    SIZE,
    TILE,
    Image,
    Part,
    SceneObject,
    ShapeScene,
    render,
    scenes,
)

NUMBERS = ("zero", "one", "two", "three", "four")
PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
ANSWERS = ("yes", "no", "maybe")
DESCRIBE, LIST = "describe the picture.", "list the shapes."
ATTEMPTS = 50  # at a question about a scene


class ShapeExample(NamedTuple):
    """One example of a task.

    Attributes:
        task: a key of :data:`TASKS`.
        scene: the content of the image.
        size: image size in pixels.
        seed: of the rendering.
        prompt, answer: as text; the position of the image depends on the model.
    """

    task: str
    scene: ShapeScene
    size: int
    seed: tuple[int, ...]
    prompt: str
    answer: str

    @property
    def image(self) -> Image:
        """The image [size, size, 3], rendered at each access."""
        return render(self.scene, self.size, seed=self.seed)


PromptAndAnswer = tuple[str, str] | None  # a prompt with its answer; None if there is nothing to ask
TaskFunction = Callable[[ShapeScene, np.random.Generator], PromptAndAnswer]


def name(item: SceneObject) -> str:
    """Return the colour and shape of an object."""
    return f"{item.colour} {item.shape}"


def place(row: int, column: int) -> str:
    """Return the name of a cell of the grid in words.

    Args:
        row: row of the grid, from 0.
        column: column of the grid, from 0.

    >>> place(1, 2)
    'row two column three'
    """
    return f"row {NUMBERS[row + 1]} column {NUMBERS[column + 1]}"


def caption(scene: ShapeScene) -> str:
    """Return a caption that names the objects in reading order.

    >>> caption(ShapeScene((SceneObject("circle", "red", 0, 1), SceneObject("cross", "blue", 2, 2))))
    'a red circle and a blue cross'
    """
    return " and ".join(f"a {name(each)}" for each in scene.objects)


def listed(scene: ShapeScene) -> str:
    """Return the shape, colour and cell of every object, six words each.

    >>> listed(ShapeScene((SceneObject("circle", "red", 0, 1),)))
    'circle red row one column two'
    """
    return " ".join(f"{each.shape} {each.colour} {place(each.row, each.column)}" for each in scene.objects)


def direction(item: SceneObject, other: SceneObject) -> str:
    """Return the direction of an object relative to another one; empty if both are in the same cell.

    Args:
        item: the object.
        other: the object that it is compared with.

    >>> direction(SceneObject("circle", "red", 0, 1), SceneObject("cross", "blue", 2, 2))
    'above left'
    """
    vertical = ("above", "", "below")[int(np.sign(item.row - other.row)) + 1]
    across = ("left", "", "right")[int(np.sign(item.column - other.column)) + 1]
    return f"{vertical} {across}".strip()


def _described(scene: ShapeScene, rng: np.random.Generator) -> PromptAndAnswer:
    return DESCRIBE, caption(scene)


def _listed(scene: ShapeScene, rng: np.random.Generator) -> PromptAndAnswer:
    return LIST, listed(scene)


def _colour(scene: ShapeScene, rng: np.random.Generator) -> PromptAndAnswer:
    shapes = Counter(each.shape for each in scene.shapes)
    asked = _one([each for each in scene.shapes if shapes[each.shape] == 1], rng)
    return asked and (f"what colour is the {asked.shape}?", asked.colour)


def _count(scene: ShapeScene, rng: np.random.Generator) -> PromptAndAnswer:
    """Ask for the number of a shape, of a colour, or of all; half of the time, of one in the scene."""
    seen = _one(list(scene.shapes), rng) if rng.integers(2) else None
    shape = seen.shape if seen else SHAPES[rng.integers(len(SHAPES))]
    colour = seen.colour if seen else list(COLOURS)[rng.integers(len(COLOURS))]
    what, number = (
        (PLURALS[shape], sum(each.shape == shape for each in scene.shapes)),
        (f"{colour} shapes", sum(each.colour == colour for each in scene.shapes)),
        ("shapes", len(scene.shapes)),
    )[rng.integers(3)]
    return f"how many {what} are there?", NUMBERS[number]


def _position(scene: ShapeScene, rng: np.random.Generator) -> PromptAndAnswer:
    asked = _one(_unique(scene), rng)
    return asked and (f"where is the {name(asked)}?", place(asked.row, asked.column))


def _relation(scene: ShapeScene, rng: np.random.Generator) -> PromptAndAnswer:
    single = _unique(scene)
    if len(single) < 2:
        return None
    one, other = (single[number] for number in rng.choice(len(single), 2, replace=False))
    return f"where is the {name(one)} from the {name(other)}?", direction(one, other)


def _entailment(scene: ShapeScene, rng: np.random.Generator) -> PromptAndAnswer:
    """Return a sentence of any kind; its answer is drawn first, so that the answers are balanced."""
    target = (*ANSWERS, "maybe")[rng.integers(4)]  # "maybe" twice, since only half of the scenes allow it
    for _ in range(ATTEMPTS):
        sentence, truth = (_exists, _is_coloured, _relates)[rng.integers(3)](scene, rng)
        if truth == target:
            return f"is it true that {sentence}?", truth
    return None


def _with_premise(scene: ShapeScene, rng: np.random.Generator) -> PromptAndAnswer:
    question = _entailment(scene, rng)
    return question and (f"{caption(scene)}. {question[0]}", question[1])


def _exists(scene: ShapeScene, rng: np.random.Generator) -> tuple[str, str]:
    shape, colour = SHAPES[rng.integers(len(SHAPES))], list(COLOURS)[rng.integers(len(COLOURS))]
    if scene.shapes and rng.integers(2):
        shape, colour, *_ = scene.shapes[rng.integers(len(scene.shapes))]
    is_seen = any((each.shape, each.colour) == (shape, colour) for each in scene.shapes)
    return f"there is a {colour} {shape}", _answer(is_seen, scene.hides)


def _is_coloured(scene: ShapeScene, rng: np.random.Generator) -> tuple[str, str]:
    item = scene.objects[rng.integers(len(scene.objects))]
    colour = list(COLOURS)[rng.integers(len(COLOURS))]
    if item.shape != TILE and rng.integers(2):
        colour = item.colour
    truth = _answer(item.colour == colour, item.shape == TILE)
    return f"the shape in {place(item.row, item.column)} is {colour}", truth


def _relates(scene: ShapeScene, rng: np.random.Generator) -> tuple[str, str]:
    """State that one object is on one side of another one, which may be missing or hidden by a tile."""
    shapes, colours = rng.choice(SHAPES, 2), rng.choice(list(COLOURS), 2)
    pair = [(str(shape), str(colour)) for shape, colour in zip(shapes, colours, strict=True)]
    single = _unique(scene)
    for number in range(min(2, len(single))):
        if rng.integers(4):
            chosen = single[(number + rng.integers(len(single))) % len(single)]
            pair[number] = (chosen.shape, chosen.colour)
    side = ("above", "below", "left of", "right of")[rng.integers(4)]
    found = [[each for each in scene.shapes if (each.shape, each.colour) == named] for named in pair]
    sentence = f"the {pair[0][1]} {pair[0][0]} is {side} the {pair[1][1]} {pair[1][0]}"
    if pair[0] == pair[1] or max(map(len, found)) > 1:
        return sentence, ""  # ambiguous
    if not all(found):
        return sentence, _answer(False, scene.hides)
    return sentence, _answer(side.split()[0] in direction(found[0][0], found[1][0]).split(), False)


def _answer(is_so: bool, is_open: bool) -> str:
    return "yes" if is_so else "maybe" if is_open else "no"


def _unique(scene: ShapeScene) -> list[SceneObject]:
    """Return the objects that are uniquely identified by their shape and colour."""
    names = Counter(map(name, scene.shapes))
    return [each for each in scene.shapes if names[name(each)] == 1]


def _one(objects: Sequence[SceneObject], rng: np.random.Generator) -> SceneObject | None:
    return objects[int(rng.integers(len(objects)))] if objects else None


TASKS: dict[str, TaskFunction] = {
    "caption": _described,
    "list": _listed,
    "colour": _colour,
    "count": _count,
    "position": _position,
    "relation": _relation,
    "entailment": _entailment,
    "premise": _with_premise,  # entailment with a caption as premise
}
QUESTIONS = ("colour", "count", "position", "relation")
TILED = ("entailment", "premise")  # with tiles, without which no answer is "maybe"
MIN_OBJECTS = {"relation": 2, "list": 2, "entailment": 2, "premise": 2}  # in a scene


def examples(
    tasks: Sequence[str], count: int, part: Part = "calibration", seed: int = 0, size: int = SIZE, most: int = MOST
) -> list[ShapeExample]:
    """Return examples that cycle through some tasks, each with its own image.

    Args:
        tasks: keys of :data:`TASKS`.
        count: total number.
        part: see :func:`scenes`.
        size: see :func:`render`.
        seed: of all random draws.
        most: maximum number of objects in a scene.

    Raises:
        CalibrationError: for an unknown task or part.
    """
    unknown = [each for each in tasks if each not in TASKS]
    if unknown or not tasks:
        raise CalibrationError(f"the shapes have no task '{''.join(unknown[:1])}': choose among {', '.join(TASKS)}")
    each = [_task_examples(task, part, (seed, number), size, most) for number, task in enumerate(tasks)]
    return [next(each[number % len(tasks)]) for number in range(count)]


def _task_examples(task: str, part: Part, seed: tuple[int, int], size: int, most: int) -> Iterator[ShapeExample]:
    rng = np.random.default_rng(seed)
    objects = (MIN_OBJECTS.get(task, 1), most)
    for number, scene in enumerate(scenes(part, seed, objects, tiles=task in TILED)):
        question = TASKS[task](scene, rng)
        if question is not None:
            yield ShapeExample(task, scene, size, (*seed, number), *question)


FURTHER = """
above below left right of from row column in shape shapes what colour how many are there where is the a and it true that
describe list picture . ?
"""
WORDS = sorted({*SHAPES, *PLURALS.values(), *COLOURS, TILE, GREY, *NUMBERS, *ANSWERS, *FURTHER.split()})
