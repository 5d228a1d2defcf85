"""Figures of forgetting: against independent computations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lamella.errors import CalibrationError
from lamella.methods.ssd import Forgetting, Responses, evaluate, membership, untrained_like, zrf
from lamella.train import blocks, mean_loss
from lamella.zoo.nano import nano


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def data(count: int = 300, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 5, generator=generator), torch.randint(0, 3, (count,), generator=generator)


def of_entropy(*values: float) -> Responses:
    zeros = np.zeros(len(values))
    return Responses(zeros, zeros, np.array(values), True)


def test_answers_are_those_of_the_model_in_eval_mode_which_stays_as_it_is() -> None:
    model, (x, y) = net().train(), data()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = evaluate(model, (x, y))
    assert model.training and all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    with torch.no_grad():
        p = model.eval()(x).double().softmax(1).numpy()
    rows = np.arange(len(y))
    assert found.classifier and found.correct.tolist() == (p.argmax(1) == y.numpy()).tolist()
    assert np.allclose(found.loss, -np.log(p[rows, y.numpy()]), rtol=1e-6)
    assert np.allclose(found.entropy, -(p * np.log(p)).sum(1), rtol=1e-6)


def test_answers_of_a_decoder_are_means_over_the_tokens_of_a_sequence() -> None:
    model = nano("gpt2")
    rows = blocks(torch.randint(3, 128, (3, 10), generator=torch.Generator().manual_seed(0)), 4)
    found = evaluate(model, rows)
    assert not found.classifier
    assert found.loss.mean() == pytest.approx(mean_loss(model, rows), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(found.loss.mean()))


def test_membership_takes_confident_samples_for_training_data() -> None:
    retain, test = of_entropy(0.1, 0.2, 0.3, 0.2), of_entropy(1.1, 1.2, 1.3, 1.2)
    assert membership(retain, test, of_entropy(0.1, 0.25, 1.2, 1.4)) == 0.5
    assert membership(retain, test, of_entropy(0.1, 0.1)) == 1


def test_membership_weighs_both_classes_alike_however_many_there_are() -> None:
    """Against the regression written out: Newton's steps on the balanced loss with sklearn's penalty."""
    generator = np.random.default_rng(0)
    retain, test = generator.normal(0.5, 0.3, 200), generator.normal(0.9, 0.4, 30)
    x, y = np.concatenate([retain, test]), np.repeat([1.0, 0.0], [200, 30])
    weight = np.where(y == 1, 230 / (2 * 200), 230 / (2 * 30))
    a = b = 0.0
    for _ in range(50):
        p = 1 / (1 + np.exp(-(a * x + b)))
        g = np.array([(weight * (p - y) * x).sum() + a, (weight * (p - y)).sum()])
        s = weight * p * (1 - p)
        hessian = np.array([[(s * x * x).sum() + 1, (s * x).sum()], [(s * x).sum(), s.sum()]])
        a, b = np.array([a, b]) - np.linalg.solve(hessian, g)
    forget = generator.normal(0.7, 0.3, 500)
    expected = float((a * forget + b > 0).mean())
    found = membership(of_entropy(*retain), of_entropy(*test), of_entropy(*forget))
    assert found == pytest.approx(expected, abs=0.005)


def test_zrf_is_one_for_the_untrained_model_and_less_the_further_it_is() -> None:
    model, (x, y) = net().eval(), data()
    other = untrained_like(model, 1)
    assert zrf(other, other, (x, y)) == pytest.approx(1, abs=1e-6)
    with torch.no_grad():
        p, q = (each(x).double().softmax(1) for each in (model, other))
    m = (p + q) / 2
    divergence = ((p * (p / m).log2()).sum(1) + (q * (q / m).log2()).sum(1)) / 2
    assert zrf(model, other, (x, y)) == pytest.approx(1 - float(divergence.mean()), abs=1e-6)
    assert zrf(model, other, x) == zrf(model, other, (x, y))


@pytest.mark.parametrize("kind", ["module", "transformers"])
def test_an_untrained_model_is_drawn_from_its_seed_alone(kind: str) -> None:
    model = net() if kind == "module" else nano("llama")
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = untrained_like(model, 3)
    assert torch.equal(torch.rand(1), expected)  # the global state is as it was
    second, third = untrained_like(model, 3), untrained_like(model, 4)
    same = [torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)]
    assert all(same)
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), third.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), model.parameters(), strict=True))


def test_figures_are_left_out_where_their_data_are() -> None:
    model = net().eval()
    whole = Forgetting.of(
        model, forget=data(20, 1), retain=data(40, 2), test=data(40, 3), untrained=untrained_like(model)
    )
    assert None not in whole.as_dict().values() and whole.forget["accuracy"] == evaluate(model, data(20, 1)).accuracy
    few = Forgetting.of(model, forget=data(20, 1))
    assert few.as_dict() == {"forget": whole.forget, "retain": None, "test": None, "membership": None, "zrf": None}


def test_nothing_to_measure_is_refused() -> None:
    x, y = data()
    for call in (
        lambda: evaluate(net(), (x[:0], y[:0])),
        lambda: evaluate(net(), x),
        lambda: zrf(net(), net(), (x[:0], y[:0])),
    ):
        with pytest.raises(CalibrationError) as error:
            call()
        assert "\n" not in str(error.value)
