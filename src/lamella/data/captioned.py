"""The input: pictures, with what can be said of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from lamella.data.context import InputContext
from lamella.data.images import Image, check_image, inside, read_image
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


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image file, and where it is named, for messages; calling it decodes the image."""

    path: str
    where: str

    def __call__(self) -> Image:
        return read_image(Path(self.path), self.where)

    def check(self) -> bytes:
        """The SHA-256 of the file; see :func:`lamella.data.images.check_picture`."""
        return check_image(Path(self.path), self.where).digest


class Captioned(NamedTuple):
    """A picture, what it shows in words, and its class where it has one.

    Attributes:
        source: the pixels [height, width, 3], or what decodes or renders them.
        text: the caption.
        label: the number of the class.
    """

    source: Image | Callable[[], Image]
    text: str = ""
    label: int | None = None

    @property
    def picture(self) -> Image:
        """The pixels [height, width, 3], decoded anew at each access."""
        return self.source() if callable(self.source) else self.source

    def check(self) -> bytes:
        """Check the image without decoding it, as far as that is possible.

        Returns:
            What decides the item, to be hashed.

        Raises:
            CalibrationError: if the header of its file shows that it cannot be read.
        """
        image = self.source.check() if isinstance(self.source, ImageFile) else self.picture.tobytes()
        return image + self.text.encode()


@dataclass(frozen=True)
class CaptionedImages:
    """Pictures with captions, or with classes, or alone.

    Opening a folder reads the headers of its images; they are decoded when they are asked for.

    Attributes:
        items: the pictures.
        said: what provenance says of them.
        source: what they were opened from, for :meth:`part`.
        classes: how many classes the source has; 0 where pictures have none.
    """

    metavar = "IMAGES"
    source_help = (
        "a folder with a folder of pictures for each class, or of pictures alone, whose captions may be in "
        'metadata.jsonl ({"file_name": "one.png", "text": "..."}); or digits, or shapes, which are built in'
    )
    example = Fixture(DIGITS, settings={"count": 48})

    items: tuple[Captioned, ...]
    said: dict[str, Any]
    source: tuple[str, InputContext, int]
    classes: int = 0

    @classmethod
    def check(cls, name: str | Path) -> None:
        """Check a source before anything is opened.

        Raises:
            CalibrationError: for a folder that is missing.
        """
        if str(name) not in (DIGITS, SHAPES) and not Path(name).is_dir():
            raise CalibrationError(f"no pictures '{name}': give a folder, {DIGITS} or {SHAPES}")

    @classmethod
    def open(cls, name: str | Path, context: InputContext, *, count: int = 1024) -> Self:
        """Read pictures.

        Args:
            name: a folder of them, ``digits`` or ``shapes``. Folders in it are classes, numbered in the order of their
                names, unless there are pictures beside them. One picture in five of each class is for testing.
            count: at most so many pictures, as many of each class as of any other.

        Raises:
            CalibrationError: for a folder that is missing, holds no picture, or one that cannot be read.
        """
        cls.check(name)
        return cls.first(count, _source(str(name), context), name, context, classes=len(_classes(str(name))))

    @classmethod
    def first(
        cls, count: int, every: Iterable[Captioned], name: str | Path, context: InputContext, **more: Any
    ) -> Self:
        """The first of some pictures, of which more is known."""
        if count < 1:
            raise CalibrationError(f"count {count}: give at least 1")
        items = tuple(islice(every, count))
        if not items:
            raise CalibrationError(f"{name} holds no pictures for the split {context.split}: give more of them")
        digest = hashlib.sha256()
        for each in items:
            digest.update(each.check())
        said = {"data": str(name), "split": context.split, "pictures": len(items), **more, "sha256": digest.hexdigest()}
        return cls(items, said, (str(name), context, count), **more)

    def part(self, split: Split) -> Self:
        """Another split of the same source, at most as much of it."""
        name, context, count = self.source
        return type(self).open(name, replace(context, split=split), count=count)

    def describe(self) -> dict[str, Any]:
        """What provenance says of them."""
        return dict(self.said)

    def __len__(self) -> int:
        return len(self.items)


@dataclass(frozen=True)
class LabelledImages(CaptionedImages):
    """Pictures that each have a class."""

    told = "a folder with a folder of pictures for each class; or digits, which are built in"

    @classmethod
    def check(cls, name: str | Path) -> None:
        """Check a source before anything is opened.

        Raises:
            CalibrationError: for a folder that is missing, or a source without classes.
        """
        super().check(name)
        if not _classes(str(name)):
            raise CalibrationError(
                f"the pictures of {name} have no classes: give a folder that holds nothing but a folder of pictures "
                f"for each class, or {DIGITS}"
            )


def _source(name: str, context: InputContext) -> Iterator[Captioned]:
    part: Any = "test" if context.split == "test" else "calibration"
    if name == SHAPES:
        for number, scene in enumerate(scenes(part, context.seed)):
            yield Captioned(partial(render, scene, seed=(context.seed, number)), caption(scene))
        return
    groups = [_digits()] if name == DIGITS else _folder(Path(name))
    parts = [
        (each for number, each in enumerate(group) if (number % FIFTH == 0) == (part == "test")) for group in groups
    ]
    for turn in zip_longest(*parts):  # a picture of each class, then the next of each
        yield from (each for each in turn if each is not None)


def _classes(name: str) -> dict[str, int]:
    """The classes of a source with their numbers; none where some of its pictures have no class."""
    if name in (DIGITS, SHAPES):
        return {str(digit): digit for digit in range(10)} if name == DIGITS else {}
    inside = sorted(Path(name).iterdir())
    for each in inside:
        if each.is_symlink() and each.is_dir():
            check_in_folder(each)
    folders = [each.name for each in inside if each.is_dir() and any(map(_is_picture, each.rglob("*")))]
    return {} if any(map(_is_picture, inside)) else {each: number for number, each in enumerate(folders)}


def _is_picture(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES


def _digits() -> Iterator[Captioned]:
    """scikit-learn's digits, of 8 x 8 pixels."""
    data = require("sklearn.datasets", "vision", "the built-in digits").load_digits()
    for image, digit in zip(data.images, data.target, strict=True):
        grey = np.round(image / 16 * 255).astype(np.uint8)
        yield Captioned(np.repeat(grey[..., None], 3, axis=2), f"the digit {digit}", int(digit))


def _folder(folder: Path) -> list[Iterator[Captioned]]:
    """The pictures of a folder, class by class where it has classes."""
    classes = _classes(str(folder))
    if (folder / METADATA).is_file():
        return [_described(folder, classes)]
    return [_files(folder / name, name, label) for name, label in classes.items()] or [_files(folder)]


def _files(folder: Path, text: str = "", label: int | None = None) -> Iterator[Captioned]:
    """The pictures in a folder and in those inside it, in the order of their names."""
    for file in files_below(folder, _is_picture):
        yield Captioned(ImageFile(str(file), str(folder)), text, label)


def _described(folder: Path, classes: Mapping[str, int]) -> Iterator[Captioned]:
    """The pictures that a folder's list of captions names."""
    for number, row in read_rows(check_in_folder(folder / METADATA)):
        where = f"{folder / METADATA} line {number}"
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            raise CalibrationError(f'{where} names no picture: write {{"file_name": "one.png", "text": "..."}}')
        file = inside(folder, row["file_name"], where)
        label = classes.get(Path(row["file_name"]).parts[0])
        yield Captioned(ImageFile(str(file), where), str(row.get("text", "")), label)
