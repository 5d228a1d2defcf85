"""The input: pictures, with classes where they lie in folders by class."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Self

from lamella.data import Captioned, Pictures, Reader
from lamella.data.captioned import FIFTH, SUFFIXES
from lamella.data.pictures import read_picture
from lamella.methods.iformer.textures import CLASSES, WORLDS, textures
from lamella.signature import Fixture

BUILT_IN = "textures"


@dataclass(frozen=True)
class Album(Pictures):
    """Pictures to measure, to heal or to learn on.

    Attributes:
        classes: how many there are; 0 where pictures have none.
    """

    told = (
        "a folder with a folder of pictures for each class, or of pictures alone; or textures (20 classes of a fine "
        "texture and an arrangement), faint-textures, digits or shapes, which are built in"
    )
    example = Fixture(BUILT_IN, settings={"count": 40})

    classes: int = 0

    @classmethod
    def open(cls, name: str | Path, reader: Reader, *, count: int = 1024) -> Self:
        """Read pictures.

        Args:
            name: a folder, ``textures``, ``faint-textures``, ``digits`` or ``shapes``. One picture in five of each
                class is for testing.
            count: at most so many pictures, as many of each class as of any other.

        Raises:
            CalibrationError: for a folder that is missing, holds no picture, or one that cannot be read.
        """
        if str(name) in WORLDS:
            pictures = textures(reader.split, reader.seed, str(name))
            return cls.first(count, pictures, name, reader, classes=CLASSES)
        if folders := _folders(Path(name)):
            pictures = _by_class(folders, reader.split == "test")
            return cls.first(count, pictures, name, reader, classes=len(folders))
        found = Pictures.open(name, reader, count=count)
        labels = [-1 if each.label is None else each.label for each in found.items]
        classes = 1 + max(labels) if min(labels) >= 0 else 0
        return cls(found.items, found.said | {"classes": classes}, found.source, classes)


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
