"""Vision transformers that end without norms: what each kind trains, what is folded, what onnxruntime makes of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from lamella.data import Captioned, CaptionedImages, InputContext
from lamella.errors import CalibrationError, CheckpointError, MethodError
from lamella.methods.slab import LinearAttention
from lamella.methods.slab.networks import VisionConfig
from lamella.methods.slab.recipe import GammaSchedule
from lamella.methods.slab.vision import Classifier, Splits, export_onnx, logits, prepare_images, train_network, vision
from lamella.train import Augmentation, TrainConfig

SMALL = VisionConfig(size=8, patch=2, channels=1, width=16, depth=(2,), heads=2)
CONFIG = TrainConfig(steps=160, lr=5e-3, schedule="cosine", batch=32)


def digits() -> CaptionedImages:
    return CaptionedImages.open("digits", InputContext(), count=600)


@pytest.mark.parametrize("kind", ["layer", "batch", "rep", "progressive batch", "progressive"])
def test_every_kind_of_norm_learns_and_folds(kind: str) -> None:
    done = vision(digits(), network=SMALL, kind=kind, config=CONFIG)
    found = done.findings["accuracy"]
    assert found["trained"] > 0.2  # of ten classes
    left = [each for each in done.model.modules() if isinstance(each, nn.LayerNorm | nn.BatchNorm1d)]
    if kind == "layer":
        assert len(left) == 5
        return
    assert left == [] and found["merged"] == found["refreshed"] and found["moved"] < 1e-4


def test_linear_attention_stands_where_it_is_asked_for() -> None:
    model = replace(SMALL, attention="linear", linear=1).build(10)
    assert [isinstance(block.attn, LinearAttention) for block in model.blocks] == [True, False]
    done = vision(digits(), network=replace(SMALL, attention="linear", kernel=3), config=CONFIG)
    assert done.findings["accuracy"]["merged"] > 0.3


def test_the_state_with_the_lowest_held_out_loss_is_kept(tmp_path: Path) -> None:
    images = Splits.of(digits(), SMALL)
    config = TrainConfig(steps=60, lr=0.1, schedule="constant", batch=32, eval_every=5)  # too fast to fall steadily
    model, log, _ = train_network(SMALL, 10, images, GammaSchedule(share=0.5), "progressive", config, tmp_path)
    losses = [point.loss for point in log.held_out if point.step]
    assert losses[-1] > min(losses)
    x, y = images.held_out
    assert float(cross_entropy(logits(model, x), y)) == pytest.approx(min(losses), rel=1e-4)


def test_images_are_held_out_of_training_at_random() -> None:
    images = Splits.of(digits(), SMALL)
    assert [len(y) for _, y in (images.train, images.held_out)] == [540, 60]
    assert len(images.held_out[1].unique()) == 10
    rows = [{x.numpy().tobytes() for x in part[0]} for part in (images.train, images.held_out)]
    assert not rows[0] & rows[1]


@pytest.mark.parametrize(
    "network",
    [
        SMALL,
        VisionConfig("swin", 16, 4, 1, 8, (1, 1), 2, window=4),
        VisionConfig("pvt", 32, 4, 3, 8, (1, 1), 2, attention="linear", linear=1, kernel=3),
    ],
    ids=["vit", "swin", "pvt"],
)
def test_what_is_written_is_read_back(network: VisionConfig, tmp_path: Path) -> None:
    config = TrainConfig(steps=3, lr=1e-3, batch=16)
    done = vision(digits(), network=network, augment=Augmentation(), config=config)
    assert done.findings["accuracy"]["moved"] < 1e-4
    done.write(tmp_path)
    again = Classifier.read(tmp_path)
    x = prepare_images(digits().items[:4], network)
    assert torch.equal(again.model(x), done.model(x)) and again.describe() == done.describe()
    (tmp_path / "network.json").write_text('{"schema": "lamella.slab/1"}')
    with pytest.raises(CheckpointError, match=r"no classifier .*must contain exactly network, classes, merged"):
        Classifier.read(tmp_path)


@pytest.mark.slow
def test_a_merged_network_runs_in_onnxruntime(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    done = vision(digits(), network=SMALL, config=TrainConfig(steps=10, lr=1e-3, batch=16))
    export_onnx(done.model, SMALL, tmp_path / "model.onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    for count in (1, 5):
        x = prepare_images(digits().items[:count], SMALL)
        [message] = session.run(None, {"pixels": x.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(message), done.model(x), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_is_refused_in_one_line() -> None:
    with pytest.raises(MethodError, match="give a multiple of the patch, and a multiple of the heads"):
        VisionConfig(size=9, patch=2)
    with pytest.raises(MethodError, match="so that the transition ends before the training does"):
        GammaSchedule(share=0.8, warm=0.3)
    plain = digits()
    object.__setattr__(plain, "items", tuple(Captioned(each.image) for each in plain.items))
    with pytest.raises(CalibrationError, match="have no classes"):
        vision(plain, network=SMALL, config=CONFIG)
