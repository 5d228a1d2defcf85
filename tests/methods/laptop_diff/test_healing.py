"""Distillation: what each term is, what normalization changes, and that training goes on to the bit."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lamella.methods.laptop_diff import (
    Denoiser,
    DistillationLoss,
    LossWeights,
    balance_loss,
    distil,
    match_stages,
    stages,
)
from lamella.methods.laptop_diff.recipe import Average, with_features
from lamella.plan import ModelReference, Plan
from lamella.runtime import apply
from lamella.train import TrainConfig, own

from .pipelines import denoiser, digits, tuples

PAIRS = ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"]
CONFIG = TrainConfig(steps=4, lr=1e-3, batch=4, save_every=2, schedule="constant", warmup=0)


def student(whole: Denoiser, *sites: str) -> torch.nn.Module:
    network = apply(whole.blocks, Plan(model=ModelReference.of(whole.blocks), drop=list(sites)))
    own(network, lambda name: True)
    return network.eval()


def test_features_are_compared_behind_every_stage() -> None:
    assert stages(denoiser("untrained").network) == PAIRS
    assert stages(denoiser("classes").network) == [f"transformer_blocks.{layer}" for layer in range(4)]
    whole = denoiser("untrained")
    assert match_stages(whole.network, student(whole, "unet.mid.resnets.0")) == list(zip(PAIRS, PAIRS, strict=True))
    without = copy.deepcopy(whole.network)
    without.mid_block = None
    assert match_stages(whole.network, without)[2] == ("mid_block", "down_blocks.1")


def test_every_term_is_a_mean_of_squares_and_the_teacher_learns_nothing() -> None:
    whole, rows = denoiser("untrained"), tuples("untrained")
    network = student(whole, "unet.mid.resnets.0", "unet.up.1.resnets.0")
    noisy = whole.noising.add_noise(rows.clean, rows.noise, rows.timesteps)
    seen: dict[tuple[str, str], Tensor] = {}
    said = {}
    with torch.no_grad():
        for name, each in (("teacher", whole.network), ("student", network)):
            hooks = [
                each.get_submodule(path).register_forward_hook(
                    lambda m, a, out, key=(name, path): seen.update({key: out[0] if isinstance(out, tuple) else out})
                )
                for path in PAIRS
            ]
            said[name] = each(noisy, rows.timesteps).sample
            for hook in hooks:
                hook.remove()
    for kind in ("normalized", "vanilla"):
        loss = DistillationLoss(
            whole,
            match_stages(whole.network, network),
            LossWeights(features=kind, feature_weight=0.3, output_weight=0.7),
        )
        parts, features = loss.parts(network, rows)
        torch.testing.assert_close(parts["task"], (said["student"] - rows.noise).square().mean())
        torch.testing.assert_close(parts["output"], (said["student"] - said["teacher"]).square().mean())
        for path, found in zip(PAIRS, features, strict=True):
            theirs, ours = seen["teacher", path], seen["student", path]
            scale = theirs.square().mean() if kind == "normalized" else 1.0
            torch.testing.assert_close(found, (theirs - ours).square().mean() / scale)
        assert all(each.requires_grad for each in features)
    sum(features).backward()
    assert all(each.grad is None for each in whole.network.parameters())


def test_what_a_stage_weighs_depends_on_the_teacher_alone() -> None:
    whole, rows = denoiser("untrained"), tuples("untrained")
    loss = DistillationLoss(whole, match_stages(whole.network, whole.network), LossWeights())
    shrunk = student(whole, "unet.mid.resnets.0")
    for each in shrunk.parameters():
        each.data *= 0.01  # a student that would make its features small gains nothing by it
    with torch.no_grad():
        _, features = loss.parts(shrunk, rows)
    assert float(features[0]) == pytest.approx(1.0, abs=0.1)  # a relative error: all of it is missing
    feature = torch.randn(2, 3, 4, 4, requires_grad=True)
    assert not loss.alpha(feature.detach()).requires_grad


def test_a_stage_written_thirty_times_larger_weighs_the_same() -> None:
    """Its consumers divide by as much, so the network is the same function."""
    whole = denoiser("untrained")
    rows, factor = tuples("untrained"), 30.0
    network = student(whole, "unet.down.0.resnets.1")
    pairs = [("mid_block", "mid_block")]

    def terms(kind: str, times: float) -> Tensor:
        loss = DistillationLoss(whole, pairs, LossWeights(features=kind))
        noisy = whole.noising.add_noise(rows.clean, rows.noise, rows.timesteps)
        with torch.no_grad():
            both = [
                with_features(each, ["mid_block"], lambda each=each: each(noisy, rows.timesteps).sample)[1][0]
                for each in (whole.network, network)
            ]
        theirs, ours = (times * each for each in both)
        return loss.alpha(theirs) * (theirs - ours).square().mean()

    assert float(terms("normalized", factor)) == pytest.approx(float(terms("normalized", 1.0)), rel=1e-4)
    assert float(terms("vanilla", factor)) == pytest.approx(factor**2 * float(terms("vanilla", 1.0)), rel=1e-4)


def test_normalized_features_start_at_a_multiple_of_the_output_loss() -> None:
    whole, rows = denoiser("untrained"), tuples("untrained")
    network = student(whole, "unet.down.0.resnets.1")
    loss, initial = balance_loss(whole, network, rows, match_stages(whole.network, network), LossWeights())
    assert initial["feature"] * sum(initial["stages"].values()) == pytest.approx(7290 * initial["output"], rel=1e-5)
    assert loss.weights.feature_weight == initial["feature"]
    assert balance_loss(whole, network, rows, loss.pairs, LossWeights(features="vanilla"))[1]["feature"] == 1.0
    assert balance_loss(whole, network, rows, loss.pairs, LossWeights(feature_weight=0.25))[1]["feature"] == 0.25
    _, same = balance_loss(whole, student(whole), rows, loss.pairs, LossWeights())
    assert same["output"] == 0.0 and same["feature"] == 1.0  # nothing is pruned, nothing to learn


@pytest.mark.parametrize("name", ["untrained", "text", "classes"])
def test_healing_learns_and_leaves_the_teacher(name: str, tmp_path: Path) -> None:
    whole = denoiser(name)
    before = {key: each.clone() for key, each in whole.network.state_dict().items()}
    network = student(whole, whole.blocks.sites[-1])
    loss, _ = balance_loss(whole, network, tuples(name), match_stages(whole.network, network), LossWeights())

    @torch.no_grad()
    def total() -> float:
        parts, features = loss.parts(network, tuples(name))
        return float(parts["task"] + parts["output"] + (loss.weights.feature_weight or 0) * sum(features))

    first = total()
    config = TrainConfig(steps=20, lr=5e-4, batch=8, schedule="constant", warmup=0)
    log, _ = distil(whole, network, digits(), weights=LossWeights(), config=config, out=tmp_path / "run")
    network.eval()
    assert total() < first and len(log.train) > 0
    assert all(torch.equal(each, before[key]) for key, each in whole.network.state_dict().items())


class Stopped(Exception):
    pass


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_killed_training_goes_on_to_the_bit(average: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, weights = denoiser("untrained"), LossWeights(average=average)
    straight = student(whole, "unet.mid.resnets.0")
    distil(whole, straight, digits(), weights=weights, config=CONFIG, out=tmp_path / "straight")
    stopped = student(whole, "unet.mid.resnets.0")
    calls, parts = [], DistillationLoss.parts

    def counted(self: DistillationLoss, *given: object) -> object:
        calls.append(1)
        if len(calls) == 5:  # one before training, and three steps
            raise Stopped
        return parts(self, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(DistillationLoss, "parts", counted)
    with pytest.raises(Stopped):
        distil(whole, stopped, digits(), weights=weights, config=CONFIG, out=tmp_path / "stopped")
    monkeypatch.undo()
    again = student(whole, "unet.mid.resnets.0")
    torch.manual_seed(99)
    distil(whole, again, digits(), weights=weights, config=CONFIG, out=tmp_path / "stopped")
    for name, each in straight.state_dict().items():
        assert torch.equal(again.state_dict()[name], each), name


def test_a_running_average_is_what_is_kept(tmp_path: Path) -> None:
    whole = denoiser("untrained")
    plain, averaged = (student(whole, "unet.mid.resnets.0") for _ in range(2))
    start = {name: each.clone() for name, each in plain.state_dict().items()}
    distil(whole, plain, digits(), weights=LossWeights(), config=CONFIG, out=tmp_path / "plain")
    distil(whole, averaged, digits(), weights=LossWeights(average=0.999), config=CONFIG, out=tmp_path / "averaged")
    moved = [float((plain.state_dict()[name] - each).norm()) for name, each in start.items()]
    kept = [float((averaged.state_dict()[name] - each).norm()) for name, each in start.items()]
    assert 0 < sum(kept) < 0.02 * sum(moved)
    assert Average(0.5).kept == {}
