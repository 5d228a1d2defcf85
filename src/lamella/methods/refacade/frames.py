"""The inputs: frames of an image or a video, masks of the object in them, and a reference with the texture."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from lamella.data.images import MAX_PIXELS, Image, ImageInfo, check_image, read_animation, to_rgb
from lamella.errors import CalibrationError
from lamella.extras import require
from lamella.methods.refacade.objects import TexturedObject, textured_object
from lamella.reading import check_in_folder, open_file
from lamella.signature import Fixture

TEXTURED = "textured"  # a built-in random object
RES, FRAMES = 32, 3  # its size and number of frames
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
MOST_FRAMES = 512
PAPER = 240  # of 255: pixels at least as light in all channels are background, in an opaque reference
GIVE = "give an image, a folder of frames or a video file"


@dataclass(frozen=True, eq=False)
class Frames:
    """Frames of one size.

    Attributes:
        pixels: RGB values [frames, height, width, 3].
        metadata: description for the provenance.
    """

    metavar = "IMAGE"
    source_help = "an image, a folder of frames, or a video file (.gif, .webp; .mp4 and others need PyAV)"
    example = Fixture(TEXTURED)

    pixels: NDArray[np.uint8]
    metadata: dict[str, Any]

    @classmethod
    def open(cls, name: str | Path) -> Frames:
        """Read frames.

        Args:
            name: an image, a folder of frames, or a video file; or ``textured``, a random synthetic object.

        Raises:
            CalibrationError: for a missing or damaged file, or frames of several sizes.
        """
        if str(name) == TEXTURED:
            pixels = to_uint8(example().composite)
        else:
            pixels = stack_frames([image[..., :3] for image in read_frames(Path(name))], name)
        return cls(pixels, describe_pixels(name, pixels))

    def describe(self) -> dict[str, Any]:
        """Return the description for the provenance."""
        return dict(self.metadata)

    def fitted(self, height: int, width: int) -> Tensor:
        """Return the frames in [-1, 1], resized [frames, 3, height, width].

        Args:
            height: new height in pixels.
            width: new width in pixels.
        """
        return scaled(to_float(self.pixels), height, width)


@dataclass(frozen=True, eq=False)
class Masks:
    """Masks of an object, one for all frames or one per frame.

    Attributes:
        shown: [masks, height, width].
        metadata: description for the provenance.
    """

    metavar = "MASK"
    source_help = "an image that is light where the object is; or a folder or a video of masks, one per frame"
    example = Fixture(TEXTURED)

    shown: NDArray[np.bool_]
    metadata: dict[str, Any]

    @classmethod
    def open(cls, name: str | Path) -> Masks:
        """Read masks.

        Args:
            name: an image, a folder or a video file; or ``textured``, that of the random synthetic object.

        Raises:
            CalibrationError: for a missing or damaged file, masks of several sizes, or an empty mask.
        """
        if str(name) == TEXTURED:
            shown = example().mask[:, 0] > 0.5
        else:
            shown = light_pixels(stack_frames([image[..., :3] for image in read_frames(Path(name))], name))
        if not shown.any():
            raise CalibrationError(f"{name}: the mask is empty: make it light where the object is")
        return cls(shown, describe_pixels(name, shown))

    def describe(self) -> dict[str, Any]:
        """Return the description for the provenance."""
        return dict(self.metadata)

    def fitted(self, frames: Frames, height: int, width: int) -> Tensor:
        """Return the masks of some frames, resized with nearest neighbours [frames, 1, height, width].

        Args:
            frames: the frames; a single mask is repeated for all of them.
            height: new height in pixels.
            width: new width in pixels.

        Raises:
            CalibrationError: when the number or size of the frames differs.
        """
        count, *size = frames.pixels.shape[:3]
        if list(self.shown.shape[1:]) != size:
            ours, theirs = ("{} x {}".format(*each) for each in (self.shown.shape[1:], size))
            raise CalibrationError(f"the mask has {ours} pixels, the image {theirs}: give a mask of the same size")
        if len(self.shown) not in (1, count):
            raise CalibrationError(f"{len(self.shown)} masks for {count} frames: give one for all, or one per frame")
        masks = torch.from_numpy(self.shown)[:, None].float()
        return F.interpolate(masks, (height, width), mode="nearest-exact").expand(count, -1, -1, -1)


@dataclass(frozen=True, eq=False)
class Reference:
    """An image with a texture on some object.

    Attributes:
        image: RGB values [height, width, 3].
        shown: mask of the object [height, width].
        metadata: description for the provenance.
    """

    metavar = "IMAGE"
    source_help = "an image of an object with the texture, on white or transparent; otherwise all of it is texture"
    example = Fixture(TEXTURED)

    image: Image
    shown: NDArray[np.bool_]
    metadata: dict[str, Any]

    @classmethod
    def open(cls, name: str | Path) -> Reference:
        """Read a reference.

        Args:
            name: an image, whose object is neither transparent nor white; or ``textured``, a random synthetic one.

        Raises:
            CalibrationError: for a missing or damaged file, or one without an object.
        """
        if str(name) == TEXTURED:
            other = textured_object(1, RES, part="test")
            image, shown = to_uint8(other.cross[0][None])[0], other.cross[1][0] > 0.5
        else:
            image = next(iter(read_frames(Path(name))))
            image, shown = image[..., :3], (image[..., 3] > 127) & (image[..., :3].min(axis=-1) < PAPER)
        if not shown.any():
            raise CalibrationError(f"{name}: the reference has no object: all of it is white or transparent")
        return cls(image, shown, describe_pixels(name, image))

    def describe(self) -> dict[str, Any]:
        """Return the description for the provenance."""
        return dict(self.metadata)

    def masked(self, masks: Masks) -> Reference:
        """Return the reference with its object given by a mask.

        Raises:
            CalibrationError: for a mask of another size.
        """
        if masks.shown.shape[1:] != self.shown.shape:
            ours, theirs = ("{} x {}".format(*each) for each in (masks.shown.shape[1:], self.shown.shape))
            raise CalibrationError(f"the mask has {ours} pixels, the reference {theirs}: give a mask of the same size")
        return Reference(self.image, masks.shown[0], self.metadata)


# Files


def read_frames(path: Path) -> Iterator[NDArray[np.uint8]]:
    """Read the frames of an image, a folder or a video [height, width, 4].

    Raises:
        CalibrationError: for missing or damaged files, or too many pixels.
    """
    if path.is_dir():
        files = files_of(path)
        found: Iterable[NDArray[np.uint8]] = (next(read_animation(file, str(path), with_alpha)) for file in files)
    elif path.suffix.lower() in VIDEOS and path.is_file():
        found = read_video(path)
    elif path.is_file():
        found = read_animation(path, str(path), with_alpha)
    else:
        raise CalibrationError(f"no frames '{path}': {GIVE}")
    pixels = 0
    for count, image in enumerate(islice(found, MOST_FRAMES + 1), start=1):
        pixels += image.shape[0] * image.shape[1]
        if count > MOST_FRAMES or pixels > 8 * MAX_PIXELS:
            raise CalibrationError(f"{path}: more than {MOST_FRAMES} frames or {8 * MAX_PIXELS:,} pixels: give fewer")
        yield image


def check_frames(path: Path) -> ImageInfo:
    """Check an image, a folder or a video by its headers, without decoding it.

    Raises:
        CalibrationError: for a missing or damaged file, as far as headers show it.
    """
    if path.is_dir():
        files = [check_image(file, str(path)) for file in files_of(path)]
        return ImageInfo(b"".join(each.digest for each in files), len(files))
    if path.suffix.lower() in VIDEOS and path.is_file():
        with video(path) as (opened, stream):
            frames = stream.frames or sum(packet.size > 0 for packet in stream.container.demux(stream))
            opened.seek(0)
            return ImageInfo(hashlib.file_digest(opened, "sha256").digest(), frames)
    if path.is_file():
        return check_image(path, str(path))
    raise CalibrationError(f"no frames '{path}': {GIVE}")


def files_of(folder: Path) -> list[Path]:
    """Return the image files of a folder.

    Raises:
        CalibrationError: for a folder without images, or with a symbolic link among them.
    """
    files = [check_in_folder(each) for each in sorted(folder.iterdir()) if each.suffix.lower() in IMAGES]
    if not files:
        raise CalibrationError(f"{folder} holds no frames: {GIVE}")
    return files


def with_alpha(image: Any) -> NDArray[np.uint8]:
    """Return the RGBA values of a Pillow image [height, width, 4], with its EXIF orientation applied."""
    upright = require("PIL.ImageOps", "vision", "reading images").exif_transpose(image)
    opaque = np.array(upright.convert("RGBA"))[..., 3:]
    return np.concatenate([to_rgb(image), opaque], axis=-1)


def read_video(file: Path) -> Iterator[NDArray[np.uint8]]:
    """Yield the frames of a video file [height, width, 4]."""
    with video(file) as (_, stream):
        for frame in stream.container.decode(stream):
            image = frame.to_ndarray(format="rgb24")
            yield np.concatenate([image, np.full_like(image[..., :1], 255)], axis=-1)


@contextmanager
def video(file: Path) -> Iterator[tuple[BufferedReader, Any]]:
    """Open a video file and its video stream; errors of the decoder become one error that names the file."""
    av = require("av", "video", "reading this video")
    try:
        with open_file(file) as opened, av.open(opened) as container:
            stream = container.streams.video[0]
            if stream.width * stream.height > MAX_PIXELS:
                raise CalibrationError(f"{file}: {stream.width} x {stream.height} pixels: give a smaller video")
            yield opened, stream
    except CalibrationError:
        raise
    except Exception as error:  # damaged files raise anything
        raise CalibrationError(f"{file}: the video cannot be read ({type(error).__name__}): {GIVE}") from None


def stack_frames(images: list[NDArray[np.uint8]], name: str | Path) -> NDArray[np.uint8]:
    """Stack frames into one array [frames, height, width, ...].

    Args:
        images: the frames [height, width, ...].
        name: name of the clip for the message.

    Raises:
        CalibrationError: when their sizes differ.
    """
    sizes = sorted({"{} x {}".format(*each.shape) for each in images})
    if len(sizes) > 1:
        raise CalibrationError(f"{name}: frames of {' and '.join(sizes[:3])} pixels: give frames of one size")
    return np.stack(images)


def describe_pixels(name: str | Path, pixels: NDArray[Any]) -> dict[str, Any]:
    """Return the name, shape and digest of pixels for the provenance.

    Args:
        name: name or path of the data.
        pixels: the pixels.
    """
    digest = hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()
    return {"data": str(name), "shape": list(pixels.shape), "sha256": digest}


# Arrays


def light_pixels(pixels: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Return where images [..., 3] are light, which marks the object."""
    light: NDArray[np.bool_] = pixels.mean(axis=-1) > 127
    return light


def example() -> TexturedObject:
    """Return the built-in object."""
    return textured_object(0, RES, FRAMES, "test")


def to_float(pixels: NDArray[np.uint8]) -> Tensor:
    """Convert uint8 RGB [..., height, width, 3] to floats in [-1, 1] [..., 3, height, width]."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(pixels, -1, -3))).float() / 127.5 - 1


def to_uint8(frames: Any) -> NDArray[np.uint8]:
    """Convert floats in [-1, 1] [..., 3, height, width] to uint8 RGB [..., height, width, 3]."""
    pixels = np.moveaxis(np.asarray(frames, dtype=np.float32), -3, -1)
    return ((pixels.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8)


def scaled(frames: Tensor, height: int, width: int) -> Tensor:
    """Resize frames with antialiased bilinear interpolation [frames, 3, height, width].

    Args:
        frames: values in [-1, 1] [frames, 3, old height, old width].
        height: new height in pixels.
        width: new width in pixels.
    """
    if frames.shape[-2:] == (height, width):
        return frames
    return F.interpolate(frames, (height, width), mode="bilinear", antialias=True).clamp(-1, 1)
