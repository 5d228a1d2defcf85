"""Clips are decoded when they are asked for, and their latents are computed once."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from lamella.data import InputContext
from lamella.data.images import ImageInfo
from lamella.errors import CalibrationError
from lamella.files import Work
from lamella.methods.refacade import Base, Objects, TextureRemover, datasets, removal_samples, transfer_samples
from lamella.methods.refacade.datasets import foregrounds, latents
from lamella.methods.refacade.frames import Frames, check_frames

from .pipelines import pixels
from .test_inputs import clip_folder, image_file


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that Pillow has decoded."""
    found: list[str] = []
    load = ImageFile.ImageFile.load

    def counted(self: Any) -> Any:
        if self.tile:  # not decoded yet
            found.append(Path(getattr(self.fp, "name", "")).parent.name)
        return load(self)

    monkeypatch.setattr(ImageFile.ImageFile, "load", counted)
    return found


def test_opening_clips_decodes_the_first_mask_of_each_alone(decoded: list[str], tmp_path: Path) -> None:
    found = Objects.open(clip_folder(tmp_path), InputContext(), frames=3)
    assert decoded == ["0.mask", "1.mask"] and len(found) == 2
    decoded.clear()
    found.clips[1:]
    assert not decoded
    assert found.clips[1].frames.shape == (3, 3, 40, 40) and "1" in decoded and "0" not in decoded


def test_a_clip_is_resized_frame_by_frame_as_far_as_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, noise = tmp_path / "clips", np.random.default_rng(0)
    for name in ("a", "a.mask", "a.untextured"):
        (root / name).mkdir(parents=True)
        for number in range(8):
            pixels_ = noise.integers(128, 256, (60, 40, 3), dtype=np.uint8)
            image_file(root / name / f"{number}.png", pixels_)
    read, alive, most = datasets.read_frames, [], []

    def watched(path: Path) -> Any:
        for image in read(path):
            alive.append(weakref.ref(image))
            most.append(sum(each() is not None for each in alive))
            yield image
            del image

    found = Objects.open(root, InputContext(), frames=5)
    base = replace(pixels(), name="small")
    monkeypatch.setattr(Base, "area", 24 * 16)
    whole = found.clips[0]
    fitted = found.fitted(base)
    monkeypatch.setattr(datasets, "read_frames", watched)
    clip = fitted[0]
    assert clip.frames.shape == (5, 3, 24, 16) and clip.mask.shape == (5, 1, 24, 16)
    assert len(alive) == 15 and max(most) <= 2  # the one before may still be a local variable
    for ours, theirs in zip(clip[:3], whole.fitted(24, 16)[:3], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_masks_of_another_number_than_frames_are_refused_at_opening(tmp_path: Path) -> None:
    root = clip_folder(tmp_path)
    (root / "0.mask" / "2.png").unlink()
    with pytest.raises(CalibrationError, match=r"0\.mask: 2 masks for 3 frames: give one for all, or one per frame"):
        Objects.open(root, InputContext(), frames=1)


def test_clips_are_the_same_at_each_access(tmp_path: Path) -> None:
    for found in (
        Objects.open(clip_folder(tmp_path), InputContext(), frames=3),
        Objects.open("textured", InputContext(), count=3),
    ):
        for one, other in zip(found.clips, found.clips, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one[:3], other[:3], strict=True))


def test_what_only_decoding_shows_is_refused_by_name(tmp_path: Path) -> None:
    root = clip_folder(tmp_path)
    image_file(root / "1.untextured" / "0.png", np.zeros((8, 8, 3), np.uint8))
    found = Objects.open(root, InputContext(), frames=3)
    with pytest.raises(CalibrationError, match=r"1\.untextured: 8 x 8 pixels, the clip's first frame 40 x 40") as error:
        removal_samples(pixels(), found.fitted(pixels()))
    assert "\n" not in str(error.value)
    for frame in range(3):
        image_file(root / "1.mask" / f"{frame}.png", np.full((8, 8, 3), 255, np.uint8))
    with pytest.raises(CalibrationError, match=r"1\.mask: 8 x 8 pixels, the clip's first frame 40 x 40"):
        latents(pixels(), Objects.open(root, InputContext(), frames=3).clips)


@pytest.mark.parametrize("kind", ["gif", "webp", "mp4", "mkv", "folder"])
def test_frames_are_counted_without_decoding_them(kind: str, decoded: list[str], tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    file = tmp_path / ("clip" if kind == "folder" else f"clip.{kind}")
    if kind in ("mp4", "mkv"):
        av = pytest.importorskip("av")
        with av.open(file, "w") as video:
            stream = video.add_stream("mpeg4", rate=8)
            stream.width = stream.height = 16
            for frame in noise:
                video.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            video.mux(stream.encode())
    elif kind == "folder":
        file.mkdir()
        for number, frame in enumerate(noise):
            image_file(file / f"{number}.png", frame)
    else:
        first, *others = (Image.fromarray(frame) for frame in noise)
        first.save(file, save_all=True, append_images=others)
    decoded.clear()
    assert check_frames(file).frames == 5 and not decoded
    assert len(Frames.open(file).pixels) == 5


def test_fewer_frames_than_a_header_declares_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "check_frames", lambda path: ImageInfo(b"", 9))
    found = Objects.open(clip_folder(tmp_path), InputContext(), frames=5)
    with pytest.raises(CalibrationError, match=r"clips/0: 3 of 5 frames: give longer clips"):
        _ = found.clips[0]


class Stopped(Exception):
    pass


def test_latents_are_the_direct_ones_and_reused_after_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, objects = pixels(), Objects.open("textured", InputContext(), count=5, frames=2)
    torch.manual_seed(1)
    remover = TextureRemover.fresh(base).eval()
    monkeypatch.setattr(datasets, "AT_ONCE", 2)
    whole = transfer_samples(base, remover, objects.clips, seed=3)
    encode, calls = Base.encode, []

    def counted(self: Base, frames: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3 * 3:  # three of a clip: in the third
            raise Stopped
        return encode(self, frames)

    monkeypatch.setattr(Base, "encode", counted)
    with pytest.raises(Stopped):
        transfer_samples(base, remover, objects.clips, seed=3, work=Work(tmp_path))
    assert (tmp_path / "transfer" / "000000.safetensors").is_file()
    calls[:] = [1] * 100
    found = transfer_samples(base, remover, objects.clips, seed=3, work=Work(tmp_path))
    assert len(calls) == 100 + 3 * 3, "the first two clips are not encoded again"
    for one, other in zip(found, whole, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    for clip, seen, bare in zip(
        objects.clips, latents(base, objects.clips), foregrounds(base, objects.clips), strict=True
    ):
        torch.testing.assert_close(seen, encode(base, clip.frames), atol=1e-6, rtol=0)
        torch.testing.assert_close(bare["foreground"], encode(base, clip.frames * clip.mask), atol=1e-6, rtol=0)
