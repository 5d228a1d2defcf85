"""Supervised training: statistics of batch norms survive a kill, and recordings are correct."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from lamella.errors import CalibrationError
from lamella.measure import Recording
from lamella.train import EarlyStopping, Hook, TrainConfig, TrainingRun, class_cross_entropy, fit, supervised

CONFIG = TrainConfig(steps=6, lr=1e-2, batch=8, save_every=2, log_every=2, eval_every=2)


def rows(count: int = 40, seed: int = 0, width: int = 6) -> Recording:
    x = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return Recording(x, torch.tanh(x.roll(1, dims=1)))


def normed(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, affine=False), nn.Dropout(0.2), nn.Linear(8, 6))


class Stop(Hook):
    """Interrupts the run in a step."""

    def before_step(self, run: TrainingRun) -> None:
        if run.step == 4:
            raise KeyboardInterrupt


def test_statistics_of_batch_norms_survive_a_kill_bit_exactly(tmp_path: Path) -> None:
    whole, broken = normed(), normed()
    fit(whole, rows(), supervised(), CONFIG, out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(broken, rows(), supervised(), CONFIG, out=tmp_path / "broken", hooks=[Stop()])
    again = normed()
    fit(again, rows(), supervised(), CONFIG, out=tmp_path / "broken")
    for name, each in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], each), name
    assert int(whole[1].num_batches_tracked) == 6  # type: ignore[index, arg-type]


def test_a_finished_run_gives_its_statistics_back(tmp_path: Path) -> None:
    first, second = normed(), normed()
    fit(first, rows(), supervised(), CONFIG, out=tmp_path)
    fit(second, rows(), supervised(), CONFIG, out=tmp_path)
    for name, each in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], each), name


def test_the_best_model_is_kept_with_the_statistics_of_its_moment(tmp_path: Path) -> None:
    seen: list[dict[str, Tensor]] = []

    class Look(Hook):
        def evaluated(self, run: TrainingRun) -> None:
            seen.append({name: each.clone() for name, each in run.model.state_dict().items()})

    model, config = normed(), TrainConfig(steps=6, lr=0.5, batch=8, eval_every=1, schedule="constant")
    log = fit(
        model, rows(), supervised(), config, out=tmp_path, held_out=rows(seed=1), hooks=[Look(), EarlyStopping(6)]
    )
    losses = [point.loss for point in log.held_out]
    best = seen[losses.index(min(losses))]
    assert losses.index(min(losses)) < 6  # otherwise it would be the last one anyway
    for name, each in model.state_dict().items():
        assert torch.equal(each, best[name]), name


def test_a_vision_transformer_of_timm_learns_classes_however_its_batches_are_split(tmp_path: Path) -> None:
    images = torch.rand(48, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    classes = torch.arange(48) % 3
    for image, kind in zip(images, classes, strict=True):
        image[kind] += 1  # so that the colour tells the class
    samples = [{"x": image, "y": kind} for image, kind in zip(images, classes, strict=True)]
    losses = []
    for batch, accumulate in ((16, 1), (8, 2)):
        torch.manual_seed(0)
        model: Any = timm.create_model(
            "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=3
        )
        config = TrainConfig(steps=30, lr=3e-3, batch=batch, accumulate=accumulate, log_every=1)
        log = fit(model, samples, supervised(class_cross_entropy), config, out=tmp_path / str(batch))
        assert log.train[0].loss == pytest.approx(math.log(3), abs=0.6)
        losses.append([point.loss for point in log.train[:3]])
        predicted = model.eval()(images)
        assert (predicted.argmax(dim=1) == classes).float().mean() > 0.9
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_the_explained_variance_is_that_of_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lamella.measure.recording.ROWS", 7)  # of 40, which 7 does not divide
    recording = rows()
    y, mean = recording.y.double(), recording.y.double().mean(0)
    guess = 0.3 * recording.x
    expected = 1 - float((guess.double() - y).square().sum() / (y - mean).square().sum())
    assert recording.explained(lambda x: 0.3 * x) == pytest.approx(expected, abs=1e-12)
    constant: Any = lambda x: recording.y.mean(0).expand(len(x), -1)  # noqa: E731
    assert recording.explained(constant) == pytest.approx(0, abs=1e-6)
    assert recording.explained(lambda x: torch.tanh(x.roll(1, dims=1))) == 1


def test_parts_of_a_recording_share_no_row() -> None:
    first, last = rows(41).split(0.25)
    assert torch.equal(torch.cat([first.x, last.x]), rows(41).x) and len(last) == 10


def test_what_cannot_be_recorded_is_refused_in_one_line() -> None:
    x = torch.randn(8, 3)
    with pytest.raises(CalibrationError, match="two or more rows"):
        Recording(x[:1], x[:1])
    with pytest.raises(CalibrationError, match="two or more rows"):
        Recording(x, x).split(0.1)
    with pytest.raises(CalibrationError, match="not finite"):
        Recording(x, x / 0)
    with pytest.raises(CalibrationError, match="nothing is recorded"):
        Recording.of([])
