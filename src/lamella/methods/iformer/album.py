"""The input: pictures, with classes where they lie in folders by class."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from lamella.data import Captioned, Pictures, Reader
from lamella.data.captioned import FIFTH, SUFFIXES
from lamella.data.pictures import read_picture
from lamella.data.sources import Split
from lamella.errors import CalibrationError
from lamella.methods.iformer.textures import CLASSES, textures
from lamella.signature import Fixture

BUILT_IN = "textures"


@dataclass(frozen=True)
class Album:
    """Pictures to measure, to heal or to learn on.

    Attributes:
        items: the pictures.
        classes: how many there are; 0 where pictures have none.
        said: what provenance says of them.
        source: what they were opened from, for :meth:`part`.
    """

    metavar = "IMAGES"
    told = (
        "a folder with a folder of pictures for each class, or of pictures alone; or textures (20 classes of a fine "
        "texture and an arrangement), digits or shapes, which are built in"
    )
    example = Fixture(BUILT_IN, settings={"count": 40})

    items: tuple[Captioned, ...]
    classes: int
    said: dict[str, Any]
    source: tuple[str, Reader, int]

    @classmethod
    def open(cls, name: str | Path, reader: Reader, *, count: int = 1024) -> Album:
        """Read pictures.

        Args:
            name: a folder, ``textures``, ``digits`` or ``shapes``. One picture in five of each class is for testing.
            count: at most so many pictures, as many of each class as of any other.

        Raises:
            CalibrationError: for a folder that is missing, holds no picture, or one that cannot be read.
        """
        if count < 1:
            raise CalibrationError(f"count={count}: give at least 1")
        folders = _folders(Path(name))
        if str(name) == BUILT_IN:
            items, classes = tuple(islice(textures(reader.split, reader.seed), count)), CLASSES
        elif folders:
            items, classes = tuple(islice(_by_class(folders, reader.split == "test"), count)), len(folders)
        else:
            items = Pictures.open(name, reader, count=count).items
            labels = {each.label for each in items}
            classes = 0 if None in labels else 1 + max(label for label in labels if label is not None)
        if not items:
            raise CalibrationError(f"{name} holds no pictures for the split {reader.split}: give more of each class")
        digest = hashlib.sha256()
        for each in items:
            digest.update(each.picture.tobytes() + f"{each.text} {each.label}".encode())
        said = {"data": str(name), "split": reader.split, "pictures": len(items), "classes": classes,
                "sha256": digest.hexdigest()}  # fmt: skip
        return cls(items, classes, said, (str(name), reader, count))

    def part(self, split: Split) -> Album:
        """Another split of the same source, at most as much of it."""
        name, reader, count = self.source
        return type(self).open(name, replace(reader, split=split), count=count)

    def describe(self) -> dict[str, Any]:
        """What provenance says of them."""
        return dict(self.said)

    def __len__(self) -> int:
        return len(self.items)


def _folders(folder: Path) -> list[Path]:
    """The folders of classes in a folder, in the order of their names."""
    if not folder.is_dir():
        return []
    return sorted(each for each in folder.iterdir() if each.is_dir() and any(map(_is_picture, each.rglob("*"))))


def _is_picture(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES


def _by_class(folders: list[Path], test: bool) -> Iterator[Captioned]:
    """A picture of each class, then the next of each."""
    rows = []
    for folder in folders:
        files = sorted(filter(_is_picture, folder.rglob("*")))
        rows.append([file for number, file in enumerate(files) if (number % FIFTH == 0) == test])
    for turn in zip_longest(*rows):
        for label, file in enumerate(turn):
            if file is not None:
                yield Captioned(read_picture(file, str(folders[label])), folders[label].name, label)
