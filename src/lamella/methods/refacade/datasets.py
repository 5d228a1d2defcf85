"""Training data: clips of objects, masks of the objects in them, and their untextured versions if known."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lamella.data import Encoded, InputContext, Lazy
from lamella.errors import CalibrationError, MethodError
from lamella.files import Work
from lamella.methods.refacade.base import Base
from lamella.methods.refacade.clips import Clip, of_object, resized
from lamella.methods.refacade.frames import (
    IMAGES,
    TEXTURED,
    VIDEOS,
    check_frames,
    light_pixels,
    read_frames,
    scaled,
    to_float,
)
from lamella.methods.refacade.jigsaw import WHITE
from lamella.methods.refacade.nano import SIDE
from lamella.methods.refacade.objects import Part, nth_object
from lamella.methods.refacade.recipe import transfer_sample
from lamella.methods.refacade.remover import TextureRemover
from lamella.plan import fingerprint
from lamella.reading import check_in_folder
from lamella.signature import Fixture
from lamella.train.supervised import stacked

MASK, PLAIN = ".mask", ".untextured"
AT_ONCE = 16  # clips per file of latents


Encode = Callable[[Clip, int], dict[str, Tensor]]  # from a clip and its index to a training sample


@dataclass(frozen=True, eq=False)
class Objects:
    """Clips of objects.

    Opening a folder decodes one mask of each clip. Clips are decoded on access, frame by frame, and resized at once.

    Attributes:
        read: reads a clip in a size, from its index and (height, width); in its own size from None.
        masks: mask of the first frame of each clip [1, 1, height, width].
        metadata: description for the provenance.
    """

    metavar = "OBJECTS"
    source_help = (
        "textured, random synthetic objects; or a folder of images or clips NAME, each with NAME.mask and, for the "
        "remover, NAME.untextured"
    )
    default = TEXTURED
    example = Fixture(TEXTURED, settings={"count": 4, "frames": 2})

    read: Callable[[int, tuple[int, int] | None], Clip]
    masks: Sequence[Tensor]
    metadata: dict[str, Any]

    @property
    def clips(self) -> Sequence[Clip]:
        """The clips, all of one length, in their own sizes."""
        return Lazy(range(len(self)), lambda index: self.read(index, None))

    @classmethod
    def open(cls, name: str | Path, context: InputContext, *, count: int = 1200, frames: int = 1) -> Objects:
        """Open clips.

        Args:
            name: ``textured``, random synthetic clips (test clips are never trained on), or a folder of images, folders
                of frames or videos.
            context: the split and the seed.
            count: maximum number of clips.
            frames: number of frames of each clip, from its start.

        Raises:
            CalibrationError: for a missing or damaged file, a missing mask, an empty one of the first frame, or too few
                frames.
        """
        if count < 1 or frames < 1:
            raise CalibrationError(f"count {count}, frames {frames}: give at least 1")
        digest = hashlib.sha256()
        if str(name) == TEXTURED:
            part: Part = "test" if context.split == "test" else "train"

            def read(index: int, size: tuple[int, int] | None) -> Clip:
                clip = of_object(nth_object(index, part, context.seed, SIDE, frames))
                return clip if size is None else clip.fitted(*size)

            masks = Lazy(range(count), lambda index: read(index, None).mask[:1])
            digest.update(f"{part} {context.seed} {SIDE}".encode())
        else:
            files = list(islice(_folder(Path(name)), count))
            for each in files:
                digest.update(each.check(frames))
            masks = Lazy(files, ClipFiles.first_mask)

            def read(index: int, size: tuple[int, int] | None) -> Clip:
                return files[index].read(frames, size)

        metadata = {"data": str(name), "clips": len(masks), "frames": frames, "sha256": digest.hexdigest()}
        return cls(read, masks, metadata)

    def describe(self) -> dict[str, Any]:
        """Return the description for the provenance."""
        return dict(self.metadata)

    def __len__(self) -> int:
        return len(self.masks)

    def fitted(self, base: Base) -> Sequence[Clip]:
        """Return the clips in one size that a base supports.

        Raises:
            CalibrationError: for an object that is too small for that.
            MethodError: for a number of frames that its autoencoder does not support.
        """
        frames, own = self.metadata["frames"], self.masks[0].shape[-2:]
        if (frames - 1) % base.temporal:
            raise MethodError(f"frames {frames}: {base.name} needs a multiple of {base.temporal} plus one")
        size = base.size_for(*own)
        if size != own:
            for index, mask in enumerate(self.masks):
                if not resized(mask, *size).any():
                    scale = "{} x {}".format(*size)
                    name = self.read(index, size).name
                    raise CalibrationError(f"{name}: in {scale} pixels its object vanishes: crop the clip")
        return Lazy(range(len(self)), lambda index: self.read(index, size))


class ClipFiles(NamedTuple):
    """The files of a clip.

    Attributes:
        clip: an image, a folder of frames or a video.
        mask: mask of the object.
        plain: its untextured version, if there is one.
    """

    clip: str
    mask: str
    plain: str | None

    def check(self, frames: int) -> bytes:
        """Check the number of frames and the first mask; the rest is decoded when the clip is read.

        Returns:
            The SHA-256 of all files.

        Raises:
            CalibrationError: for too few frames, a damaged mask, or an empty one of the first frame.
        """
        clip, mask, *others = (check_frames(Path(each)) for each in self if each is not None)
        self.check_length(clip.frames, frames)
        if mask.frames not in (1, clip.frames):
            counts = f"{mask.frames} masks for {clip.frames} frames"
            raise CalibrationError(f"{self.mask}: {counts}: give one for all, or one per frame")
        if not self.first_mask().any():
            raise CalibrationError(
                f"{self.mask}: no object in the first frame, which is the reference: start where it is visible"
            )
        return b"".join(each.digest for each in (clip, mask, *others))

    def check_length(self, found: int, frames: int) -> None:
        """Raise a :class:`CalibrationError` if the clip has too few frames.

        Args:
            found: number of frames of the clip.
            frames: number of frames needed.
        """
        if found < frames:
            raise CalibrationError(f"{self.clip}: {found} of {frames} frames: give longer clips, or fewer --frames")

    def first_mask(self) -> Tensor:
        """Decode the mask of the first frame only [1, 1, height, width]."""
        return torch.from_numpy(light_pixels(next(read_frames(Path(self.mask)))[..., :3]))[None, None].float()

    def read(self, frames: int, size: tuple[int, int] | None) -> Clip:
        """Decode the clip, its mask and its untextured version, one frame after the other.

        Args:
            frames: number of frames.
            size: height and width of the result; None for the clip's own.

        Raises:
            CalibrationError: for damaged files, or different sizes.
        """
        own: tuple[int, ...] = ()  # size of the first frame

        def decoded(path: str) -> Iterator[NDArray[np.uint8]]:
            nonlocal own
            for image in islice(read_frames(Path(path)), frames):
                own = own or image.shape[:2]
                if image.shape[:2] != own:
                    ours, first = ("{} x {}".format(*each) for each in (image.shape, own))
                    raise CalibrationError(f"{path}: {ours} pixels, the clip's first frame {first}: give one size")
                yield image[..., :3]

        shown = [scaled(to_float(image)[None], *(size or own)) for image in decoded(self.clip)]
        self.check_length(len(shown), frames)  # a header may declare more frames than the file has
        masks = [torch.from_numpy(light_pixels(image))[None, None].float() for image in decoded(self.mask)]
        if len(masks) not in (1, frames):
            raise CalibrationError(f"{self.mask}: {len(masks)} masks for {frames} frames: give one per frame")
        where = torch.cat([resized(each, *(size or own)) for each in masks]).expand(frames, -1, -1, -1)
        plain = None
        if self.plain is not None:
            plain = torch.cat([scaled(to_float(image)[None], *(size or own)) for image in decoded(self.plain)])
            if len(plain) < frames:
                raise CalibrationError(f"{self.plain}: {len(plain)} of {frames} frames: give as many as the clip has")
        return Clip(torch.cat(shown), where, plain, self.clip)


def _folder(folder: Path) -> Iterator[ClipFiles]:
    if not folder.is_dir():
        raise CalibrationError(f"no objects '{folder}': give {TEXTURED}, or a folder of clips with masks")
    found = [_not_linked(each) for each in sorted(folder.iterdir()) if _is_clip(each)]
    if not found:
        raise CalibrationError(f"{folder} holds no clips: give images, folders of frames or videos")
    for path in found:
        mask, plain = _companion(path, MASK), _companion(path, PLAIN)
        if mask is None:
            raise CalibrationError(f"{path} has no {_stem(path)}{MASK}: give a mask of its object")
        yield ClipFiles(str(path), str(mask), None if plain is None else str(plain))


def _is_clip(path: Path) -> bool:
    known = path.is_dir() or path.suffix.lower() in (*IMAGES, *VIDEOS)
    return known and not path.name.startswith(".") and not _stem(path).endswith((MASK, PLAIN))


def _not_linked(path: Path) -> Path:
    """Return a path in a folder after checking that it is no symbolic link."""
    return path if path.is_dir() and not path.is_symlink() else check_in_folder(path)


def _stem(path: Path) -> str:
    return path.name if path.is_dir() else path.stem


def _companion(path: Path, ending: str) -> Path | None:
    """Return the companion of a clip: ``a.mask.png`` of ``a.png``, a folder ``a.mask`` of ``a``."""
    names = [f"{_stem(path)}{ending}{suffix}" for suffix in ("", *IMAGES, *VIDEOS)]
    return next((_not_linked(path.parent / name) for name in names if (path.parent / name).exists()), None)


def latents(base: Base, clips: Sequence[Clip], work: Work = Work(), depends: Any = None) -> Sequence[Tensor]:
    """Encode clips to latents.

    Args:
        base: the video transformer.
        clips: the clips.
        work: folder from which an interrupted run resumes.
        depends: JSON values that identify the clips.
    """
    found = _encode(base, clips, lambda clip, _: {"clean": base.encode(clip.frames)}, work, "latents", depends)
    return found.column("clean")


def foregrounds(
    base: Base, clips: Sequence[Clip], work: Work = Work(), depends: Any = None
) -> Sequence[dict[str, Tensor]]:
    """Encode foregrounds, the training samples of a student; see :func:`latents`."""
    return _encode(base, clips, lambda clip, _: _foreground(base, clip), work, "foregrounds", depends)


def removal_samples(
    base: Base, clips: Sequence[Clip], work: Work = Work(), depends: Any = None
) -> Sequence[dict[str, Tensor]]:
    """Encode foregrounds and untextured versions, the training samples of the remover; see :func:`latents`.

    Raises:
        CalibrationError: for a clip without an untextured version.
    """

    def encode(clip: Clip, _: int) -> dict[str, Tensor]:
        if clip.plain is None:
            raise CalibrationError(f"{clip.name} has no {PLAIN}: render each clip in plain grey as well")
        return {**_foreground(base, clip), "untextured": base.encode(clip.plain * clip.mask)}

    return _encode(base, clips, encode, work, "removal", depends)


def transfer_samples(
    base: Base,
    remover: TextureRemover,
    clips: Sequence[Clip],
    dilate: int = 3,
    seed: int = 0,
    work: Work = Work(),
    depends: Any = None,
) -> Sequence[dict[str, Tensor]]:
    """Encode the training samples of the branch; the remover provides the untextured objects.

    Args:
        base: the video transformer.
        remover: the texture remover.
        clips: the clips.
        dilate: r, the dilation of the hole in pixels.
        seed: random seed of the remover's noise.
        work: see :func:`latents`.
        depends: see :func:`latents`.
    """
    generator, noise_drawn = torch.Generator().manual_seed(seed), 0

    def encode(clip: Clip, index: int) -> dict[str, Tensor]:
        nonlocal noise_drawn
        z_fg = _foreground(base, clip)["foreground"][None]
        for _ in range(noise_drawn, index):  # skip the noise of clips that an earlier run has encoded
            torch.randn(z_fg.shape, generator=generator)
        noise_drawn = index + 1
        z_unt = remover.remove_texture(z_fg, generator)[0]
        first, where = clip.frames[0], clip.mask[0]
        own = (torch.where(where > 0, first, WHITE), where)
        return transfer_sample(base, clip.frames, clip.mask, z_unt, own, dilate)

    identity = [fingerprint.state(remover), remover.steps, dilate, seed, depends]
    return _encode(base, clips, encode, work, "transfer", identity)


def _foreground(base: Base, clip: Clip) -> dict[str, Tensor]:
    return {"foreground": base.encode(clip.frames * clip.mask)}


def _encode(base: Base, clips: Sequence[Clip], encode: Encode, work: Work, name: str, depends: Any) -> Encoded:
    """Encode clips one at a time, since a batch of decoded clips may exceed the memory."""

    def rows(indices: list[int]) -> Mapping[str, Tensor]:
        return stacked([encode(clips[index], index) for index in indices])

    identity = [base.encoder_digest, base.token, base.area, depends]
    return Encoded.of(range(len(clips)), rows, work, name, identity, AT_ONCE)
