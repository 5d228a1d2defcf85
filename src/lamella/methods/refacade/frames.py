"""The inputs: frames of a picture or a video, where the object is in them, and a reference that shows a texture."""

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

TEXTURED = "textured"  # an object by chance, which is built in
RES, FRAMES = 32, 3  # of it
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
MOST_FRAMES = 512
PAPER = 240  # of 255: what is as light as that in all colours is paper, where a reference has no transparency
GIVE = "give a picture, a folder of frames or a video file"


@dataclass(frozen=True, eq=False)
class Frames:
    """Frames of one size.

    Attributes:
        pixels: [frames, height, width, 3].
        said: what provenance says of them.
    """

    metavar = "PICTURE"
    source_help = "a picture, a folder of frames, or a video file (.gif, .webp; .mp4 and others need PyAV)"
    example = Fixture(TEXTURED)

    pixels: NDArray[np.uint8]
    said: dict[str, Any]

    @classmethod
    def open(cls, name: str | Path) -> Frames:
        """Read frames.

        Args:
            name: a picture, a folder of frames, or a video file; or ``textured``, an object by chance.

        Raises:
            CalibrationError: for what is missing or damaged, or frames of several sizes.
        """
        if str(name) == TEXTURED:
            pixels = eight_bit(example().composite)
        else:
            pixels = one_size([image[..., :3] for image in read(Path(name))], name)
        return cls(pixels, described(name, pixels))

    def describe(self) -> dict[str, Any]:
        """What provenance says of them."""
        return dict(self.said)

    def fitted(self, height: int, width: int) -> Tensor:
        """From -1 to 1 in a size [frames, 3, height, width]."""
        return scaled(signed(self.pixels), height, width)


@dataclass(frozen=True, eq=False)
class Masks:
    """Where an object is, one mask for all frames or one for each.

    Attributes:
        shown: [masks, height, width].
        said: what provenance says of them.
    """

    metavar = "MASK"
    source_help = "a picture that is light where the object is; or a folder or a video of them, one for each frame"
    example = Fixture(TEXTURED)

    shown: NDArray[np.bool_]
    said: dict[str, Any]

    @classmethod
    def open(cls, name: str | Path) -> Masks:
        """Read masks.

        Args:
            name: a picture, a folder or a video file; or ``textured``, that of the object by chance.

        Raises:
            CalibrationError: for what is missing or damaged, or masks of several sizes or without an object.
        """
        if str(name) == TEXTURED:
            shown = example().mask[:, 0] > 0.5
        else:
            shown = marked(one_size([image[..., :3] for image in read(Path(name))], name))
        if not shown.any():
            raise CalibrationError(f"{name}: the mask is empty: make it light where the object is")
        return cls(shown, described(name, shown))

    def describe(self) -> dict[str, Any]:
        """What provenance says of them."""
        return dict(self.said)

    def fitted(self, frames: Frames, height: int, width: int) -> Tensor:
        """Of some frames, in a size [frames, 1, height, width].

        Raises:
            CalibrationError: when these are others than those that it was made for.
        """
        count, *size = frames.pixels.shape[:3]
        if list(self.shown.shape[1:]) != size:
            ours, theirs = ("{} x {}".format(*each) for each in (self.shown.shape[1:], size))
            raise CalibrationError(f"the mask has {ours} pixels, the picture {theirs}: give a mask of its size")
        if len(self.shown) not in (1, count):
            raise CalibrationError(f"{len(self.shown)} masks for {count} frames: give one for all, or one for each")
        made = torch.from_numpy(self.shown)[:, None].float()
        return F.interpolate(made, (height, width), mode="nearest-exact").expand(count, -1, -1, -1)


@dataclass(frozen=True, eq=False)
class Reference:
    """A picture that shows a texture on some object.

    Attributes:
        picture: [height, width, 3].
        shown: where the object is [height, width].
        said: what provenance says of it.
    """

    metavar = "PICTURE"
    source_help = (
        "a picture of an object that has the texture, on white or cut out; without either all of it is texture"
    )
    example = Fixture(TEXTURED)

    picture: Image
    shown: NDArray[np.bool_]
    said: dict[str, Any]

    @classmethod
    def open(cls, name: str | Path) -> Reference:
        """Read a reference.

        Args:
            name: a picture; its object is what is neither transparent nor white. Or ``textured``, one by chance.

        Raises:
            CalibrationError: for what is missing or damaged, or shows no object.
        """
        if str(name) == TEXTURED:
            other = textured_object(1, RES, part="test")
            picture, shown = eight_bit(other.cross[0][None])[0], other.cross[1][0] > 0.5
        else:
            image = next(iter(read(Path(name))))
            picture, shown = image[..., :3], (image[..., 3] > 127) & (image[..., :3].min(axis=-1) < PAPER)
        if not shown.any():
            raise CalibrationError(f"{name}: the reference shows no object: all of it is white or transparent")
        return cls(picture, shown, described(name, picture))

    def describe(self) -> dict[str, Any]:
        """What provenance says of it."""
        return dict(self.said)

    def masked(self, masks: Masks) -> Reference:
        """The same with its object where a mask says.

        Raises:
            CalibrationError: for a mask of another size.
        """
        if masks.shown.shape[1:] != self.shown.shape:
            ours, theirs = ("{} x {}".format(*each) for each in (masks.shown.shape[1:], self.shown.shape))
            raise CalibrationError(f"the mask has {ours} pixels, the reference {theirs}: give a mask of its size")
        return Reference(self.picture, masks.shown[0], self.said)


