"""Encodings of a data set for distillation: as direct ones, made once, and reused after a stop."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from lamella.data import CaptionedImages, InputContext
from lamella.files import Work
from lamella.methods.laptop_diff import Denoiser, encode_samples

from .pipelines import denoiser, digits


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> CaptionedImages:
    """150 images of three classes, whose names are the captions."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(150):
        place = folder / ("a", "b", "c")[number % 3]
        place.mkdir(exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 256, (16, 18, 3), dtype=np.uint8)
        Image.fromarray(noise).save(place / f"{number:03d}.png")
    return CaptionedImages.open(folder, InputContext())


@pytest.mark.parametrize("name", ["untrained", "text", "classes"])
def test_encodings_are_the_direct_ones(name: str, pictures: CaptionedImages, tmp_path: Path) -> None:
    whole, items = denoiser(name), pictures.items
    found = encode_samples(whole, pictures, Work(tmp_path))
    clean, conditions = whole.clean(items), whole.conditions(items)
    assert len(found) == len(items) == 120
    for row, sample in enumerate(found):
        assert sample.keys() == {"clean", *conditions}
        torch.testing.assert_close(sample["clean"], clean[row], atol=1e-6, rtol=0)
        for key, each in conditions.items():
            torch.testing.assert_close(sample[key], each[row], atol=1e-6, rtol=0)


def test_captions_and_images_are_encoded_in_small_batches(
    pictures: CaptionedImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, sizes = denoiser("text"), []
    kind, encode = type(whole.pipeline), type(whole.pipeline).encode_prompt
    monkeypatch.setattr(
        kind, "encode_prompt", lambda self, texts, *a, **k: (sizes.append(len(texts)), encode(self, texts, *a, **k))[1]
    )
    found = whole.conditions(pictures.items)["encoder_hidden_states"]
    assert sum(sizes) == len(found) == 120 and max(sizes) <= 16
    monkeypatch.undo()
    for row in (0, 16, 119):
        alone = whole.conditions(pictures.items[row : row + 1])["encoder_hidden_states"]
        torch.testing.assert_close(found[row : row + 1], alone, atol=1e-6, rtol=0)


def test_images_without_an_autoencoder_are_decoded_when_they_are_asked_for(
    pictures: CaptionedImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded, load = [], ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: (decoded.append(1), load(self))[1])
    found = encode_samples(denoiser("untrained"), pictures, Work(tmp_path))
    assert not decoded
    assert found[5]["clean"].shape == (1, 8, 8) and decoded


class Stopped(Exception):
    pass


def test_encodings_are_reused_after_a_stop(
    pictures: CaptionedImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, calls, clean = denoiser("text"), [], Denoiser.clean

    def counted(self: Denoiser, rows: list) -> torch.Tensor:  # type: ignore[type-arg]
        if len(calls) == 1 and not (tmp_path / "stopped").exists():
            (tmp_path / "stopped").touch()
            raise Stopped
        calls.append(len(rows))
        return clean(self, rows)

    monkeypatch.setattr(Denoiser, "clean", counted)
    with pytest.raises(Stopped):
        encode_samples(whole, pictures, Work(tmp_path / "work"))
    first = list(calls)
    found = encode_samples(whole, pictures, Work(tmp_path / "work"))
    assert sum(calls) == 120 and calls[: len(first)] == first, "each image is encoded once"
    monkeypatch.setattr(type(whole.pipeline), "encode_prompt", None)
    again = encode_samples(whole, pictures, Work(tmp_path / "work"))
    assert sum(calls) == 120
    for one, other in zip(found, again, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_other_data_is_encoded_by_itself(pictures: CaptionedImages, tmp_path: Path) -> None:
    whole = denoiser("text")
    encode_samples(whole, pictures, Work(tmp_path))
    found = encode_samples(whole, digits(), Work(tmp_path))
    torch.testing.assert_close(found[3]["clean"], whole.clean(digits().items[3:4])[0], atol=1e-6, rtol=0)
