"""Images with captions or class labels, from a folder or a built-in source."""

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
FIFTH = 5  # one image in five belongs to the test split


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image file, and where it is named, for error messages; calling it decodes the image."""

    path: str
    where: str

    def __call__(self) -> Image:
        """Decode the image, uint8 [height, width, 3]."""
        return read_image(Path(self.path), self.where)

    def check(self) -> bytes:
        """Check the header and return the SHA-256 of the file (:func:`lamella.data.images.check_image`)."""
        return check_image(Path(self.path), self.where).digest


class Captioned(NamedTuple):
    """An image with its caption, and its class label if it has one.

    Attributes:
        source: the pixels [height, width, 3], or a function that decodes or renders them.
        text: the caption.
        label: the index of the class.
    """

    source: Image | Callable[[], Image]
    text: str = ""
    label: int | None = None

    @property
    def image(self) -> Image:
        """The pixels, uint8 [height, width, 3], decoded again at each access."""
        return self.source() if callable(self.source) else self.source

    def check(self) -> bytes:
        """Check the image without decoding it, as far as that is possible.

        Returns:
            Bytes that identify the item, for hashing.

        Raises:
            CalibrationError: if the header of its file shows that it cannot be read.
        """
        image = self.source.check() if isinstance(self.source, ImageFile) else self.image.tobytes()
        return image + self.text.encode()


@dataclass(frozen=True)
class CaptionedImages:
    """Images with captions, with class labels, or alone.

    Opening a folder reads the headers of its images; they are decoded on access.

    Attributes:
        items: the images.
        metadata: description of the source for provenance.
        source: the name, context and count that they were opened with, for :meth:`part`.
        classes: the number of classes of the source; 0 if the images have no labels.
    """

    metavar = "IMAGES"
    source_help = (
        "a folder with a subfolder of images for each class, or of images alone, with captions in an optional "
        'metadata.jsonl ({"file_name": "one.png", "text": "..."}); or the built-in digits or shapes'
    )
    example = Fixture(DIGITS, settings={"count": 48})

    items: tuple[Captioned, ...]
    metadata: dict[str, Any]
    source: tuple[str, InputContext, int]
    classes: int = 0

    @classmethod
    def check(cls, name: str | Path) -> None:
        """Check a source before anything is opened.

        Args:
            name: the folder or the name of a built-in source.

        Raises:
            CalibrationError: if the folder does not exist.
        """
        if str(name) not in (DIGITS, SHAPES) and not Path(name).is_dir():
            raise CalibrationError(f"no images '{name}': give a folder, {DIGITS} or {SHAPES}")

    @classmethod
    def open(cls, name: str | Path, context: InputContext, *, count: int = 1024) -> Self:
        """Read images.

        Args:
            name: a folder of images, ``digits`` or ``shapes``. Subfolders are classes, numbered in the order of their
                names, unless there are images beside them. One image in five of each class belongs to the test split.
            context: the split and the random seed.
            count: the maximum number of images, balanced over the classes.

        Raises:
            CalibrationError: if the folder does not exist, holds no image, or holds one that cannot be read.
        """
        cls.check(name)
        return cls.first(count, _source(str(name), context), name, context, classes=len(_classes(str(name))))

    @classmethod
    def first(
        cls, count: int, every: Iterable[Captioned], name: str | Path, context: InputContext, **more: Any
    ) -> Self:
        """Take the first images of an iterable.

        Args:
            count: the maximum number of images.
            every: the images.
            name: the name of their source.
            context: the split and the random seed that they were made with.
            more: further fields of the class and of the metadata.

        Raises:
            CalibrationError: if there is no image.
        """
        if count < 1:
            raise CalibrationError(f"count {count}: give at least 1")
        items = tuple(islice(every, count))
        if not items:
            raise CalibrationError(f"{name} holds no images for the split {context.split}: give more images")
        digest = hashlib.sha256()
        for each in items:
            digest.update(each.check())
        metadata = {
            "data": str(name),
            "split": context.split,
            "images": len(items),
            **more,
            "sha256": digest.hexdigest(),
        }
        return cls(items, metadata, (str(name), context, count), **more)

    def part(self, split: Split) -> Self:
        """Read another split of the same source, with at most as many images."""
        name, context, count = self.source
        return type(self).open(name, replace(context, split=split), count=count)

    def describe(self) -> dict[str, Any]:
        """Return the description of the source, for provenance."""
        return dict(self.metadata)

    def __len__(self) -> int:
        return len(self.items)


@dataclass(frozen=True)
class LabelledImages(CaptionedImages):
    """Images that each have a class label."""

    source_help = "a folder with a subfolder of images for each class; or the built-in digits"

    @classmethod
    def check(cls, name: str | Path) -> None:
        """Check a source before anything is opened.

        Args:
            name: the folder or the name of a built-in source.

        Raises:
            CalibrationError: if the folder does not exist, or the source has no classes.
        """
        super().check(name)
        if not _classes(str(name)):
            raise CalibrationError(
                f"the images of {name} have no classes: give a folder that holds only one subfolder of images "
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
    for turn in zip_longest(*parts):  # one image of each class in turn
        yield from (each for each in turn if each is not None)


def _classes(name: str) -> dict[str, int]:
    """Return the classes of a source with their indices; empty if some of its images have no class."""
    if name in (DIGITS, SHAPES):
        return {str(digit): digit for digit in range(10)} if name == DIGITS else {}
    inside = sorted(Path(name).iterdir())
    for each in inside:
        if each.is_symlink() and each.is_dir():
            check_in_folder(each)
    folders = [each.name for each in inside if each.is_dir() and any(map(_is_image, each.rglob("*")))]
    return {} if any(map(_is_image, inside)) else {each: number for number, each in enumerate(folders)}


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES


def _digits() -> Iterator[Captioned]:
    """Yield scikit-learn's digits, of 8 x 8 pixels."""
    data = require("sklearn.datasets", "vision", "the built-in digits").load_digits()
    for image, digit in zip(data.images, data.target, strict=True):
        grey = np.round(image / 16 * 255).astype(np.uint8)
        yield Captioned(np.repeat(grey[..., None], 3, axis=2), f"the digit {digit}", int(digit))


def _folder(folder: Path) -> list[Iterator[Captioned]]:
    """Return the images of a folder, one iterator for each class."""
    classes = _classes(str(folder))
    if (folder / METADATA).is_file():
        return [_described(folder, classes)]
    return [_files(folder / name, name, label) for name, label in classes.items()] or [_files(folder)]


def _files(folder: Path, text: str = "", label: int | None = None) -> Iterator[Captioned]:
    """Yield the images in a folder and its subfolders, in the order of their names."""
    for file in files_below(folder, _is_image):
        yield Captioned(ImageFile(str(file), str(folder)), text, label)


def _described(folder: Path, classes: Mapping[str, int]) -> Iterator[Captioned]:
    """Yield the images that the metadata file of a folder names."""
    for number, row in read_rows(check_in_folder(folder / METADATA)):
        where = f"{folder / METADATA} line {number}"
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            raise CalibrationError(f'{where} names no image: write {{"file_name": "one.png", "text": "..."}}')
        file = inside(folder, row["file_name"], where)
        label = classes.get(Path(row["file_name"]).parts[0])
        yield Captioned(ImageFile(str(file), where), str(row.get("text", "")), label)
