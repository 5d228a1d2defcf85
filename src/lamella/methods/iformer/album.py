"""Image datasets, with classes if the images are sorted into one folder per class."""

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
    """Images for measuring, healing or training."""

    source_help = (
        "a folder with one folder of images per class, or with images only; or one of the built-in textures (20 "
        "classes of a fine texture and an arrangement), faint-textures, digits or shapes"
    )
    example = Fixture(BUILT_IN, settings={"count": 40})

    @classmethod
    def check(cls, name: str | Path) -> None:
        """Check a source before it is opened.

        Args:
            name: a folder or a built-in dataset.

        Raises:
            CalibrationError: for a missing folder.
        """
        if str(name) not in WORLDS:
            super().check(name)

    @classmethod
    def open(cls, name: str | Path, context: InputContext, *, count: int = 1024) -> Self:
        """Open a dataset.

        Args:
            name: a folder, ``textures``, ``faint-textures``, ``digits`` or ``shapes``. One image in five of each class
                is in the test split.
            context: split and seed to use.
            count: maximum number of images, balanced over classes.

        Returns:
            The images.

        Raises:
            CalibrationError: for a folder that is missing or holds no image, or for an unreadable image.
        """
        if str(name) in WORLDS:
            images = textures(context.split, context.seed, str(name))
            return cls.first(count, images, name, context, classes=CLASSES)
        return super().open(name, context, count=count)
