"""Augmentation changes training images only, does what its settings say, and resumes bit-exactly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lamella.errors import TrainingError
from lamella.train import Augmentation, AugmentedLoss, Hook, TrainConfig, TrainingRun, fit, supervised

NONE = Augmentation(crop=1.0, flip=0.0, policy="", erasing=0.0, mixup=0.0, cutmix=0.0, smoothing=0.0)
CLASSES = 5


def network(channels: int = 3) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * 64, CLASSES))


def batch(channels: int = 3, count: int = 4) -> dict[str, Tensor]:
    drawn = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, channels, 8, 8), generator=drawn) / 255
    return {"x": (pixels - 0.4) / 0.2, "y": torch.arange(count) % CLASSES}


def loss(augmentation: Augmentation, channels: int = 3) -> AugmentedLoss:
    return AugmentedLoss(augmentation, CLASSES, (0.4,) * channels, (0.2,) * channels)


@pytest.mark.parametrize("channels", [1, 3])
def test_without_changes_it_is_the_cross_entropy(channels: int) -> None:
    model, rows = network(channels).train(), batch(channels)
    expected = cross_entropy(model(rows["x"]), rows["y"])
    torch.testing.assert_close(loss(NONE, channels)(model, rows), expected, rtol=1e-4, atol=1e-4)


def test_evaluation_uses_the_images_themselves() -> None:
    model, rows = network().eval(), batch()
    assert torch.equal(loss(Augmentation())(model, rows), cross_entropy(model(rows["x"]), rows["y"]))


def test_a_certain_flip_mirrors_the_image() -> None:
    image = batch()["x"][0]
    torch.testing.assert_close(loss(replace(NONE, flip=1.0)).changed(image), image.flip(-1), rtol=1e-4, atol=1e-4)


def test_a_certain_erasing_changes_a_rectangle_only() -> None:
    image = batch()["x"][0]
    found = loss(replace(NONE, erasing=1.0)).changed(image)
    changed = (found - image).abs().amax(0) > 1e-3
    rows, columns = changed.any(1).nonzero().flatten(), changed.any(0).nonzero().flatten()
    assert 0 < changed.sum() < 64
    assert changed[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].all()


def test_mixup_is_the_loss_of_blended_images_and_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    monkeypatch.setattr(np.random, "beta", lambda *alpha: 0.75)
    model, rows = network().train(), batch()
    x = 0.75 * rows["x"] + 0.25 * rows["x"].flip(0)
    labels = torch.eye(CLASSES)[rows["y"]]
    expected = cross_entropy(model(x), 0.75 * labels + 0.25 * labels.flip(0))
    torch.testing.assert_close(loss(replace(NONE, mixup=0.8))(model, rows), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(TrainingError, match="batch 3: mixup pairs images: give an even batch"):
        loss(replace(NONE, mixup=0.8))(model, batch(count=3))


def test_interrupted_training_resumes_with_the_same_changes(tmp_path: Path) -> None:
    class Stop(Hook):
        def after_step(self, run: TrainingRun) -> None:
            if run.step == 5:
                raise KeyboardInterrupt

    rows = [{"x": x, "y": y} for x, y in zip(*batch(count=16).values(), strict=True)]
    config = TrainConfig(steps=8, lr=1e-2, batch=4, save_every=3)

    def trained(out: Path, *hooks: Hook) -> Any:
        model = network()
        fit(model, rows, supervised(loss(Augmentation())), config, out=out, hooks=hooks)
        return model

    whole = trained(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "resumed", Stop())
    resumed = trained(tmp_path / "resumed")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
