"""Pictures from files that anyone may have made: decoded by Pillow alone, in formats that run nothing, up to a size."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from lamella.errors import CalibrationError, LamellaError
from lamella.extras import require
from lamella.reading import FileRefused, check_in_folder, open_file

Image = npt.NDArray[np.uint8]  # [height, width, 3]

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 64_000_000  # of one picture: a small file may claim to hold any number


def read_image(file: Path, where: str) -> Image:
    """The colours of a picture, the way up that it was taken.

    Args:
        file: the picture.
        where: it is named, for the message.

    Raises:
        CalibrationError: when it cannot be read, or is larger than any model takes.
        LamellaError: when Pillow is missing.
    """
    return next(read_animation(file, where, to_rgb))


def read_animation(file: Path, where: str, convert: Callable[[Any], Image]) -> Iterator[Image]:
    """The images of a file, of which only animations have several, decoded one at a time.

    Args:
        file: the picture.
        where: it is named, for the message.
        convert: from an image of Pillow to an array, such as :func:`colours`.

    Raises:
        CalibrationError: when it cannot be read, or is larger than any model takes.
        LamellaError: when Pillow is missing.
    """
    sequence = require("PIL.ImageSequence", "vision", "reading pictures")
    with _readable(file, where), open_file(file) as opened, _opened(opened, file, where) as image:
        for each in sequence.Iterator(image):
            yield convert(each)


class ImageInfo(NamedTuple):
    """What is known of a file of images without decoding it.

    Attributes:
        digest: its SHA-256.
        frames: the number of images that its header declares.
    """

    digest: bytes
    frames: int


def check_image(file: Path, where: str) -> ImageInfo:
    """Check a picture by its header and its checksums, without decoding it.

    Damage that only decoding shows is reported by :func:`read_picture`.

    Args:
        file: the picture.
        where: it is named, for the message.

    Raises:
        CalibrationError: when it cannot be read, or is larger than any model takes.
        LamellaError: when Pillow is missing.
    """
    with _readable(file, where), open_file(file) as opened:
        digest = hashlib.file_digest(opened, "sha256").digest()
        opened.seek(0)
        with _opened(opened, file, where) as image:
            frames = getattr(image, "n_frames", 1)
            image.verify()
        return ImageInfo(digest, frames)


def _opened(opened: BinaryIO, file: Path, where: str) -> Any:
    """The image of Pillow in an open file, of which the header alone has been read."""
    image = require("PIL.Image", "vision", "reading pictures").open(opened, formats=FORMATS)
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise CalibrationError(
            f"{where}: the image {file.name} has {width} x {height} pixels, above {MAX_PIXELS:,}: give a smaller one"
        )
    return image


@contextmanager
def _readable(file: Path, where: str) -> Iterator[None]:
    """Turn whatever reading a picture raises into one error that names it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes, which are looked at here
            yield
    except LamellaError:
        raise
    except Exception as error:  # of a damaged file, anything
        reason = getattr(error, "strerror", None) or (
            str(error) if isinstance(error, FileRefused) else type(error).__name__
        )
        raise CalibrationError(
            f"{where}: the image {file.name} cannot be read ({reason}): give {', '.join(FORMATS)}"
        ) from None


def to_rgb(image: Any) -> Image:
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
