"""Networks and pictures from folders that anyone may have made."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from tests.methods.iformer.conftest import vit
from timm.data import create_transform

from lamella.data import Captioned, InputContext
from lamella.errors import CalibrationError, CheckpointError, MethodError, TrainingError
from lamella.files import Work
from lamella.methods.iformer import Album, Geometry, IFormerClassifier, StageShape, Vision, iformer, train
from lamella.methods.iformer import vision as vision_file
from lamella.methods.iformer.recipe import new_network
from lamella.methods.iformer.textures import CLASSES, WORLDS, texture_image
from lamella.train import TrainConfig

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}
CONFIG = {"architecture": "vit_tiny_patch16_224", "num_classes": 20, "model_args": SIZES,
          "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7], "crop_pct": 0.8}}  # fmt: skip
NANO = StageShape(depths=(1, 1), widths=(16, 32), attention=(1, 3), head_dim=8)


def saved(folder: Path, **other: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | other))
    save_file(vit().state_dict(), folder / "model.safetensors")
    return folder


def test_a_timm_folder_opens_as_timm_itself_opens_it(tmp_path: Path) -> None:
    vision = Vision.open(saved(tmp_path / "model"))
    theirs = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(vision.model(x), theirs(x))
    assert (vision.size, vision.mean, vision.crop) == ((32, 32), (0.1, 0.2, 0.3), 0.8)


@pytest.mark.parametrize("crop", [1.0, 0.9, 0.8])
@pytest.mark.parametrize("size", [(32, 32), (16, 32)])
@pytest.mark.parametrize("side", [(32, 32), (40, 25)])
def test_pictures_are_cropped_and_scaled_as_timm_does_it(
    crop: float, size: tuple[int, int], side: tuple[int, int]
) -> None:
    pixels = np.array(Image.fromarray(texture_image(3, seed=0).image).resize(side[::-1], Image.Resampling.BICUBIC))
    vision = replace(Vision.of(vit()), size=size, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), crop=crop)
    theirs = create_transform((3, *size), interpolation="bicubic", mean=vision.mean, std=vision.std, crop_pct=crop)
    found, expected = vision.prepare([Captioned(pixels, "", 0)])[0], theirs(Image.fromarray(pixels))
    assert float((found - expected).abs().max()) <= 2.5 / 255 / 0.5  # Pillow rounds behind each of two passes
    if crop == 1.0 and side == size:
        torch.testing.assert_close(found, expected)


def test_another_size_interpolates_positions_and_keeps_how_pictures_are_scaled(tmp_path: Path) -> None:
    own, vision = Vision.open(saved(tmp_path / "model")), Vision.open(tmp_path / "model", size=48)
    assert vision.size == (48, 48) and vision.model(torch.randn(1, 3, 48, 48)).shape == (1, 20)
    assert (vision.mean, vision.std, vision.crop) == (own.mean, own.std, own.crop) == ((0.1, 0.2, 0.3), own.std, 0.8)


def test_an_iformer_takes_any_size_and_what_surgery_made_takes_its_own(tmp_path: Path) -> None:
    trained = new_network(NANO, 32, 3, 20).with_size(44)
    assert trained.prepare([texture_image(3, seed=0)]).shape == (1, 3, 44, 44)
    assert trained.logits([texture_image(3, seed=0)]).shape == (1, 20)
    ramped = iformer(Vision.of(vit()), Album.open("textures", InputContext(), count=20), share=0.9)
    with pytest.raises(MethodError, match="has another kind of attention"):
        ramped.vision.with_size(64)


def test_a_size_that_patches_do_not_divide_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "model")
    with pytest.raises(MethodError, match="has patches of 8 x 8: give a multiple") as error:
        Vision.open(tmp_path / "model", size=44)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "other",
    [
        {"architecture": "hf-hub:someone/model"},
        {"architecture": "no_such_model"},
        {"architecture": 3},
        {"model_args": SIZES | {"depth": 10**12}},
        {"model_args": SIZES | {"depth": 16000}},
        {"model_args": SIZES | {"embed_dim": 48, "num_heads": 6}},
        {"model_args": SIZES | {"checkpoint_path": "model.bin"}},
        {"model_args": SIZES | {"num_heads": 5}},
        {"num_classes": -3},
        {"pretrained_cfg": {"mean": ["x"]}},
        {"pretrained_cfg": {"crop_pct": 1e-9}},
    ],
)
def test_a_folder_that_claims_what_cannot_be_is_refused_in_one_line(tmp_path: Path, other: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="no vision transformer of timm") as error:
        Vision.open(saved(tmp_path / "model", **other))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224", "deit_tiny_distilled_patch16_224",
                                  "vit_base_patch16_rope_224", "vit_small_patch16_18x2_224"])  # fmt: skip
def test_models_that_are_no_plain_vision_transformer_are_refused_in_one_line(name: str) -> None:
    if not timm.is_model(name):
        pytest.skip(f"this timm has no {name}")
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(MethodError, match="not a timm vision transformer with plain attention") as error:
        Geometry.of(model, name)
    assert "\n" not in str(error.value)


def test_a_plain_one_with_another_activation_is_found_out_by_what_it_says() -> None:
    model = vit(act_layer="quick_gelu")
    geometry = Geometry.of(model)
    with pytest.raises(MethodError, match="rebuilding it gives other logits"):
        geometry.verify(model, "it")


def test_pictures_in_folders_have_the_class_of_their_folder_and_every_fifth_of_each_is_for_testing(
    tmp_path: Path,
) -> None:
    for number, name in enumerate(("cat", "ant", "bee")):
        (tmp_path / name).mkdir()
        for picture in range(5 if name == "ant" else 10):
            pixels = np.full((6, 4, 3), 10 * number + picture, np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{picture}.png")
    (tmp_path / "empty").mkdir()
    album = Album.open(tmp_path, InputContext())
    assert album.classes == 3 and len(album) == 20
    assert [each.label for each in album.items[:6]] == [0, 1, 2] * 2 and album.items[0].text == "ant"
    test = album.part("test")
    assert sorted(each.label for each in test.items) == [0, 1, 1, 2, 2]
    both = {each.image.tobytes() for each in album.items} & {each.image.tobytes() for each in test.items}
    assert not both
    assert [each.label for each in Album.open(tmp_path, InputContext(), count=4).items] == [0, 1, 2, 0]
    assert Album.open(tmp_path / "cat", InputContext()).classes == 0


def test_links_in_an_album_are_refused(tmp_path: Path) -> None:
    for name in ("album/ant", "album/bee", "secret"):
        (tmp_path / name).mkdir(parents=True)
        Image.fromarray(np.zeros((6, 4, 3), np.uint8)).save(tmp_path / name / "0.png")
        Image.fromarray(np.zeros((6, 4, 3), np.uint8)).save(tmp_path / name / "1.png")
    album = tmp_path / "album"
    for link, target in (("cat", "secret"), ("bee/2.png", "secret/0.png"), ("2.png", "secret/0.png")):
        (album / link).symlink_to(tmp_path / target)
        with pytest.raises(CalibrationError, match=f"{link}: links in a folder are not followed"):
            Album.open(album, InputContext())
        (album / link).unlink()
    assert len(Album.open(album, InputContext())) == 2


def test_folders_without_pictures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="holds no images"):
        Album.open(tmp_path, InputContext())
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "bad.png").write_bytes(b"no picture")
    (tmp_path / "one" / "worse.png").write_bytes(b"none either")
    with pytest.raises(CalibrationError, match=r"worse.png cannot be read"):
        Album.open(tmp_path, InputContext())
    with pytest.raises(CalibrationError, match="count 0"):
        Album.open("textures", InputContext(), count=0)


def test_textures_are_the_same_again_and_others_in_the_test_part() -> None:
    album = Album.open("textures", InputContext(), count=25)
    assert album.classes == CLASSES and [each.label for each in album.items[18:22]] == [18, 19, 0, 1]
    again, test = Album.open("textures", InputContext(), count=25), album.part("test")
    faint = Album.open("faint-textures", InputContext(), count=25)
    assert faint.part("test").describe()["data"] == "faint-textures" and faint.classes == CLASSES
    assert album.describe() == again.describe() and len(test) == 25
    assert all((a.image != b.image).any() for a, b in zip(album.items, test.items, strict=True))


@pytest.mark.parametrize("world", WORLDS)
def test_spots_lie_to_each_other_as_the_class_says(world: str) -> None:
    up, across = np.mgrid[-32:32, -32:32]
    ring = (np.hypot(up, across) > 10) & (np.hypot(up, across) < 20)
    for label in range(CLASSES):
        power = np.zeros((64, 64))
        for number in range(40):
            grey = texture_image(label, (1, number), world).image.mean(-1).clip(160) - 160  # what is bright
            power += np.abs(np.fft.fft2(grey, (64, 64))) ** 2
        lags = np.where(ring, np.fft.fftshift(np.fft.ifft2(power).real), 0)  # how far bright places are from each other
        place = np.unravel_index(lags.argmax(), lags.shape)
        angle = np.degrees(np.arctan2(-up[place], across[place])) % 180
        expected = {"beside": 0, "above": 90, "rising": 45, "falling": 135}[
            texture_image(label, 0, world).text.split()[-1]
        ]
        assert min((angle - expected) % 180, (expected - angle) % 180) < 15


@pytest.mark.slow
def test_a_network_is_trained_and_read_back_and_timm_takes_it(tmp_path: Path) -> None:
    images = Album.open("textures", InputContext(), count=60)
    done = train(
        images, shape=NANO, size=32, config=TrainConfig(steps=20, lr=3e-3, batch=20), work=Work(tmp_path / "w")
    )
    assert done.findings["loss"][-1] < done.findings["loss"][0]
    folder = tmp_path / "out"
    folder.mkdir()
    done.write(folder)
    again = IFormerClassifier.read(folder)
    x = done.vision.prepare(images.items[:2])
    assert torch.equal(again.vision.model(x), done.vision.model(x)) and again.shape == NANO
    document = json.loads((folder / "network.json").read_text())
    (folder / "network.json").write_text(json.dumps(document | {"shape": document["shape"] | {"widths": [16, 64]}}))
    with pytest.raises(CheckpointError, match="not a network of iformer"):
        Vision.open(folder)


def test_two_channels_are_refused() -> None:
    with pytest.raises(MethodError, match="channels 2: give 1 for greyscale images or 3 for colour"):
        train(Album.open("textures", InputContext(), count=20), shape=NANO, size=32, channels=2)


def test_pictures_without_classes_train_nothing() -> None:
    with pytest.raises(CalibrationError, match="have no classes"):
        train(Album.open("shapes", InputContext(), count=20), shape=NANO, size=32)


@pytest.mark.parametrize(
    "other",
    [{"shape": replace(NANO, pools=(1, 1))}, {"shape": replace(NANO, pools=(4, 1))}, {"drop_path": 0.1}],
)
def test_training_of_another_network_does_not_go_on_from_a_run(tmp_path: Path, other: dict[str, Any]) -> None:
    images = Album.open("textures", InputContext(), count=20)
    given = {"size": 32, "config": TrainConfig(steps=1, lr=1e-3, batch=8), "work": Work(tmp_path)}
    train(images, **({"shape": NANO} | given))
    with pytest.raises(TrainingError):
        train(images, **({"shape": NANO} | given | other))


def test_another_way_of_drawing_or_training_the_built_in_model_has_a_folder_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names: list[str] = []
    monkeypatch.setattr(vision_file, "build_once", lambda name, build, megabytes: names.append(name))
    for name, value in (("LOOKED_AT", 2000), ("LOOKED_AT", 1999), ("SMALL", {"depth": 2}), ("textures", texture_image),
                        ("textures", shuffled)):  # fmt: skip
        monkeypatch.setattr(vision_file, name, value)
        vision_file.built_in()
    assert names[0] != names[1] != names[2] == names[3] != names[4]


def shuffled() -> None:
    """Drawn elsewhere than the textures are."""
