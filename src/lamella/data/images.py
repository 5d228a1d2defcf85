"""Decoding of images from untrusted files, by Pillow only, in formats that execute nothing and up to a maximum size."""

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
MAX_PIXELS = 64_000_000  # of one image: the header of a small file may declare any size


def read_image(file: Path, where: str) -> Image:
    """Decode an image, rotated as its EXIF orientation says.

    Args:
        file: the image file.
        where: where the image is named, for error messages.

    Returns:
        RGB values, uint8 [height, width, 3].

    Raises:
        CalibrationError: if the file cannot be decoded, or has more than ``MAX_PIXELS`` pixels.
        LamellaError: if Pillow is not installed.
    """
    return next(read_animation(file, where, to_rgb))


def read_animation(file: Path, where: str, convert: Callable[[Any], Image]) -> Iterator[Image]:
    """Decode the frames of a file one at a time; only animations have more than one.

    Args:
        file: the image file.
        where: where the image is named, for error messages.
        convert: converts a Pillow image to an array, such as :func:`to_rgb`.

    Raises:
        CalibrationError: if the file cannot be decoded, or has more than ``MAX_PIXELS`` pixels.
        LamellaError: if Pillow is not installed.
    """
    sequence = require("PIL.ImageSequence", "vision", "reading images")
    with _readable(file, where), open_file(file) as opened, _opened(opened, file, where) as image:
        for each in sequence.Iterator(image):
            yield convert(each)


class ImageInfo(NamedTuple):
    """What is known of an image file without decoding it.

    Attributes:
        digest: the SHA-256 of the file.
        frames: the number of frames that its header declares.
    """

    digest: bytes
    frames: int


def check_image(file: Path, where: str) -> ImageInfo:
    """Check an image by its header and its checksums, without decoding it.

    Damage that only decoding shows is reported by :func:`read_image`.

    Args:
        file: the image file.
        where: where the image is named, for error messages.

    Raises:
        CalibrationError: if the file cannot be read, or has more than ``MAX_PIXELS`` pixels.
        LamellaError: if Pillow is not installed.
    """
    with _readable(file, where), open_file(file) as opened:
        digest = hashlib.file_digest(opened, "sha256").digest()
        opened.seek(0)
        with _opened(opened, file, where) as image:
            frames = getattr(image, "n_frames", 1)
            image.verify()
        return ImageInfo(digest, frames)


def _opened(opened: BinaryIO, file: Path, where: str) -> Any:
    """Open an image with Pillow, which reads the header only, and check its size."""
    image = require("PIL.Image", "vision", "reading images").open(opened, formats=FORMATS)
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise CalibrationError(
            f"{where}: the image {file.name} has {width} x {height} pixels, above {MAX_PIXELS:,}: give a smaller one"
        )
    return image


@contextmanager
def _readable(file: Path, where: str) -> Iterator[None]:
    """Turn any error that reading an image raises into one error that names the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about large images, which are checked here
            yield
    except LamellaError:
        raise
    except Exception as error:  # a damaged file may raise anything
        reason = getattr(error, "strerror", None) or (
            str(error) if isinstance(error, FileRefused) else type(error).__name__
        )
        raise CalibrationError(
            f"{where}: the image {file.name} cannot be read ({reason}): give {', '.join(FORMATS)}"
        ) from None


def to_rgb(image: Any) -> Image:
    """Convert a Pillow image to RGB values, uint8 [height, width, 3], in its upright orientation."""
    upright = require("PIL.ImageOps", "vision", "reading images").exif_transpose(image)
    return np.array(upright.convert("RGB"))


def inside(folder: Path, name: str, where: str) -> Path:
    """Resolve the path of an image that a document names, and check that it lies in the folder of the document.

    Args:
        folder: the folder of the document.
        name: the path, relative to the folder.
        where: where the path is named, for error messages.

    Raises:
        CalibrationError: if the path leads out of the folder, is a link, or does not exist.
    """
    file = folder / name
    try:
        is_inside, is_there = file.resolve().is_relative_to(folder.resolve()), file.is_file()
    except (OSError, ValueError):  # not a valid file name
        is_inside, is_there = True, False
    if Path(name).is_absolute() or not is_inside:
        raise CalibrationError(f"{where}: the image '{name}' is outside the folder of the file: put it beside the file")
    if not is_there:
        raise CalibrationError(f"{where}: there is no image '{name}' in {folder}: give paths relative to the file")
    return check_in_folder(file)
