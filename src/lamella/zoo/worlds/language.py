"""What can be said of a scene: captions, lists, questions with their answers, and sentences that it entails or not."""

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
    Scene,
    Thing,
    render,
    scenes,
)

NUMBERS = ("zero", "one", "two", "three", "four")
PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
ANSWERS = ("yes", "no", "maybe")
DESCRIBE, LIST = "describe the picture.", "list the shapes."
TRIES = 50  # of a question to a scene


class Example(NamedTuple):
    """One example of a task.

    Attributes:
        task: a key of :data:`TASKS`.
        scene: what the picture shows.
        size: pixels on a side of the picture.
        seed: of its looks.
        prompt, answer: as text; where the image stands beside it is the model's matter.
    """

    task: str
    scene: Scene
    size: int
    seed: tuple[int, ...]
    prompt: str
    answer: str

    @property
    def image(self) -> Image:
        """The picture [size, size, 3], rendered at each access."""
        return render(self.scene, self.size, seed=self.seed)


Said = tuple[str, str] | None  # a prompt with its answer; None where there is nothing to ask
Teller = Callable[[Scene, np.random.Generator], Said]


def name(thing: Thing) -> str:
    return f"{thing.colour} {thing.shape}"


def place(row: int, column: int) -> str:
    """
    >>> place(1, 2)
    'row two column three'
    """
    return f"row {NUMBERS[row + 1]} column {NUMBERS[column + 1]}"


def caption(scene: Scene) -> str:
    """
    >>> caption(Scene((Thing("circle", "red", 0, 1), Thing("cross", "blue", 2, 2))))
    'a red circle and a blue cross'
    """
    return " and ".join(f"a {name(each)}" for each in scene.things)


def listed(scene: Scene) -> str:
    """Shape, colour and cell of everything, six words each.

    >>> listed(Scene((Thing("circle", "red", 0, 1),)))
    'circle red row one column two'
    """
    return " ".join(f"{each.shape} {each.colour} {place(each.row, each.column)}" for each in scene.things)


def direction(thing: Thing, other: Thing) -> str:
    """Where a thing is, seen from another one.

    >>> direction(Thing("circle", "red", 0, 1), Thing("cross", "blue", 2, 2))
    'above left'
    """
    vertical = ("above", "", "below")[int(np.sign(thing.row - other.row)) + 1]
    across = ("left", "", "right")[int(np.sign(thing.column - other.column)) + 1]
    return f"{vertical} {across}".strip()


def _described(scene: Scene, drawn: np.random.Generator) -> Said:
    return DESCRIBE, caption(scene)


def _listed(scene: Scene, drawn: np.random.Generator) -> Said:
    return LIST, listed(scene)


def _colour(scene: Scene, drawn: np.random.Generator) -> Said:
    shapes = Counter(each.shape for each in scene.shapes)
    asked = _one([each for each in scene.shapes if shapes[each.shape] == 1], drawn)
    return asked and (f"what colour is the {asked.shape}?", asked.colour)


def _count(scene: Scene, drawn: np.random.Generator) -> Said:
    """Of a shape, of a colour, or of all; as often of what is there as of anything."""
    seen = _one(list(scene.shapes), drawn) if drawn.integers(2) else None
    shape = seen.shape if seen else SHAPES[drawn.integers(len(SHAPES))]
    colour = seen.colour if seen else list(COLOURS)[drawn.integers(len(COLOURS))]
    what, number = (
        (PLURALS[shape], sum(each.shape == shape for each in scene.shapes)),
        (f"{colour} shapes", sum(each.colour == colour for each in scene.shapes)),
        ("shapes", len(scene.shapes)),
    )[drawn.integers(3)]
    return f"how many {what} are there?", NUMBERS[number]


def _position(scene: Scene, drawn: np.random.Generator) -> Said:
    asked = _one(_single(scene), drawn)
    return asked and (f"where is the {name(asked)}?", place(asked.row, asked.column))


def _relation(scene: Scene, drawn: np.random.Generator) -> Said:
    single = _single(scene)
    if len(single) < 2:
        return None
    one, other = (single[number] for number in drawn.choice(len(single), 2, replace=False))
    return f"where is the {name(one)} from the {name(other)}?", direction(one, other)


def _entailment(scene: Scene, drawn: np.random.Generator) -> Said:
    """A sentence of any kind, whose answer is drawn first, so that all answers are as frequent."""
    wanted = (*ANSWERS, "maybe")[drawn.integers(4)]  # twice, since only every other scene leaves anything open
    for _ in range(TRIES):
        sentence, truth = (_exists, _is_coloured, _relates)[drawn.integers(3)](scene, drawn)
        if truth == wanted:
            return f"is it true that {sentence}?", truth
    return None


def _with_premise(scene: Scene, drawn: np.random.Generator) -> Said:
    said = _entailment(scene, drawn)
    return said and (f"{caption(scene)}. {said[0]}", said[1])


