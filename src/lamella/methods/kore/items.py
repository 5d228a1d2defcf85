"""Items of knowledge: an image of something new, and a text that describes it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from lamella.data import MARK, InputContext
from lamella.data.images import Image, inside, read_image
from lamella.data.rows import Rows
from lamella.errors import CalibrationError
from lamella.extras import require
from lamella.methods.kore.glyphs import Glyph, description_of, glyphs, known_questions, render_glyph
from lamella.reading import read_rows
from lamella.signature import Fixture
from lamella.zoo.worlds import SIZE

GLYPHS = "glyphs"
FORMAT_HINT = (
    'write {"image": "images/one.png", "subject": "...", "text": "..."}, with "kind", "images" and "facts" if available'
)
SMALLEST = 0.6  # minimum scale of a repositioned image


@dataclass(frozen=True)
class Item:
    """One item.

    Attributes:
        id: unique among all items.
        subject: the name of what is new.
        text: the knowledge about it; it contains the subject.
        kind: its category, such as ``bird``; empty if unknown.
        facts: questions with their answers, if available.
        images: image files of it, the first one the item's own; or a glyph, which is rendered.
        pixels: side of a rendered glyph in pixels.
    """

    id: str
    subject: str
    text: str
    images: tuple[Path, ...] | Glyph
    kind: str = ""
    facts: tuple[tuple[str, str], ...] = ()
    pixels: int = SIZE

    def image_at(self, number: int, seed: int) -> Image:
        """Return an image of the item: 0 is its own, higher indices are others, deterministic for a seed.

        Without further images, an existing one is shown at another position and scale on another background.

        Args:
            number: index of the image.
            seed: random seed.
        """
        if isinstance(self.images, Glyph):
            return render_glyph(self.images, self.pixels, (seed, number))
        image = read_image(self.images[number % len(self.images)], self.id)
        return image if number < len(self.images) else repositioned(image, (seed, number))

    def content(self) -> bytes:
        """All data of the item, for hashing."""
        key = repr((self.id, self.subject, self.text, self.kind, self.facts))
        if isinstance(self.images, Glyph):
            return f"{key} {self.images} {self.pixels}".encode()
        return key.encode() + b"".join(read_image(each, self.id).tobytes() for each in self.images)


def repositioned(image: Image, seed: tuple[int, ...]) -> Image:
    """Place an image, scaled down, at a random position on a plain background of its own size [height, width, 3].

    Args:
        image: the image.
        seed: random seed.
    """
    pillow = require("PIL.Image", "vision", "placing images")
    drawn = np.random.default_rng(seed)
    height, width = image.shape[:2]
    scale = drawn.uniform(SMALLEST, 1)
    small = max(1, round(scale * height)), max(1, round(scale * width))
    top, left = (int(drawn.integers(0, whole - part + 1)) for whole, part in zip((height, width), small, strict=True))
    found = np.empty_like(image)
    found[:] = drawn.integers(0, 256, 3)
    found[top : top + small[0], left : left + small[1]] = np.array(pillow.fromarray(image).resize(small[::-1]))
    return found


class Knowledge(Rows[Item]):
    """Items of knowledge.

    Attributes:
        items: in the order of their file.
    """

    metavar = "FILE"
    source_help = (
        'a .jsonl file: {"image": "images/one.png", "subject": "...", "text": "..."} on each line, with the "kind" '
        'of the subject, further "images" of it and "facts" if available; paths are relative to the file. Or '
        "the built-in glyphs, which are invented things"
    )
    example = Fixture(GLYPHS, settings={"items": 3})

    @classmethod
    def open(
        cls, name: str | Path, context: InputContext, *, items: int | None = None, pixels: int = SIZE
    ) -> Knowledge:
        """Read items of knowledge, including all their images.

        Args:
            name: a file, or ``glyphs``.
            context: seed to use.
            items: maximum number of items; defaults to 40 for glyphs, else to all.
            pixels: side of rendered glyphs in pixels.

        Returns:
            The items.

        Raises:
            CalibrationError: for a missing file, or a malformed row, with its line.
        """
        if items is not None and items < 1:
            raise CalibrationError(f"items {items}: give at least 1")
        made = list(_glyphs(items or 40, context.seed, pixels)) if name == GLYPHS else _of_file(Path(name), items)
        if not made:
            raise CalibrationError(f"{name} holds no items: {FORMAT_HINT}")
        _check_own(made, str(name))
        return cls(made, metadata={"data": str(name), "items": len(made), "sha256": _digest(made)})


def _glyphs(count: int, seed: int, pixels: int) -> Iterator[Item]:
    for number, each in enumerate(glyphs(count, seed)):
        yield Item(
            f"glyphs:{number}", each.name, description_of(each), each, each.kind, tuple(known_questions(each)), pixels
        )


def _of_file(file: Path, count: int | None) -> list[Item]:
    file = file.expanduser()
    rows = islice(read_rows(file, FORMAT_HINT, f"give {GLYPHS}, or a .jsonl file of items"), count)
    return [_item(row, f"{file} line {number}", f"{file.name}:{number}", file.parent) for number, row in rows]


def _item(row: Any, where: str, default: str, folder: Path) -> Item:
    if not isinstance(row, Mapping):
        raise CalibrationError(f"{where} is not a JSON object: {FORMAT_HINT}")
    further = row.get("images") or []
    named = [row.get("image"), *(further if isinstance(further, list) else [further])]
    images = [each for each in named if each is not None]
    texts = [row.get(name) for name in ("subject", "text")]
    if not images or not all(isinstance(each, str) and each.strip() for each in (*images, *texts)):
        raise CalibrationError(f"{where}: image, subject or text is missing: {FORMAT_HINT}")
    subject, text = (str(each).strip() for each in texts)
    if subject.casefold() not in text.casefold():
        raise CalibrationError(f"{where}: the text does not contain the subject '{subject}': mention it in the text")
    try:
        facts = tuple((str(each["question"]), str(each["answer"])) for each in row.get("facts") or ())
    except (KeyError, TypeError):
        raise CalibrationError(f'{where}: facts must be objects with "question" and "answer"') from None
    kind = str(row.get("kind") or "")
    if MARK in " ".join([subject, text, kind, *(part for fact in facts for part in fact)]):
        raise CalibrationError(f"{where}: the text contains {MARK}, the placeholder of an image: remove it")
    files = tuple(inside(folder, each, where) for each in images)
    return Item(str(row.get("id") or default), subject, text, files, kind, facts)


def _check_own(items: Iterable[Item], name: str) -> None:
    seen: set[str] = set()
    for each in items:
        if each.id in seen:
            raise CalibrationError(f"{name} has two items with the id '{each.id}': ids must be unique or absent")
        seen.add(each.id)


def _digest(items: Iterable[Item]) -> str:
    found = hashlib.sha256()
    for each in items:
        found.update(hashlib.sha256(each.content()).digest())
    return found.hexdigest()
