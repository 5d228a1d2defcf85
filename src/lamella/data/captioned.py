"""The input: pictures, with what can be said of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from lamella.data.pictures import Picture, inside, read_picture
from lamella.data.reader import Reader
from lamella.data.sources import Split
from lamella.errors import CalibrationError
from lamella.extras import require
from lamella.reading import check_in_folder, files_below, read_rows
from lamella.signature import Fixture
from lamella.zoo.worlds import caption, render, scenes

DIGITS, SHAPES = "digits", "shapes"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
METADATA = "metadata.jsonl"  # {"file_name": "one.png", "text": "..."} on each line, as datasets' image folders have it
FIFTH = 5  # one picture in so many is for testing


class Captioned(NamedTuple):
    """A picture [height, width, 3], what it shows in words, and its class where it has one."""

    picture: Picture
    text: str = ""
    label: int | None = None


@dataclass(frozen=True)
class Pictures:
    """Pictures with captions, or with classes, or alone.

    Attributes:
        items: the pictures.
        said: what provenance says of them.
        source: what they were opened from, for :meth:`part`.
    """

    metavar = "IMAGES"
    told = (
        'a folder of pictures, whose captions may be in metadata.jsonl ({"file_name": "one.png", "text": "..."}); or '
        "digits, or shapes, which are built in"
    )
    example = Fixture(DIGITS, settings={"count": 48})

    items: tuple[Captioned, ...]
    said: dict[str, Any]
    source: tuple[str, Reader, int]

    @classmethod
    def open(cls, name: str | Path, reader: Reader, *, count: int = 1024) -> Self:
        """Read pictures.

        Args:
            name: a folder of them, ``digits`` or ``shapes``. One picture in five of a source is for testing.
            count: at most so many pictures.

        Raises:
            CalibrationError: for a folder that is missing, holds no picture, or one that cannot be read.
        """
        return cls.first(count, _source(str(name), reader), name, reader)

    @classmethod
    def first(cls, count: int, every: Iterable[Captioned], name: str | Path, reader: Reader, **more: Any) -> Self:
        """The first of some pictures, of which more is known."""
        if count < 1:
            raise CalibrationError(f"count={count}: give at least 1")
        items = tuple(islice(every, count))
        if not items:
            raise CalibrationError(f"{name} holds no pictures for the split {reader.split}: give more of them")
        digest = hashlib.sha256()
        for each in items:
            digest.update(each.picture.tobytes() + each.text.encode())
        said = {"data": str(name), "split": reader.split, "pictures": len(items), **more, "sha256": digest.hexdigest()}
        return cls(items, said, (str(name), reader, count), **more)

    def part(self, split: Split) -> Self:
        """Another split of the same source, at most as much of it."""
        name, reader, count = self.source
        return type(self).open(name, replace(reader, split=split), count=count)

    def describe(self) -> dict[str, Any]:
        """What provenance says of them."""
        return dict(self.said)

    def __len__(self) -> int:
        return len(self.items)


def _source(name: str, reader: Reader) -> Iterator[Captioned]:
    part: Any = "test" if reader.split == "test" else "calibration"
    if name == SHAPES:
        for number, scene in enumerate(scenes(part, reader.seed)):
            yield Captioned(render(scene, seed=(reader.seed, number)), caption(scene))
        return
    every = _digits() if name == DIGITS else _folder(Path(name))
    for number, read in enumerate(every):
        if (number % FIFTH == 0) == (part == "test"):
            yield read()


def _digits() -> Iterator[Callable[[], Captioned]]:
    """scikit-learn's digits, of 8 x 8 pixels."""
    data = require("sklearn.datasets", "vision", "the built-in digits").load_digits()
    for image, digit in zip(data.images, data.target, strict=True):
        grey = np.round(image / 16 * 255).astype(np.uint8)
        yield partial(Captioned, np.repeat(grey[..., None], 3, axis=2), f"the digit {digit}", int(digit))


def _folder(folder: Path) -> Iterator[Callable[[], Captioned]]:
    """The pictures of a folder, each read when it is called for."""
    if not folder.is_dir():
        raise CalibrationError(f"no pictures '{folder}': give a folder, {DIGITS} or {SHAPES}")
    if (folder / METADATA).is_file():
        for number, row in read_rows(check_in_folder(folder / METADATA)):
            where = f"{folder / METADATA} line {number}"
            if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
                raise CalibrationError(f'{where} names no picture: write {{"file_name": "one.png", "text": "..."}}')
            yield partial(_read, inside(folder, row["file_name"], where), where, str(row.get("text", "")))
        return
    for file in files_below(folder, lambda each: each.suffix.lower() in SUFFIXES):
        yield partial(_read, file, str(folder))


def _read(file: Path, where: str, text: str = "") -> Captioned:
    return Captioned(read_picture(file, where), text)