def _exists(scene: Scene, drawn: np.random.Generator) -> tuple[str, str]:
    shape, colour = SHAPES[drawn.integers(len(SHAPES))], list(COLOURS)[drawn.integers(len(COLOURS))]
    if scene.shapes and drawn.integers(2):
        shape, colour, *_ = scene.shapes[drawn.integers(len(scene.shapes))]
    is_seen = any((each.shape, each.colour) == (shape, colour) for each in scene.shapes)
    return f"there is a {colour} {shape}", _answer(is_seen, scene.hides)


def _is_coloured(scene: Scene, drawn: np.random.Generator) -> tuple[str, str]:
    thing = scene.things[drawn.integers(len(scene.things))]
    colour = list(COLOURS)[drawn.integers(len(COLOURS))]
    if thing.shape != TILE and drawn.integers(2):
        colour = thing.colour
    truth = _answer(thing.colour == colour, thing.shape == TILE)
    return f"the shape in {place(thing.row, thing.column)} is {colour}", truth


def _relates(scene: Scene, drawn: np.random.Generator) -> tuple[str, str]:
    """One thing lies on one side of another one, which may not be there, or behind a tile."""
    shapes, colours = drawn.choice(SHAPES, 2), drawn.choice(list(COLOURS), 2)
    pair = [(str(shape), str(colour)) for shape, colour in zip(shapes, colours, strict=True)]
    single = _single(scene)
    for number in range(min(2, len(single))):
        if drawn.integers(4):
            chosen = single[(number + drawn.integers(len(single))) % len(single)]
            pair[number] = (chosen.shape, chosen.colour)
    side = ("above", "below", "left of", "right of")[drawn.integers(4)]
    found = [[each for each in scene.shapes if (each.shape, each.colour) == named] for named in pair]
    sentence = f"the {pair[0][1]} {pair[0][0]} is {side} the {pair[1][1]} {pair[1][0]}"
    if pair[0] == pair[1] or max(map(len, found)) > 1:
        return sentence, ""  # of which is it said?
    if not all(found):
        return sentence, _answer(False, scene.hides)
    return sentence, _answer(side.split()[0] in direction(found[0][0], found[1][0]).split(), False)


def _answer(is_so: bool, is_open: bool) -> str:
    return "yes" if is_so else "maybe" if is_open else "no"


def _single(scene: Scene) -> list[Thing]:
    """The things that their shape and colour name."""
    names = Counter(map(name, scene.shapes))
    return [each for each in scene.shapes if names[name(each)] == 1]


def _one(things: Sequence[Thing], drawn: np.random.Generator) -> Thing | None:
    return things[int(drawn.integers(len(things)))] if things else None


TASKS: dict[str, Teller] = {
    "caption": _described,
    "list": _listed,
    "colour": _colour,
    "count": _count,
    "position": _position,
    "relation": _relation,
    "entailment": _entailment,
    "premise": _with_premise,  # entailment, with a caption before the sentence
}
QUESTIONS = ("colour", "count", "position", "relation")
TILED = ("entailment", "premise")  # with tiles, since without them nothing is open
FEWEST = {"relation": 2, "list": 2, "entailment": 2, "premise": 2}  # things in their scenes


def examples(
    tasks: Sequence[str], count: int, part: Part = "calibration", seed: int = 0, size: int = SIZE, most: int = MOST
) -> list[Example]:
    """Examples of some tasks in turn, each with a picture of its own.

    Args:
        tasks: keys of :data:`TASKS`.
        count: of all together.
        part, size: see :func:`scenes` and :func:`render`.
        seed: of all that is drawn.
        most: things in a scene.

    Raises:
        CalibrationError: for a task or a part that there is not.
    """
    unknown = [each for each in tasks if each not in TASKS]
    if unknown or not tasks:
        raise CalibrationError(f"the shapes have no task '{''.join(unknown[:1])}': choose among {', '.join(TASKS)}")
    each = [_told(task, part, (seed, number), size, most) for number, task in enumerate(tasks)]
    return [next(each[number % len(tasks)]) for number in range(count)]


def _told(task: str, part: Part, seed: tuple[int, int], size: int, most: int) -> Iterator[Example]:
    drawn = np.random.default_rng(seed)
    things = (FEWEST.get(task, 1), most)
    for number, scene in enumerate(scenes(part, seed, things, tiles=task in TILED)):
        said = TASKS[task](scene, drawn)
        if said is not None:
            yield Example(task, scene, size, (*seed, number), *said)


FURTHER = """
above below left right of from row column in shape shapes what colour how many are there where is the a and it true that
describe list picture . ?
"""
WORDS = sorted({*SHAPES, *PLURALS.values(), *COLOURS, TILE, GREY, *NUMBERS, *ANSWERS, *FURTHER.split()})
