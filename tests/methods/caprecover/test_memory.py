"""Features are in memory for one batch at one cut, and hidden states for one layer, however many there are."""

from __future__ import annotations

import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from lamella.data import Captioned, CaptionedImages, InputContext, encoded
from lamella.files import Work
from lamella.methods.caprecover import LinkDefence, Victim, attackers, measure_defences, nearest, record_features
from lamella.methods.caprecover.digits import prepare
from lamella.methods.caprecover.tokens import RidgeRegression, hidden_states, tokens
from lamella.stack import Stack
from lamella.zoo import nano

tokens_module: Any = sys.modules[tokens.__module__]  # the package has a function of its name
CUTS = {f"layer{number}": str(number) for number in range(7)}


class Alive:
    """Counts the tensors that were seen and are alive."""

    def __init__(self) -> None:
        self.seen: list[weakref.ref[Tensor]] = []
        self.most = 0

    def __call__(self, *tensors: Tensor) -> None:
        self.seen = [each for each in self.seen if each() is not None] + [weakref.ref(each) for each in tensors]
        self.most = max(self.most, len(self.seen))


@pytest.fixture
def victim() -> Victim:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1 if number == 0 else 2, 2, 3, padding=1) for number in range(7)]
    return Victim(nn.Sequential(*layers, nn.Flatten()).eval().requires_grad_(False), CUTS, prepare)


@pytest.fixture
def images() -> tuple[Captioned, ...]:
    return CaptionedImages.open("digits", InputContext(), count=150).items


def test_features_of_a_cut_are_written_before_those_of_the_next_are_computed(
    victim: Victim, images: tuple[Captioned, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive, write = Alive(), encoded._write

    def watched(file: Path, rows: Any, digest: str) -> None:
        alive(*rows.values())
        write(file, rows, digest)

    monkeypatch.setattr(encoded, "_write", watched)
    found = record_features(victim, images, list(CUTS), Work(tmp_path))
    assert alive.most <= 2  # the input and the output of one layer
    for start in (0, 64, 128):
        direct = victim.features(victim.prepare(images[start : start + 64]), list(CUTS))
        for cut, features in found.items():
            assert torch.equal(torch.stack(list(features[start : start + 64])), direct[cut])


def test_a_recording_that_was_stopped_goes_on_with_the_first_batch_that_lacks_a_cut(
    victim: Victim, images: tuple[Captioned, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuts = ["layer1", "layer5"]
    record_features(victim, images, cuts, Work(tmp_path))
    (tmp_path / "features" / "layer5" / "000001.safetensors").unlink()
    seen: list[int] = []
    run = Victim.pass_features
    monkeypatch.setattr(Victim, "pass_features", lambda self, x, *rest: (seen.append(len(x)), run(self, x, *rest)))
    found = record_features(victim, images, cuts, Work(tmp_path))
    assert seen == [64, 150 - 128]
    expected = victim.features(victim.prepare(images[64:128]), cuts)["layer5"]
    assert torch.equal(torch.stack(list(found["layer5"][64:128])), expected)


def test_the_cost_of_defences_is_measured_cut_by_cut(
    victim: Victim, images: tuple[Captioned, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    alive, features = Alive(), Victim.features

    def watched(self: Victim, x: Tensor, names: Any) -> dict[str, Tensor]:
        found = features(self, x, names)
        alive(*found.values())
        return found

    monkeypatch.setattr(Victim, "features", watched)
    labels = torch.tensor([each.label for each in images])
    rows = measure_defences(victim, victim.prepare(images), labels, list(CUTS), [LinkDefence()])
    assert alive.most == 1 and [row["cut"] for row in rows] == list(CUTS)


def test_hidden_states_of_one_layer_are_in_memory_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    alive = Alive()

    def watched(*args: Any) -> Any:
        found = hidden_states(*args)
        alive(*found.h.values())
        return found

    monkeypatch.setattr(tokens_module, "hidden_states", watched)
    stack = Stack(nano("llama"))
    layers = tuple(range(len(stack)))
    text: Any = SimpleNamespace(tokens=torch.randint(3, 100, (20, 16)))
    found = tokens(stack, text, text, cuts=layers, guards=("none", "gaussian:10"), seeds=1)
    assert alive.most == 2  # of the attacker's text and of the test text
    assert [row["cut"] for row in found.findings["tokens"]] == [f"layers.{each}" for each in layers for _ in range(2)]


def test_ridge_regression_in_parts_is_that_of_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens_module, "ROWS", 7)
    x, y = torch.randn(60, 5) + 3, torch.randn(60, 4)
    found = RidgeRegression.of(x, y)
    centred, targets = x.double() - x.double().mean(0), y.double() - y.double().mean(0)
    gram = centred.T @ centred
    gram += tokens_module.RIDGE * gram.diagonal().mean() * torch.eye(5)
    torch.testing.assert_close(found.weight, torch.linalg.solve(gram, centred.T @ targets))
    torch.testing.assert_close(found.bias, y.double().mean(0) - x.double().mean(0) @ found.weight)


def test_the_nearest_images_are_found_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    train, test = (torch.randn(count, 3, 5, generator=generator) for count in (40, 23))
    monkeypatch.setattr(attackers, "COMPARED", 4 * 15)
    sizes: list[int] = []
    directions = attackers._directions
    monkeypatch.setattr(attackers, "_directions", lambda rows: (sizes.append(len(rows)), directions(rows))[1])
    expected = (normalize(test.flatten(1)) @ normalize(train.flatten(1)).T).argmax(1)
    assert torch.equal(nearest(train, test), expected) and max(sizes) == 4
