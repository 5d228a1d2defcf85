"""The input: pictures, with classes where they lie in folders by class."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from lamella.data import CaptionedImages, InputContext
from lamella.methods.iformer.textures import CLASSES, WORLDS, textures
from lamella.signature import Fixture

BUILT_IN = "textures"


@dataclass(frozen=True)
class Album(CaptionedImages):
    """Pictures to measure, to heal or to learn on."""

    source_help = (
        "a folder with a folder of pictures for each class, or of pictures alone; or textures (20 classes of a fine "
        "texture and an arrangement), faint-textures, digits or shapes, which are built in"
    )
    example = Fixture(BUILT_IN, settings={"count": 40})

    @classmethod
    def check(cls, name: str | Path) -> None:
        """Check a source before anything is opened.

        Raises:
            CalibrationError: for a folder that is missing.
        """
        if str(name) not in WORLDS:
            super().check(name)

    @classmethod
    def open(cls, name: str | Path, context: InputContext, *, count: int = 1024) -> Self:
        """Read pictures.

        Args:
            name: a folder, ``textures``, ``faint-textures``, ``digits`` or ``shapes``. One picture in five of each
                class is for testing.
            count: at most so many pictures, as many of each class as of any other.

        Raises:
            CalibrationError: for a folder that is missing, holds no picture, or one that cannot be read.
        """
        if str(name) in WORLDS:
            pictures = textures(context.split, context.seed, str(name))
            return cls.first(count, pictures, name, context, classes=CLASSES)
        return super().open(name, context, count=count)
