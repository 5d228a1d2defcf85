"""The input of what trains: clips of objects, where these are in them, and their plain twins where they are known."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lamella.data import Reader
from lamella.errors import CalibrationError, MethodError
from lamella.methods.refacade.base import Base
from lamella.methods.refacade.clips import Clip, of_object
from lamella.methods.refacade.frames import PICTURES, TEXTURED, VIDEOS, Frames, Masks, scaled, signed
from lamella.methods.refacade.jigsaw import WHITE
from lamella.methods.refacade.nano import SIDE
from lamella.methods.refacade.objects import objects
from lamella.methods.refacade.recipe import transfer_sample
from lamella.methods.refacade.remover import TextureRemover
from lamella.reading import check_in_folder
from lamella.signature import Fixture

MASK, PLAIN = ".mask", ".untextured"


@dataclass(frozen=True, eq=False)
class Objects:
    """Clips of objects.

    Attributes:
        clips: all of one length.
        said: what provenance says of them.
    """

    metavar = "OBJECTS"
    told = (
        "textured, which are made by chance; or a folder of pictures or clips NAME, each with NAME.mask and, for the "
        "remover, NAME.untextured beside it"
    )
    default = TEXTURED
    example = Fixture(TEXTURED, settings={"count": 4, "frames": 2})

    clips: tuple[Clip, ...]
    said: dict[str, Any]

    @classmethod
    def open(cls, name: str | Path, reader: Reader, *, count: int = 1200, frames: int = 1) -> Objects:
        """Read clips.

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
        if str(name) == TEXTURED:
            part = "test" if reader.split == "test" else "train"
            drawn = objects(part, reader.seed, SIDE, frames)  # type: ignore[arg-type]
            clips = tuple(map(of_object, islice(drawn, count)))
        else:
            clips = tuple(islice(_folder(Path(name), frames), count))
        digest = hashlib.sha256()
        for clip in clips:
            for each in (clip.frames, clip.mask, clip.plain):
                digest.update(b"" if each is None else each.numpy().tobytes())
        said = {"data": str(name), "clips": len(clips), "frames": frames, "sha256": digest.hexdigest()}
        return cls(clips, said)

    def describe(self) -> dict[str, Any]:
        """What provenance says of them."""
        return dict(self.said)

    def __len__(self) -> int:
        return len(self.clips)

    def fitted(self, base: Base) -> list[Clip]:
        """The clips in one size that a base takes.

        Raises:
            CalibrationError: for an object that is too small for that.
            MethodError: for a number of frames that its autoencoder does not take.
        """
        frames = len(self.clips[0].frames)
        if (frames - 1) % base.temporal:
            raise MethodError(f"frames {frames}: {base.name} takes a multiple of {base.temporal} and one more")
        size = base.size_for(*self.clips[0].frames.shape[-2:])
        found = []
        for each in self.clips:
            mask = each.mask if each.mask.shape[-2:] == size else F.interpolate(each.mask, size, mode="nearest-exact")
            if not mask[0].any():
                scale = "{} x {}".format(*size)
                raise CalibrationError(f"{each.name}: in {scale} pixels nothing is left of its object: crop it")
            plain = None if each.plain is None else scaled(each.plain, *size)
            found.append(Clip(scaled(each.frames, *size), mask, plain, each.name))
        return found


def _folder(folder: Path, frames: int) -> Iterator[Clip]:
    if not folder.is_dir():
        raise CalibrationError(f"no objects '{folder}': give {TEXTURED}, or a folder of clips with masks")
    found = [_not_linked(each) for each in sorted(folder.iterdir()) if _is_clip(each)]
    if not found:
        raise CalibrationError(f"{folder} holds no clips: give pictures, folders of frames or videos")
    for path in found:
        clip, marks = Frames.open(path), _beside(path, MASK)
        if marks is None:
            raise CalibrationError(f"{path} has no {_stem(path)}{MASK} beside it: say where its object is")
        mask = Masks.open(marks)
        if len(clip.pixels) < frames:
            raise CalibrationError(
                f"{path}: {len(clip.pixels)} frames of {frames}: give longer clips, or fewer --frames"
            )
        where = mask.fitted(clip, *clip.pixels.shape[1:3])[:frames]
        if not where[0].any():
            raise CalibrationError(
                f"{marks}: no object in the first frame, which is the reference: begin where it is seen"
            )
        twin = _beside(path, PLAIN)
        plain = None if twin is None else signed(one_sized(Frames.open(twin), clip, twin))[:frames]
        yield Clip(signed(clip.pixels)[:frames], where, plain, str(path))


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


def foregrounds(base: Base, clips: Sequence[Clip]) -> list[dict[str, Tensor]]:
    """What a student learns from: latents of foregrounds alone."""
    return [{"foreground": base.encode(clip.frames * clip.mask).cpu()} for clip in clips]


def removal_samples(base: Base, clips: Sequence[Clip]) -> list[dict[str, Tensor]]:
    """What the remover learns from: latents of foregrounds and of their plain twins.

    Raises:
        CalibrationError: for a clip whose plain twin is not known.
    """
    found = []
    for clip, seen in zip(clips, foregrounds(base, clips), strict=True):
        if clip.plain is None:
            raise CalibrationError(f"{clip.name} without {PLAIN} beside it: render each in plain grey, too")
        found.append({**seen, "untextured": base.encode(clip.plain * clip.mask).cpu()})
    return found


def transfer_samples(
    base: Base, remover: TextureRemover, clips: Sequence[Clip], dilate: int = 3, seed: int = 0
) -> list[dict[str, Tensor]]:
    """What the branch learns from; the remover says what the objects are without texture.

    Args:
        dilate: r, of the hole.
        seed: of the remover's noise.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for clip in clips:
        z_unt = remover.removed(base.encode(clip.frames * clip.mask)[None], generator)[0]
        first, where = clip.frames[0], clip.mask[0]
        own = (torch.where(where > 0, first, WHITE), where)
        found.append(transfer_sample(base, clip.frames, clip.mask, z_unt, own, dilate))
    return found
