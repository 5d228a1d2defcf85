"""Pictures from files that anyone may have made: decoded by Pillow alone, in formats that run nothing, up to a size."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lamella.errors import CalibrationError
from lamella.extras import require
from lamella.reading import FileRefused, check_in_folder, open_file

Picture = npt.NDArray[np.uint8]  # [height, width, 3]

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MOST_PIXELS = 64_000_000  # of one picture: a small file may claim to hold any number


def read_picture(file: Path, where: str) -> Picture:
    """The colours of a picture, the way up that it was taken.

    Args:
        file: the picture.
        where: it is named, for the message.

    Raises:
        CalibrationError: when it cannot be read, or is larger than any model takes.
        LamellaError: when Pillow is missing.
    """
    return next(read_animation(file, where, colours))


def read_animation(file: Path, where: str, convert: Callable[[Any], Picture]) -> Iterator[Picture]:
    """The images of a file, of which only animations have several, decoded one at a time.

    Args:
        file: the picture.
        where: it is named, for the message.
        convert: from an image of Pillow to an array, such as :func:`colours`.

    Raises:
        CalibrationError: when it cannot be read, or is larger than any model takes.
        LamellaError: when Pillow is missing.
    """
    pillow, sequence = (require(f"PIL.{name}", "vision", "reading pictures") for name in ("Image", "ImageSequence"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes, which are looked at here
            with open_file(file) as opened, pillow.open(opened, formats=FORMATS) as image:
                width, height = image.size
                if width * height > MOST_PIXELS:
                    raise CalibrationError(
                        f"{where}: the image {file.name} has {width} x {height} pixels, above {MOST_PIXELS:,}: "
                        "give a smaller one"
                    )
                for each in sequence.Iterator(image):
                    yield convert(each)
    except CalibrationError:
        raise
    except Exception as error:  # of a damaged file, anything
        reason = getattr(error, "strerror", None) or (
            str(error) if isinstance(error, FileRefused) else type(error).__name__
        )
        raise CalibrationError(
            f"{where}: the image {file.name} cannot be read ({reason}): give {', '.join(FORMATS)}"
        ) from None


def colours(image: Any) -> Picture:
    """What a Pillow image shows [height, width, 3]."""
    upright = require("PIL.ImageOps", "vision", "reading pictures").exif_transpose(image)
    return np.array(upright.convert("RGB"))


def inside(folder: Path, name: str, where: str) -> Path:
    """A file of a folder, by the path that a document names.

    Raises:
        CalibrationError: for a name that leads out of the folder, by whatever way, to a link or to nothing.
    """
    file = folder / name
    try:
        is_inside, is_there = file.resolve().is_relative_to(folder.resolve()), file.is_file()
    except (OSError, ValueError):  # a name that no file can have
        is_inside, is_there = True, False
    if Path(name).is_absolute() or not is_inside:
        raise CalibrationError(f"{where}: the image '{name}' is outside the folder of the file: put it beside the file")
    if not is_there:
        raise CalibrationError(f"{where}: there is no image '{name}' in {folder}: give paths relative to the file")
    return check_in_folder(file)
