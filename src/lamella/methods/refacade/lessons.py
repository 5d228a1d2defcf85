"""The input of what trains: clips of objects, where these are in them, and their plain twins where they are known."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lamella.data import Encoded, InputContext, Lazy
from lamella.errors import CalibrationError, MethodError
from lamella.files import Work
from lamella.methods.refacade.base import Base
from lamella.methods.refacade.clips import Clip, of_object, resized
from lamella.methods.refacade.frames import (
    PICTURES,
    TEXTURED,
    VIDEOS,
    Frames,
    Masks,
    checked,
    marked,
    read,
    signed,
)
from lamella.methods.refacade.jigsaw import WHITE
from lamella.methods.refacade.nano import SIDE
from lamella.methods.refacade.objects import Part, numbered
from lamella.methods.refacade.recipe import transfer_sample
from lamella.methods.refacade.remover import TextureRemover
from lamella.plan import fingerprint
from lamella.reading import check_in_folder
from lamella.signature import Fixture
from lamella.train.supervised import stacked

MASK, PLAIN = ".mask", ".untextured"
AT_ONCE = 16  # clips whose latents are in one file


Encode = Callable[[Clip, int], dict[str, Tensor]]  # from a clip and its number to what is learnt from it


@dataclass(frozen=True, eq=False)
class Objects:
    """Clips of objects.

    Opening a folder decodes one mask of each clip. Clips are decoded when they are asked for.

    Attributes:
        clips: all of one length.
        masks: of the first frame of each clip [1, 1, height, width].
        said: what provenance says of them.
    """

    metavar = "OBJECTS"
    source_help = (
        "textured, which are made by chance; or a folder of pictures or clips NAME, each with NAME.mask and, for the "
        "remover, NAME.untextured beside it"
    )
    default = TEXTURED
    example = Fixture(TEXTURED, settings={"count": 4, "frames": 2})

    clips: Sequence[Clip]
    masks: Sequence[Tensor]
    said: dict[str, Any]

    @classmethod
    def open(cls, name: str | Path, context: InputContext, *, count: int = 1200, frames: int = 1) -> Objects:
        """Open clips.

        Args:
            name: ``textured``, made by chance (those for testing are never trained on), or a folder of pictures,
                folders of frames or videos.
            count: at most so many clips.
            frames: of each clip, from its beginning.

        Raises:
            CalibrationError: for what is missing or damaged, has no mask, an empty one of its first frame, or too few
                frames.
        """
        if count < 1 or frames < 1:
            raise CalibrationError(f"count {count}, frames {frames}: give at least 1")
        digest = hashlib.sha256()
        if str(name) == TEXTURED:
            part: Part = "test" if context.split == "test" else "train"
            clips = Lazy(range(count), lambda number: of_object(numbered(number, part, context.seed, SIDE, frames)))
            masks = Lazy(clips, lambda clip: clip.mask[:1])
            digest.update(f"{part} {context.seed} {SIDE}".encode())
        else:
            files = list(islice(_folder(Path(name)), count))
            for each in files:
                digest.update(each.check(frames))
            clips, masks = Lazy(files, lambda each: each.read(frames)), Lazy(files, ClipFiles.first_mask)
        said = {"data": str(name), "clips": len(clips), "frames": frames, "sha256": digest.hexdigest()}
        return cls(clips, masks, said)

    def describe(self) -> dict[str, Any]:
        """What provenance says of them."""
        return dict(self.said)

    def __len__(self) -> int:
        return len(self.clips)

    def fitted(self, base: Base) -> Sequence[Clip]:
        """The clips in one size that a base takes.

        Raises:
            CalibrationError: for an object that is too small for that.
            MethodError: for a number of frames that its autoencoder does not take.
        """
        first = self.clips[0]
        if (len(first.frames) - 1) % base.temporal:
            raise MethodError(
                f"frames {len(first.frames)}: {base.name} takes a multiple of {base.temporal} and one more"
            )
        size = base.size_for(*first.frames.shape[-2:])
        if size != first.frames.shape[-2:]:
            for number, mask in enumerate(self.masks):
                if not resized(mask, *size).any():
                    scale = "{} x {}".format(*size)
                    name = self.clips[number].name
                    raise CalibrationError(f"{name}: in {scale} pixels nothing is left of its object: crop it")
        return Lazy(self.clips, lambda clip: clip.fitted(*size))


class ClipFiles(NamedTuple):
    """The files of a clip.

    Attributes:
        clip: a picture, a folder of frames or a video.
        mask: where the object is in it.
        plain: its plain twin, where there is one.
    """

    clip: str
    mask: str
    plain: str | None

    def check(self, frames: int) -> bytes:
        """Check the number of frames and the first mask; the rest is decoded when the clip is read.

        Returns:
            The SHA-256 of all files.

        Raises:
            CalibrationError: for too few frames, a damaged mask, or one without an object in the first frame.
        """
        clip, *others = (checked(Path(each)) for each in self if each is not None)
        self.check_length(clip.frames, frames)
        if not self.first_mask().any():
            raise CalibrationError(
                f"{self.mask}: no object in the first frame, which is the reference: begin where it is seen"
            )
        return b"".join(each.digest for each in (clip, *others))

    def check_length(self, found: int, frames: int) -> None:
        """Raise an error for too few frames."""
        if found < frames:
            raise CalibrationError(f"{self.clip}: {found} frames of {frames}: give longer clips, or fewer --frames")

    def first_mask(self) -> Tensor:
        """The mask of the first frame [1, 1, height, width]; nothing else is decoded."""
        return torch.from_numpy(marked(next(read(Path(self.mask)))[..., :3]))[None, None].float()

    def read(self, frames: int) -> Clip:
        """Decode the clip, its mask and its twin.

        Raises:
            CalibrationError: for what is damaged, or of other sizes.
        """
        clip, mask = Frames.open(self.clip), Masks.open(self.mask)
        self.check_length(len(clip.pixels), frames)  # a header may declare more than there is
        try:
            where = mask.fitted(clip, *clip.pixels.shape[1:3])[:frames]
        except CalibrationError as error:
            raise CalibrationError(f"{self.mask}: {error}") from None
        plain = None
        if self.plain is not None:
            plain = signed(one_sized(Frames.open(self.plain), clip, Path(self.plain)))[:frames]
        return Clip(signed(clip.pixels)[:frames], where, plain, self.clip)


def _folder(folder: Path) -> Iterator[ClipFiles]:
    if not folder.is_dir():
        raise CalibrationError(f"no objects '{folder}': give {TEXTURED}, or a folder of clips with masks")
    found = [_not_linked(each) for each in sorted(folder.iterdir()) if _is_clip(each)]
    if not found:
        raise CalibrationError(f"{folder} holds no clips: give pictures, folders of frames or videos")
    for path in found:
        mask, plain = _beside(path, MASK), _beside(path, PLAIN)
        if mask is None:
            raise CalibrationError(f"{path} has no {_stem(path)}{MASK} beside it: say where its object is")
        yield ClipFiles(str(path), str(mask), None if plain is None else str(plain))


def one_sized(twin: Frames, clip: Frames, path: Path) -> Any:
    """The pixels of a clip's twin.

    Raises:
        CalibrationError: when they are not as many.
    """
    if twin.pixels.shape != clip.pixels.shape:
        raise CalibrationError(f"{path}: pixels {list(twin.pixels.shape)}, its clip {list(clip.pixels.shape)}")
    return twin.pixels


def _is_clip(path: Path) -> bool:
    known = path.is_dir() or path.suffix.lower() in (*PICTURES, *VIDEOS)
    return known and not path.name.startswith(".") and not _stem(path).endswith((MASK, PLAIN))


def _not_linked(path: Path) -> Path:
    """A file or a folder in a folder, which is checked not to be a link."""
    return path if path.is_dir() and not path.is_symlink() else check_in_folder(path)


def _stem(path: Path) -> str:
    return path.name if path.is_dir() else path.stem


def _beside(path: Path, ending: str) -> Path | None:
    """What belongs to a clip: ``a.mask.png`` of ``a.png``, a folder ``a.mask`` of ``a``."""
    names = [f"{_stem(path)}{ending}{suffix}" for suffix in ("", *PICTURES, *VIDEOS)]
    return next((_not_linked(path.parent / name) for name in names if (path.parent / name).exists()), None)


def latents(base: Base, clips: Sequence[Clip], work: Work = Work(), depends: Any = None) -> Sequence[Tensor]:
    """The latents of clips.

    Args:
        work: where an interrupted run finds what it has encoded.
        depends: JSON values that say which clips these are.
    """
    found = _encoded(base, clips, lambda clip, _: {"clean": base.encode(clip.frames)}, work, "latents", depends)
    return found.column("clean")


def foregrounds(
    base: Base, clips: Sequence[Clip], work: Work = Work(), depends: Any = None
) -> Sequence[dict[str, Tensor]]:
    """What a student learns from: latents of foregrounds alone; see :func:`latents`."""
    return _encoded(base, clips, lambda clip, _: _foreground(base, clip), work, "foregrounds", depends)


def removal_samples(
    base: Base, clips: Sequence[Clip], work: Work = Work(), depends: Any = None
) -> Sequence[dict[str, Tensor]]:
    """What the remover learns from: latents of foregrounds and of their plain twins; see :func:`latents`.

    Raises:
        CalibrationError: for a clip whose plain twin is not known.
    """

    def encode(clip: Clip, _: int) -> dict[str, Tensor]:
        if clip.plain is None:
            raise CalibrationError(f"{clip.name} without {PLAIN} beside it: render each in plain grey, too")
        return {**_foreground(base, clip), "untextured": base.encode(clip.plain * clip.mask)}

    return _encoded(base, clips, encode, work, "removal", depends)


def transfer_samples(
    base: Base,
    remover: TextureRemover,
    clips: Sequence[Clip],
    dilate: int = 3,
    seed: int = 0,
    work: Work = Work(),
    depends: Any = None,
) -> Sequence[dict[str, Tensor]]:
    """What the branch learns from; the remover says what the objects are without texture.

    Args:
        dilate: r, of the hole.
        seed: of the remover's noise.
        work, depends: see :func:`latents`.
    """
    generator, drawn = torch.Generator().manual_seed(seed), 0

    def encode(clip: Clip, number: int) -> dict[str, Tensor]:
        nonlocal drawn
        z_fg = _foreground(base, clip)["foreground"][None]
        for _ in range(drawn, number):  # the noise of clips that an earlier run has encoded
            torch.randn(z_fg.shape, generator=generator)
        drawn = number + 1
        z_unt = remover.removed(z_fg, generator)[0]
        first, where = clip.frames[0], clip.mask[0]
        own = (torch.where(where > 0, first, WHITE), where)
        return transfer_sample(base, clip.frames, clip.mask, z_unt, own, dilate)

    told = [fingerprint.state(remover), remover.steps, dilate, seed, depends]
    return _encoded(base, clips, encode, work, "transfer", told)


def _foreground(base: Base, clip: Clip) -> dict[str, Tensor]:
    return {"foreground": base.encode(clip.frames * clip.mask)}


def _encoded(base: Base, clips: Sequence[Clip], encode: Encode, work: Work, name: str, depends: Any) -> Encoded:
    """Encode clips one at a time, since a batch of decoded clips may be larger than the memory."""

    def rows(numbers: list[int]) -> Mapping[str, Tensor]:
        return stacked([encode(clips[number], number) for number in numbers])

    told = [base.encoder_digest, base.token, base.area, depends]
    return Encoded.of(range(len(clips)), rows, work, name, told, AT_ONCE)
