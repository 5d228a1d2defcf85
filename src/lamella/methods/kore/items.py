"""Items of knowledge: an image of something new, and a text that says what is to be known of it."""

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
from lamella.methods.kore.glyphs import Glyph, glyphs, known, render_glyph, told
from lamella.reading import read_rows
from lamella.signature import Fixture
from lamella.zoo.worlds import SIZE

GLYPHS = "glyphs"
HINT = (
    'write {"image": "pictures/one.png", "subject": "...", "text": "..."}, and "kind", "images" and "facts" where you '
    "have them"
)
SMALLEST = 0.6  # of a picture's sides, when it is placed anew


@dataclass(frozen=True)
class Item:
    """One item.

    Attributes:
        id: its own among all items.
        subject: the name of what is new.
        text: what is to be known of it; the subject stands in it.
        kind: what it is one of, such as ``bird``; empty where that is not known.
        facts: questions with their answers, where somebody has written some.
        images: files that show it, the first one the item's own; or a glyph, which is rendered.
        pixels: on a side, of a glyph.
    """

    id: str
    subject: str
    text: str
    images: tuple[Path, ...] | Glyph
    kind: str = ""
    facts: tuple[tuple[str, str], ...] = ()
    pixels: int = SIZE

    def picture(self, number: int, seed: int) -> Image:
        """A picture of it: 0 is its own, and those behind are others, by the same seed the same.

        Where there are no further images, one that there is stands elsewhere, in another size on another ground.
        """
        if isinstance(self.images, Glyph):
            return render_glyph(self.images, self.pixels, (seed, number))
        image = read_image(self.images[number % len(self.images)], self.id)
        return image if number < len(self.images) else placed(image, (seed, number))

    def content(self) -> bytes:
        """All that decides what is made of it, to be hashed."""
        said = repr((self.id, self.subject, self.text, self.kind, self.facts))
        if isinstance(self.images, Glyph):
            return f"{said} {self.images} {self.pixels}".encode()
        return said.encode() + b"".join(read_image(each, self.id).tobytes() for each in self.images)


def placed(image: Image, seed: tuple[int, ...]) -> Image:
    """The same picture, smaller and somewhere on a plain ground, in its own size [height, width, 3]."""
    pillow = require("PIL.Image", "vision", "placing pictures")
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
        'a .jsonl file: {"image": "pictures/one.png", "subject": "...", "text": "..."} on each line, with the "kind" '
        'of the subject, further "images" of it and "facts" where there are some; paths are relative to the file. Or '
        "glyphs, invented things, built in"
    )
    example = Fixture(GLYPHS, settings={"items": 3})

    @classmethod
    def open(
        cls, name: str | Path, context: InputContext, *, items: int | None = None, pixels: int = SIZE
    ) -> Knowledge:
        """Read items of knowledge, all their pictures among them.

        Args:
            name: a file, or ``glyphs``.
            items: at most so many of them; of glyphs 40 when left out, else all.
            pixels: on a side of rendered glyphs.

        Raises:
            CalibrationError: for a file that is missing, or a row that is malformed, with its line.
        """
        if items is not None and items < 1:
            raise CalibrationError(f"items {items}: give at least 1")
        made = list(_glyphs(items or 40, context.seed, pixels)) if name == GLYPHS else _of_file(Path(name), items)
        if not made:
            raise CalibrationError(f"{name} holds no items: {HINT}")
        _check_own(made, str(name))
        return cls(made, metadata={"data": str(name), "items": len(made), "sha256": _digest(made)})


def _glyphs(count: int, seed: int, pixels: int) -> Iterator[Item]:
    for number, each in enumerate(glyphs(count, seed)):
        yield Item(f"glyphs:{number}", each.name, told(each), each, each.kind, tuple(known(each)), pixels)


def _of_file(file: Path, count: int | None) -> list[Item]:
    file = file.expanduser()
    rows = islice(read_rows(file, HINT, f"give {GLYPHS}, or a .jsonl file of items"), count)
    return [_item(row, f"{file} line {number}", f"{file.name}:{number}", file.parent) for number, row in rows]


def _item(row: Any, where: str, default: str, folder: Path) -> Item:
    if not isinstance(row, Mapping):
        raise CalibrationError(f"{where} is no JSON object: {HINT}")
    further = row.get("images") or []
    named = [row.get("image"), *(further if isinstance(further, list) else [further])]
    images = [each for each in named if each is not None]
    texts = [row.get(name) for name in ("subject", "text")]
    if not images or not all(isinstance(each, str) and each.strip() for each in (*images, *texts)):
        raise CalibrationError(f"{where} has no image, subject and text: {HINT}")
    subject, text = (str(each).strip() for each in texts)
    if subject.casefold() not in text.casefold():
        raise CalibrationError(f"{where}: its text does not name '{subject}': let the text say of whom it is")
    try:
        facts = tuple((str(each["question"]), str(each["answer"])) for each in row.get("facts") or ())
    except (KeyError, TypeError):
        raise CalibrationError(f'{where}: facts are objects with "question" and "answer": write them so') from None
    kind = str(row.get("kind") or "")
    if MARK in " ".join([subject, text, kind, *(part for fact in facts for part in fact)]):
        raise CalibrationError(f"{where} has {MARK} in its text, which stands for a picture: write it without")
    files = tuple(inside(folder, each, where) for each in images)
    return Item(str(row.get("id") or default), subject, text, files, kind, facts)


def _check_own(items: Iterable[Item], name: str) -> None:
    seen: set[str] = set()
    for each in items:
        if each.id in seen:
            raise CalibrationError(f"{name} has two items with the id '{each.id}': give each its own, or none")
        seen.add(each.id)


def _digest(items: Iterable[Item]) -> str:
    found = hashlib.sha256()
    for each in items:
        found.update(hashlib.sha256(each.content()).digest())
    return found.hexdigest()
