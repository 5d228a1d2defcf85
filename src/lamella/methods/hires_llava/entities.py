"""EntityGrid: one or two entities at nine positions of an image that is cut into four slices, with questions on them.

    +-------+-------+     inside      the four corners lie within a slice
    |  o  . | .  o  |     one seam    the middles of the sides are cut once
    |  .    |       |     two seams   the centre is cut twice
    +-------X-------+
    |       |       |     what is in the picture?             "red bar"       identification
    |  o  . | .  o  |     where is the red bar?              "top left"       position
    +-------+-------+     how many things are there?          "two"            counting

Entities vary in rotation and stroke strength, both of which are visible in every one of them, and training never sees
the rotations and strengths of the test split. The paper uses entities of its own; these thirty-six are rendered here,
so that nothing needs to be downloaded.
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
TURNS, STRENGTHS = 24, 4  # rotations and stroke strengths of an entity
ALIKE = {"square": 4, "cross": 4, "bar": 2}  # rotational symmetry of an entity; 1 for the others
FIFTH = 5  # one in this many is in the test split
RADIUS, SHIFT = (0.32, 0.38), 1 / 16  # of a slice
PARTS = ("calibration", "test")
SIDE = 224  # pixels per side of a slice if the model does not define an input size
WORDS = sorted(set("what is in the picture ? where how many things are there at a . , "
                   f"{' '.join((*ENTITIES, *COLOURS, *ROWS, *COLUMNS, *NUMBERS))}".split()))  # fmt: skip


class PlacedEntity(NamedTuple):
    """One rendered entity.

    Attributes:
        entity: its shape, one of :data:`ENTITIES`.
        colour: its colour.
        row: its row, from 0 to 2.
        column: its column, from 0 to 2.
        turn: index of its rotation.
        strength: index of its stroke strength.
    """

    entity: str
    colour: str
    row: int
    column: int
    turn: int
    strength: int

    @property
    def name(self) -> str:
        """Its colour and shape, such as ``red bar``."""
        return f"{self.colour} {self.entity}"

    @property
    def position(self) -> str:
        """Its position in words, such as ``top left``."""
        return f"{ROWS[self.row]} {COLUMNS[self.column]}"

    @property
    def seams(self) -> int:
        """The number of seams that cut it."""
        return (self.row == 1) + (self.column == 1)

    @property
    def part(self) -> str:
        """The split in which it may appear."""
        key = f"{self.name} {self.turn} {self.strength}"
        return PARTS[hashlib.sha256(key.encode()).digest()[0] % FIFTH == 0]


class EntityQuestion(NamedTuple):
    """One question about an image.

    Attributes:
        things: the entities in the image.
        about: the entity that the question is about; for counting, the one that most seams cut.
        task: one of :data:`TASKS`.
        prompt: the question.
        answer: the correct answer.
        image: the image [size, size, 3].
    """

    things: tuple[PlacedEntity, ...]
    about: PlacedEntity
    task: str
    prompt: str
    answer: str
    image: Image

    @property
    def cut(self) -> str:
        """How many seams cut the entity, one of :data:`CUTS`."""
        return CUTS[self.about.seams]


def entity_questions(
    part: str, seed: int = 0, side: int = 32, tasks: Sequence[str] = TASKS
) -> Iterator[EntityQuestion]:
    """Infinite iterator of questions, each about its own image.

    Args:
        part: ``calibration``, which is also the training split, or ``test``.
        seed: random seed of the images.
        side: pixels per side of a slice.
        tasks: some of :data:`TASKS`.

    Returns:
        The questions in order; see :func:`question`.
    """
    return (question(number, part, seed, side, tasks) for number in count())


def question(number: int, part: str, seed: int = 0, side: int = 32, tasks: Sequence[str] = TASKS) -> EntityQuestion:
    """Generate the question with a given index; tasks and positions alternate.

    Args:
        number: index of the question, from 0.
        part: ``calibration``, which is also the training split, or ``test``.
        seed: random seed of the image.
        side: pixels per side of a slice: images have twice as many.
        tasks: some of :data:`TASKS`.

    Returns:
        The question with its image.

    Raises:
        CalibrationError: for an unknown split or task, or slices too small to draw in.
    """
    if part not in PARTS or not set(tasks) <= set(TASKS) or not tasks or side < 16:
        raise CalibrationError(
            f"entities: split {part}, tasks {'+'.join(tasks)}, slices of {side} pixels: the split must be calibration "
            f"or test, the tasks some of {', '.join(TASKS)}, and slices need at least 16 pixels"
        )
    drawn = np.random.default_rng((seed, PARTS.index(part), number))
    first = _thing(drawn, part, number // len(tasks) % 9)
    things: tuple[PlacedEntity, ...] = (first,)
    free = [
        position for position in range(9) if max(abs(position // 3 - first.row), abs(position % 3 - first.column)) > 1
    ]
    if drawn.integers(2) and free:  # an entity in the centre is alone
        things = (first, _thing(drawn, part, int(drawn.choice(free)), apart=first.name))
    return _question(tasks[number % len(tasks)], things, drawn, render(things, side, drawn))


def _thing(drawn: np.random.Generator, part: str, position: int, apart: str = "") -> PlacedEntity:
    while True:
        entity, colour = ENTITIES[drawn.integers(len(ENTITIES))], list(COLOURS)[drawn.integers(len(COLOURS))]
        thing = PlacedEntity(
            entity, colour, *divmod(position, 3), int(drawn.integers(TURNS)), int(drawn.integers(STRENGTHS))
        )
        if thing.part == part and thing.name != apart:
            return thing


def _question(task: str, things: tuple[PlacedEntity, ...], drawn: np.random.Generator, image: Image) -> EntityQuestion:
    first = things[0]
    if task == "identification":
        prompt = "what is in the picture?" if len(things) == 1 else f"what is at the {first.position}?"
        return EntityQuestion(things, first, task, prompt, first.name, image)
    if task == "position":
        return EntityQuestion(things, first, task, f"where is the {first.name}?", first.position, image)
    worst = max(things, key=lambda each: each.seams)
    if drawn.integers(2):
        return EntityQuestion(things, worst, task, "how many things are there?", NUMBERS[len(things)], image)
    wanted = first.entity if drawn.integers(2) else ENTITIES[drawn.integers(len(ENTITIES))]
    found = sum(each.entity == wanted for each in things)
    return EntityQuestion(things, worst, task, f"how many things are a {wanted}?", NUMBERS[found], image)


def middle(thing: PlacedEntity) -> tuple[float, float]:
    """Centre of an entity, in slices from the upper left corner."""
    return 0.5 + thing.row / 2, 0.5 + thing.column / 2


def render(things: Sequence[PlacedEntity], side: int, drawn: np.random.Generator) -> Image:
    """Render entities with small random variations of position, size and brightness.

    Args:
        things: the entities.
        side: pixels per side of a slice.
        drawn: random generator.

    Returns:
        The image [2 * side, 2 * side, 3].
    """
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


def covers(thing: PlacedEntity, dy: Map, dx: Map) -> npt.NDArray[np.bool_]:
    """Compute which pixels an entity covers.

    Args:
        thing: the entity.
        dy: vertical distance from its centre, in radii.
        dx: horizontal distance from its centre, in radii.

    Returns:
        A boolean mask in the shape of ``dy``.
    """
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
    """Questions about entities, with the number of seams that cut each of them.

    Attributes:
        questions: the question of each row.
    """

    metavar = "entities"
    source_help = "entities, or entities:identification+position: rendered entities at nine positions of an image"
    example = Fixture(NAME, settings={"questions": 18})
    default = NAME

    def __init__(self, questions: Sequence[EntityQuestion], processing: Processing, metadata: Any = None) -> None:
        super().__init__([as_row(each) for each in questions], processing, metadata)
        self.questions = list(questions)

    @classmethod
    def open(cls, name: str | Path, context: InputContext, *, questions: int = 540, slice_side: int = 0) -> EntityGrid:  # type: ignore[override]
        """Render a dataset.

        Args:
            name: ``entities``, or with some tasks ``entities:identification+position``.
            context: the processor, split and seed to use.
            questions: number of questions.
            slice_side: pixels per side of a slice; if 0, the input size of the model's image encoder.

        Returns:
            The questions as rows of images with text.

        Raises:
            CalibrationError: for other names, no questions, or slices too small to draw in.
        """
        kind, _, chosen = str(name).partition(":")
        if kind != NAME or questions < 1:
            raise CalibrationError(f"{name}, {questions} questions: give {NAME}, or {NAME}:{'+'.join(TASKS[:2])}")
        side = slice_side or _side(context.processing)
        tasks = tuple(chosen.split("+")) if chosen else TASKS
        made = entity_questions("test" if context.split == "test" else "calibration", context.seed, side, tasks)
        found = [each for each, _ in zip(made, range(questions), strict=False)]
        metadata = {"data": str(name), "split": context.split, "questions": questions, "slice_side": side}
        return cls(found, context.processing, metadata | {"seed": context.seed})

    @classmethod
    def fits(cls, model: Any, given: Any) -> bool:
        """Return whether a command that also takes other rows was given this dataset.

        Args:
            model: the model; unused.
            given: the dataset or its name.
        """
        return isinstance(given, cls) or str(given).partition(":")[0] == NAME


def as_row(each: EntityQuestion) -> ImageTextRow:
    """Convert a question into a row, its image first."""
    turns = ({"role": "user", "content": f"{MARK}\n{each.prompt}"}, {"role": "assistant", "content": each.answer})
    return ImageTextRow((each.image,), turns, task=each.task)


def _side(processing: Processing) -> int:
    """Input size of a model's image encoder in pixels per side; 224, as in CLIP, if it takes any size."""
    if not processing.takes_images:
        raise MethodError("hires-llava requires a model that takes images, but this one takes text only")
    reads = processing.processor.image_processor
    sizes = [
        getattr(size, "height", None) for size in (getattr(reads, "crop_size", None), getattr(reads, "size", None))
    ]
    return next((int(each) for each in sizes if each), SIDE)
