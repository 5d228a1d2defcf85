"""Tests of the same decoder on images."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from lamella.data import InputContext
from lamella.errors import CalibrationError, MethodError
from lamella.files import Work
from lamella.methods.agile3d import (
    Click,
    ClickDecoder,
    ClickScene,
    ClickSegmenter,
    Scenes,
    Segmenter,
    SegmenterShape,
    Session,
    agile3d,
    judge,
    rooms,
)
from lamella.methods.agile3d.collages import collages
from lamella.methods.agile3d.images import ImageEncoder, image_scene
from lamella.methods.agile3d.judge import visible
from lamella.methods.agile3d.recipe import ClickLoss, ClickSimulation, augment_scene
from lamella.train import TrainConfig

timm = pytest.importorskip("timm")


@pytest.fixture(scope="module")
def model() -> ClickSegmenter:
    torch.manual_seed(0)
    return ClickSegmenter(ImageEncoder(channels=16), ClickDecoder(2, 16, 2, 32, layers=2, background=3)).eval()


def test_a_token_has_the_features_of_its_cell(model: ClickSegmenter) -> None:
    random = np.random.default_rng(0)
    image = random.integers(0, 256, (37, 50, 3), dtype=np.uint8)  # of no round size
    tokens = model.tokenise(image_scene(image))
    assert len(tokens) == 10 * 13
    with torch.no_grad():
        f = model.encoder([tokens])
        whole = model.encoder.pyramid(model.encoder._pixels(tokens.scene))  # type: ignore[attr-defined]
    assert whole.shape == (1, 16, 10, 13)
    for token in (0, 17, 129):
        x, y = tokens.cells[token].tolist()
        assert torch.equal(f[token], whole[0, :, y, x])
    pixel = 33 * 50 + 21
    assert tokens.cells[tokens.of_point[pixel]].tolist() == [21 // 4, 33 // 4]


@torch.no_grad()
def test_pictures_of_several_sizes_are_encoded_as_each_alone(model: ClickSegmenter) -> None:
    random = np.random.default_rng(1)
    scenes = [
        model.tokenise(image_scene(random.integers(0, 256, (height, width, 3), dtype=np.uint8)))
        for height, width in ((64, 48), (33, 90))
    ]
    for together, each in zip(model.encode(scenes), scenes, strict=True):
        torch.testing.assert_close(together.f, model.encode([each])[0].f, atol=1e-6, rtol=0)


def test_a_session_labels_every_pixel(model: ClickSegmenter) -> None:
    scene = next(collages("test"))
    session = Session(model, scene)
    session.add(1, 40 * 96 + 40)
    session.add(2, 5)
    labels = session.labels()
    assert labels.shape == (96 * 96,) and labels[40 * 96 + 40] == 1 and labels[5] == 2
    assert session.clicks == (
        Click(1, int(session.tokens.of_point[40 * 96 + 40])),
        Click(2, int(session.tokens.of_point[5])),
    )


def test_what_is_frozen_stays_and_the_pyramid_learns() -> None:
    torch.manual_seed(0)
    encoder = ImageEncoder(channels=16, frozen=True)
    model = ClickSegmenter(encoder, ClickDecoder(2, 16, 2, 32, layers=1, background=3)).train()
    before = {name: each.clone() for name, each in encoder.backbone.state_dict().items()}
    scenes = [model.tokenise(scene) for scene in islice(collages(), 2)]
    loss, parts = ClickLoss(ClickSimulation(rounds=2, turn=False))(model, {"scenes": scenes})
    loss.backward()
    assert torch.isfinite(loss) and set(parts) == {"cross-entropy", "dice"}
    assert all(torch.equal(each, before[name]) for name, each in encoder.backbone.state_dict().items())
    assert all(each.grad is None for each in encoder.backbone.parameters())
    assert all(each.grad is not None and each.grad.abs().sum() > 0 for each in encoder.lateral.parameters())


def test_a_level_alone_gives_as_many_tokens_and_a_network_that_cannot_is_refused() -> None:
    scene = next(collages())
    for level in (0, 3):
        encoder = ImageEncoder(channels=8, levels=[level]).eval()
        assert encoder([encoder.tokenise(scene)]).shape == (24 * 24, 8)
    for name, options, message in (
        ("local-dir:/tmp", {}, "no network"),
        ("resnet18", {"levels": [9]}, "has 0, 1, 2, 3"),
    ):
        with pytest.raises(MethodError, match=message):
            ImageEncoder(name, **options)


def test_collages_show_shapes_that_can_be_seen_and_are_the_same_again() -> None:
    first, again, other = (next(collages(part, seed=3)) for part in ("train", "train", "test"))
    assert first.digest == again.digest != other.digest
    for scene in islice(collages(), 5):
        assert scene.objects is not None
        numbers, counts = np.unique(scene.objects, return_counts=True)
        assert len(numbers) >= 3 and counts.min() >= 48
    encoder = ImageEncoder(channels=8)
    assert visible(encoder.tokenise(first))


def drawing(scene: ClickScene, of: np.ndarray) -> np.ndarray:
    """Reshape pixels [96 * 96, ...] to an image [96, 96, ...]."""
    return of.reshape(96, 96, *of.shape[1:])


def test_pictures_and_their_objects_are_read_and_labels_written_as_such(model: ClickSegmenter, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    scene = next(collages("test"))
    assert scene.objects is not None
    colours = np.round(255 * drawing(scene, scene.colours)).astype(np.uint8)
    image.fromarray(colours).save(tmp_path / "photo.png")
    image.fromarray(drawing(scene, scene.objects).astype(np.uint8)).save(tmp_path / "photo.objects.png")
    (found,) = Scenes.open(tmp_path, InputContext())
    assert found.digest == scene.digest and found.name == "photo.png"
    assert np.array_equal(found.objects, scene.objects)  # type: ignore[arg-type]
    session = Session(model, found)
    session.add(1, 40)
    session.add(2, 4000)
    session.export(tmp_path / "photo.objects.png")
    (again,) = Scenes.open(tmp_path, InputContext())
    assert np.array_equal(again.objects, session.labels().numpy())  # type: ignore[arg-type]
    for wrong in (colours[:50], colours):  # another size, and in colours
        image.fromarray(wrong).save(tmp_path / "photo.objects.png")
        with pytest.raises(CalibrationError, match=r"photo\.objects\.png: not a grey image of the size of photo\.png"):
            Scenes.open(tmp_path, InputContext())
    (tmp_path / "photo.objects.png").unlink()
    (tmp_path / "photo.png").write_bytes(b"\x89PNG torn")
    with pytest.raises(CalibrationError, match=r"photo\.png cannot be read"):
        Scenes.open(tmp_path / "photo.png", InputContext())


def test_a_picture_that_is_turned_is_mirrored_with_its_objects() -> None:
    scene = next(collages())
    assert scene.objects is not None
    drawn = np.random.default_rng(0)
    found = {augment_scene(scene, drawn).digest: augment_scene(scene, drawn) for _ in range(12)}
    moved = next(each for each in found.values() if each.digest != scene.digest)
    assert len({augment_scene(scene, drawn).digest for _ in range(12)}) == 2
    at = moved.coords.astype(int)
    seen = np.zeros((96, 96), np.int64)
    seen[at[:, 1], at[:, 0]] = moved.objects
    assert np.array_equal(seen, drawing(scene, scene.objects)[:, ::-1])


def test_a_public_network_is_trained_written_read_and_judged_on_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import save_file

    torch.manual_seed(3)
    public = timm.create_model("tf_efficientnet_lite0").state_dict()  # its architecture, in place of its weights
    save_file(public, tmp_path / "model.safetensors")
    monkeypatch.setattr("lamella.methods.agile3d.method.pull", {"efficientnet-lite0": tmp_path}.__getitem__)
    shape = SegmenterShape("efficientnet-lite0", hidden=16, heads=2, feedforward=32, layers=2, background=3)
    with pytest.raises(MethodError, match="does not match the weights of resnet18"):
        ImageEncoder("resnet18", weights=tmp_path / "model.safetensors")
    scenes = Scenes.open("collages", InputContext(), count=2)
    config = TrainConfig(steps=2, lr=1e-3, batch=1, save_every=2)
    found = agile3d(scenes, shape=shape, simulation=ClickSimulation(rounds=2, frozen=True), config=config, work=Work())
    kept = found.model.encoder.backbone.state_dict()  # type: ignore[attr-defined]
    assert len(kept) > 200 and all(torch.equal(each, public[name]) for name, each in kept.items())
    (tmp_path / "written").mkdir()
    found.write(tmp_path / "written")
    again = Segmenter.read(tmp_path / "written")
    assert again.describe() == found.describe()
    assert set(
        judge(again, Scenes.open("collages", InputContext(split="test"), count=1), budget=1)["agile3d"]["iou"]
    ) == {"1"}
    room = replace(next(rooms()), name="room.ply")
    with pytest.raises(CalibrationError, match=r"room\.ply is no image, which this model segments"):
        Session(again.model, room)
