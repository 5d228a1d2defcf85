"""EntityGrid: one or two things at nine places of an image that is cut into four slices, and questions about them.

    +-------+-------+     inside      the four corners lie within a slice
    |  o  . | .  o  |     one seam    the middles of the sides are cut once
    |  .    |       |     two seams   the centre is cut twice
    +-------X-------+
    |       |       |     what is in the picture?             "red bar"       identification
    |  o  . | .  o  |     where is the red bar?              "top left"       position
    +-------+-------+     how many things are there?          "two"            counting

What is drawn differs by turn and by strength of its strokes, both of which can be seen in all of them, and training
never sees the turns and strengths of tests. The paper has entities of its own; these thirty-six are drawn here, so that
nothing need be fetched.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lamella.data import MARK, ImageText, ImageTextRow, InputContext, Processing
from lamella.data.images import Image
from lamella.errors import CalibrationError, MethodError
from lamella.signature import Fixture
from lamella.zoo.worlds import COLOURS

NAME = "entities"
ENTITIES = ("dome", "bar", "square", "triangle", "cross", "crescent")
TASKS = ("identification", "position", "counting")
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
CUTS = ("inside", "one seam", "two seams")
NUMBERS = ("zero", "one", "two")
TURNS, STRENGTHS = 24, 4  # in which an entity is drawn
ALIKE = {"square": 4, "cross": 4, "bar": 2}  # turns within a circle behind which one looks as before; of others, one
FIFTH = 5  # one of so many is for testing
RADIUS, SHIFT = (0.32, 0.38), 1 / 16  # of a slice
PARTS = ("calibration", "test")
SIDE = 224  # pixels of a slice where no model says how many it reads
WORDS = sorted(set("what is in the picture ? where how many things are there at a . , "
                   f"{' '.join((*ENTITIES, *COLOURS, *ROWS, *COLUMNS, *NUMBERS))}".split()))  # fmt: skip


class Thing(NamedTuple):
    """One entity as it is drawn: its row and column from 0 to 2, its turn and its strength by number."""

    entity: str
    colour: str
    row: int
    column: int
    turn: int
    strength: int

    @property
    def name(self) -> str:
        return f"{self.colour} {self.entity}"

    @property
    def place(self) -> str:
        return f"{ROWS[self.row]} {COLUMNS[self.column]}"

    @property
    def seams(self) -> int:
        """How many cut it."""
        return (self.row == 1) + (self.column == 1)

    @property
    def part(self) -> str:
        """Where it may be seen."""
        said = f"{self.name} {self.turn} {self.strength}"
        return PARTS[hashlib.sha256(said.encode()).digest()[0] % FIFTH == 0]


class Asked(NamedTuple):
    """One question about a picture.

    Attributes:
        things: that it shows.
        about: the one that is asked about; of counting, the one that most seams cut.
        task, prompt, answer: what is asked.
        picture: [size, size, 3].
    """

    things: tuple[Thing, ...]
    about: Thing
    task: str
    prompt: str
    answer: str
    picture: Image

    @property
    def cut(self) -> str:
        """How it is cut, one of :data:`CUTS`."""
        return CUTS[self.about.seams]


def asked(part: str, seed: int = 0, side: int = 32, tasks: Sequence[str] = TASKS) -> Iterator[Asked]:
    """Questions without end, each about a picture of its own; see :func:`question`."""
    return (question(number, part, seed, side, tasks) for number in count())


def question(number: int, part: str, seed: int = 0, side: int = 32, tasks: Sequence[str] = TASKS) -> Asked:
    """The question of this number; tasks and places take turns.

    Args:
        number: from 0.
        part: ``calibration``, which is also what is trained on, or ``test``.
        seed: of what is drawn.
        side: of a slice, in pixels: pictures have twice as many.
        tasks: some of :data:`TASKS`.

    Raises:
        CalibrationError: for a part or a task that there is not, or slices too small to draw in.
    """
    if part not in PARTS or not set(tasks) <= set(TASKS) or not tasks or side < 16:
        raise CalibrationError(
            f"entities: part {part}, tasks {'+'.join(tasks)}, slices of {side} pixels: give calibration or test, some "
            f"of {', '.join(TASKS)}, and 16 pixels or more"
        )
    drawn = np.random.default_rng((seed, PARTS.index(part), number))
    first = _thing(drawn, part, number // len(tasks) % 9)
    things: tuple[Thing, ...] = (first,)
    free = [place for place in range(9) if max(abs(place // 3 - first.row), abs(place % 3 - first.column)) > 1]
    if drawn.integers(2) and free:  # what is in the centre is alone
        things = (first, _thing(drawn, part, int(drawn.choice(free)), apart=first.name))
    return _question(tasks[number % len(tasks)], things, drawn, render(things, side, drawn))


def _thing(drawn: np.random.Generator, part: str, place: int, apart: str = "") -> Thing:
    while True:
        entity, colour = ENTITIES[drawn.integers(len(ENTITIES))], list(COLOURS)[drawn.integers(len(COLOURS))]
        thing = Thing(entity, colour, *divmod(place, 3), int(drawn.integers(TURNS)), int(drawn.integers(STRENGTHS)))
        if thing.part == part and thing.name != apart:
            return thing


def _question(task: str, things: tuple[Thing, ...], drawn: np.random.Generator, picture: Image) -> Asked:
    first = things[0]
    if task == "identification":
        prompt = "what is in the picture?" if len(things) == 1 else f"what is at the {first.place}?"
        return Asked(things, first, task, prompt, first.name, picture)
    if task == "position":
        return Asked(things, first, task, f"where is the {first.name}?", first.place, picture)
    worst = max(things, key=lambda each: each.seams)
    if drawn.integers(2):
        return Asked(things, worst, task, "how many things are there?", NUMBERS[len(things)], picture)
    wanted = first.entity if drawn.integers(2) else ENTITIES[drawn.integers(len(ENTITIES))]
    found = sum(each.entity == wanted for each in things)
    return Asked(things, worst, task, f"how many things are a {wanted}?", NUMBERS[found], picture)


def middle(thing: Thing) -> tuple[float, float]:
    """Where a thing stands, in slices from the upper left corner."""
    return 0.5 + thing.row / 2, 0.5 + thing.column / 2


def render(things: Sequence[Thing], side: int, drawn: np.random.Generator) -> Image:
    """The picture of things [2 * side, 2 * side, 3], with small accidents of place, size and brightness."""
    size = 2 * side
    image = np.full((size, size, 3), drawn.uniform(0, 48))
    y, x = (np.mgrid[:size, :size] + 0.5) / side
    for thing in things:
        radius, light = drawn.uniform(*RADIUS), drawn.uniform(0.85, 1.0)
        down, along = np.array(middle(thing)) + drawn.uniform(-SHIFT, SHIFT, 2)
        image[covers(thing, (y - down) / radius, (x - along) / radius)] = light * np.array(COLOURS[thing.colour])
    image += drawn.uniform(-6, 6, image.shape)
    return image.round().clip(0, 255).astype(np.uint8)


Map = npt.NDArray[np.float64]


def covers(thing: Thing, dy: Map, dx: Map) -> npt.NDArray[np.bool_]:
    """Where a thing is, by the distance from its middle in radii."""
    angle = 2 * np.pi * thing.turn / TURNS / ALIKE.get(thing.entity, 1)
    dy, dx = np.cos(angle) * dy - np.sin(angle) * dx, np.sin(angle) * dy + np.cos(angle) * dx
    strength, away = 0.3 + 0.06 * thing.strength, np.hypot(dy, dx)
    if thing.entity == "dome":
        return (away <= 1) & (dy <= strength - 0.3)
    if thing.entity == "bar":
        return (abs(dy) <= strength / 1.5) & (abs(dx) <= 1)
    if thing.entity == "square":
        return np.maximum(abs(dy), abs(dx)) <= 0.55 + strength / 2
    if thing.entity == "cross":
        return (np.minimum(abs(dy), abs(dx)) <= strength / 2) & (np.maximum(abs(dy), abs(dx)) <= 1)
    if thing.entity == "crescent":
        return (away <= 1) & (np.hypot(dy, dx - strength) > 0.8)
    return (dy <= 0.5) & (abs(dx) <= (dy + 1) * (0.35 + strength / 2))  # a triangle


class EntityGrid(ImageText):
    """Questions about entities, with how each is cut.

    Attributes:
        asked: what each row asks.
    """

    metavar = "entities"
    source_help = "entities, or entities:identification+position: things at nine places, drawn here"
    example = Fixture(NAME, settings={"questions": 18})
    default = NAME

    def __init__(self, questions: Sequence[Asked], processing: Processing, said: Any = None) -> None:
        super().__init__([as_row(each) for each in questions], processing, said)
        self.asked = list(questions)

    @classmethod
    def open(cls, name: str | Path, context: InputContext, *, questions: int = 540, slice_side: int = 0) -> EntityGrid:  # type: ignore[override]
        """Draw them.

        Args:
            name: ``entities``, or with some tasks ``entities:identification+position``.
            questions: how many.
            slice_side: pixels of a slice; that of the model when left out.

        Raises:
            CalibrationError: for other names, no questions, or slices too small to draw in.
        """
        kind, _, chosen = str(name).partition(":")
        if kind != NAME or questions < 1:
            raise CalibrationError(f"{name}, {questions} questions: give {NAME}, or {NAME}:{'+'.join(TASKS[:2])}")
        side = slice_side or _side(context.processing)
        tasks = tuple(chosen.split("+")) if chosen else TASKS
        made = asked("test" if context.split == "test" else "calibration", context.seed, side, tasks)
        found = [each for each, _ in zip(made, range(questions), strict=False)]
        said = {"data": str(name), "split": context.split, "questions": questions, "slice_side": side}
        return cls(found, context.processing, said | {"seed": context.seed})

    @classmethod
    def fits(cls, model: Any, given: Any) -> bool:
        """Whether a command that takes other rows too is given these."""
        return isinstance(given, cls) or str(given).partition(":")[0] == NAME


def as_row(each: Asked) -> ImageTextRow:
    """A question as a row, its image first."""
    said = ({"role": "user", "content": f"{MARK}\n{each.prompt}"}, {"role": "assistant", "content": each.answer})
    return ImageTextRow((each.picture,), said, task=each.task)


def _side(processing: Processing) -> int:
    """Pixels of what a model's tower reads, on a side; CLIP's 224 where it reads any number."""
    if not processing.takes_images:
        raise MethodError("hires-llava works on models that read images, and this one reads text alone")
    reads = processing.processor.image_processor
    sizes = [
        getattr(size, "height", None) for size in (getattr(reads, "crop_size", None), getattr(reads, "size", None))
    ]
    return next((int(each) for each in sizes if each), SIDE)