# Files


def read(path: Path) -> Iterator[NDArray[np.uint8]]:
    """The frames of a picture, a folder or a video [height, width, 4].

    Raises:
        CalibrationError: for what is missing, damaged or too much.
    """
    if path.is_dir():
        files = files_of(path)
        found: Iterable[NDArray[np.uint8]] = (next(read_animation(file, str(path), with_alpha)) for file in files)
    elif path.suffix.lower() in VIDEOS and path.is_file():
        found = moving(path)
    elif path.is_file():
        found = read_animation(path, str(path), with_alpha)
    else:
        raise CalibrationError(f"no frames '{path}': {GIVE}")
    pixels = 0
    for number, image in enumerate(islice(found, MOST_FRAMES + 1), start=1):
        pixels += image.shape[0] * image.shape[1]
        if number > MOST_FRAMES or pixels > 8 * MAX_PIXELS:
            raise CalibrationError(f"{path}: above {MOST_FRAMES} frames or {8 * MAX_PIXELS:,} pixels: give fewer")
        yield image


def checked(path: Path) -> ImageInfo:
    """Check a picture, a folder or a video by its headers, without decoding it.

    Raises:
        CalibrationError: for what is missing or damaged, as far as headers show it.
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
    """The frames in a folder.

    Raises:
        CalibrationError: for a folder without frames, or with a link among them.
    """
    files = [check_in_folder(each) for each in sorted(folder.iterdir()) if each.suffix.lower() in PICTURES]
    if not files:
        raise CalibrationError(f"{folder} holds no frames: {GIVE}")
    return files


def with_alpha(image: Any) -> NDArray[np.uint8]:
    """What a Pillow image shows, and how opaque it is [height, width, 4]; upright."""
    upright = require("PIL.ImageOps", "vision", "reading pictures").exif_transpose(image)
    opaque = np.array(upright.convert("RGBA"))[..., 3:]
    return np.concatenate([to_rgb(image), opaque], axis=-1)


def moving(file: Path) -> Iterator[NDArray[np.uint8]]:
    """The frames of a video file [height, width, 4]."""
    with video(file) as (_, stream):
        for frame in stream.container.decode(stream):
            image = frame.to_ndarray(format="rgb24")
            yield np.concatenate([image, np.full_like(image[..., :1], 255)], axis=-1)


@contextmanager
def video(file: Path) -> Iterator[tuple[BufferedReader, Any]]:
    """An open video file with its stream of frames; what reading it raises becomes one error that names it."""
    av = require("av", "video", "reading this video")
    try:
        with open_file(file) as opened, av.open(opened) as container:
            stream = container.streams.video[0]
            if stream.width * stream.height > MAX_PIXELS:
                raise CalibrationError(f"{file}: {stream.width} x {stream.height} pixels: give a smaller video")
            yield opened, stream
    except CalibrationError:
        raise
    except Exception as error:  # of a damaged file, anything
        raise CalibrationError(f"{file}: the video cannot be read ({type(error).__name__}): {GIVE}") from None


def one_size(images: list[NDArray[np.uint8]], name: str | Path) -> NDArray[np.uint8]:
    """Frames as one array.

    Raises:
        CalibrationError: when their sizes differ.
    """
    sizes = sorted({"{} x {}".format(*each.shape) for each in images})
    if len(sizes) > 1:
        raise CalibrationError(f"{name}: frames of {' and '.join(sizes[:3])} pixels: give frames of one size")
    return np.stack(images)


def described(name: str | Path, pixels: NDArray[Any]) -> dict[str, Any]:
    digest = hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()
    return {"data": str(name), "shape": list(pixels.shape), "sha256": digest}


# Numbers


def marked(pixels: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Where pictures [..., 3] are light, which marks an object."""
    light: NDArray[np.bool_] = pixels.mean(axis=-1) > 127
    return light


def example() -> TexturedObject:
    """The object that is built in."""
    return textured_object(0, RES, FRAMES, "test")


def signed(pixels: NDArray[np.uint8]) -> Tensor:
    """From 0 to 255 [..., height, width, 3] to -1 to 1 [..., 3, height, width]."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(pixels, -1, -3))).float() / 127.5 - 1


def eight_bit(frames: Any) -> NDArray[np.uint8]:
    """Back."""
    pixels = np.moveaxis(np.asarray(frames, dtype=np.float32), -3, -1)
    return ((pixels.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8)


def scaled(frames: Tensor, height: int, width: int) -> Tensor:
    """Frames [frames, 3, ...] in another size."""
    if frames.shape[-2:] == (height, width):
        return frames
    return F.interpolate(frames, (height, width), mode="bilinear", antialias=True).clamp(-1, 1)
