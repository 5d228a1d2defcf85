"""Distances, compared with their definitions in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lamella.measure import DISTANCES

POSITIONS, VOCABULARY = 40, 50
GENERATOR = torch.Generator().manual_seed(0)
REFERENCE = 3 * torch.randn(POSITIONS, VOCABULARY, generator=GENERATOR)
NEAR = REFERENCE + 0.1 * torch.randn(POSITIONS, VOCABULARY, generator=GENERATOR)
FAR = 5 * torch.randn(POSITIONS, VOCABULARY, generator=GENERATOR)
LABELS = torch.randint(VOCABULARY, (POSITIONS,), generator=GENERATOR)
LABELS[-1] = -100


def softmax(logits: Tensor) -> np.ndarray:
    z = logits.double().numpy()
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def by_definition(name: str, logits: Tensor, reference: Tensor) -> np.ndarray:
    p, q = softmax(reference), softmax(logits)
    m = (p + q) / 2
    if name == "jsd":
        return (p * np.log(p / m)).sum(-1) / 2 + (q * np.log(q / m)).sum(-1) / 2
    if name == "jsd_repo":
        return ((m * np.log(m / p)).sum(-1) + (m * np.log(m / q)).sum(-1)) / 2 / p.shape[-1]
    if name == "kl":
        return (p * np.log(p / q)).sum(-1)
    z, z0 = logits.double().numpy(), reference.double().numpy()
    if name == "angular":
        cosine = (z * z0).sum(-1) / np.linalg.norm(z, axis=-1) / np.linalg.norm(z0, axis=-1)
        return np.arccos(np.clip(cosine, 0, 1))
    if name == "norm":
        return ((z - z0) ** 2).sum(-1)
    nll = -np.log(q[np.arange(len(q)), LABELS.clamp(min=0).numpy()])
    return np.where(LABELS.numpy() == -100, 0.0, nll)


def measured(name: str, logits: Tensor, reference: Tensor) -> Tensor:
    distance = DISTANCES[name]
    return distance.at_positions(logits.clone(), distance.prepare(reference.clone()), LABELS)


@pytest.mark.parametrize("name", list(DISTANCES))
@pytest.mark.parametrize("logits", [NEAR, FAR], ids=["near", "far"])
def test_every_distance_is_its_definition(name: str, logits: Tensor) -> None:
    expected = torch.from_numpy(by_definition(name, logits, REFERENCE))
    torch.testing.assert_close(measured(name, logits, REFERENCE).double(), expected, rtol=2e-4, atol=2e-7)


@pytest.mark.parametrize("name", [name for name in DISTANCES if name != "perplexity"])
def test_the_distance_of_a_thing_to_itself_is_0_and_none_is_negative(name: str) -> None:
    assert measured(name, REFERENCE, REFERENCE).abs().max() <= 1e-7
    for logits in (NEAR, FAR, -REFERENCE):
        assert measured(name, logits, REFERENCE).min() >= 0


def test_jsd_is_between_0_and_ln_2_and_symmetric_where_probabilities_vanish() -> None:
    one = torch.full((2, VOCABULARY), -1e4)
    other = one.clone()
    one[:, 0], other[:, 1] = 1e4, 1e4  # all the weight on one token, and on another
    assert measured("jsd", one, other).sub(math.log(2)).abs().max() <= 1e-6
    assert measured("jsd", one, other).max() <= math.log(2)
    torch.testing.assert_close(measured("jsd", NEAR, REFERENCE), measured("jsd", REFERENCE, NEAR), rtol=1e-3, atol=1e-7)
    for scale in (1e-4, 1e-2, 1.0, 100.0):
        value = measured("jsd", scale * FAR, scale * REFERENCE)
        assert torch.isfinite(value).all() and value.min() >= 0 and value.max() <= math.log(2)


def test_small_divergences_keep_their_digits() -> None:
    close = REFERENCE + 1e-3 * torch.randn(POSITIONS, VOCABULARY, generator=torch.Generator().manual_seed(1))
    expected = torch.from_numpy(by_definition("jsd", close, REFERENCE))
    assert (measured("jsd", close, REFERENCE).double() - expected).abs().max() <= 2e-7


def test_reversed_jsd_is_not_bounded_by_ln_2() -> None:
    one = torch.full((1, 2), -50.0)
    other = one.clone()
    one[:, 0], other[:, 1] = 50.0, 50.0
    labels = torch.tensor([0])
    distance = DISTANCES["jsd_repo"]
    # M is (1/2, 1/2), each KL is about 50 - ln 2, halved and averaged over two tokens.
    value = float(distance.at_positions(one, distance.prepare(other), labels))
    assert value == pytest.approx((50 - math.log(2)) / 2, rel=1e-5)


@pytest.mark.parametrize("name", list(DISTANCES))
def test_whole_sets_are_averaged_as_the_sheet_says(name: str) -> None:
    sums, counts = torch.tensor([6.0, 30.0], dtype=torch.float64), torch.tensor([4.0, 6.0], dtype=torch.float64)
    expected = {
        "norm": (math.sqrt(6) + math.sqrt(30)) / 2,  # Frobenius per sequence, mean over sequences
        "perplexity": (math.exp(6 / 3) + math.exp(30 / 5)) / 2,  # the last position of each has no label
    }.get(name, 36 / 10)  # mean over all positions
    assert float(DISTANCES[name].reduce(sums, counts)) == pytest.approx(expected)


@pytest.mark.parametrize("name", list(DISTANCES))
def test_a_partial_sum_is_a_lower_bound(name: str) -> None:
    values = measured(name, FAR, REFERENCE).double()
    counts = torch.tensor([float(POSITIONS)], dtype=torch.float64)
    partial = [float(DISTANCES[name].reduce(values[:n].sum().reshape(1), counts)) for n in range(POSITIONS + 1)]
    assert partial == sorted(partial)


@pytest.mark.parametrize("name", ["jsd", "kl"])
@pytest.mark.parametrize("some", [1, 5, 25, 49, 50])
def test_some_tokens_bound_the_divergence_from_below(name: str, some: int) -> None:
    distance = DISTANCES[name]
    assert distance.from_some is not None
    reference = torch.log_softmax(REFERENCE, -1)
    for logits in (NEAR, FAR, -REFERENCE, REFERENCE, 20 * FAR, 0 * FAR):
        whole = by_definition(name, logits, REFERENCE)
        for seed in range(4):
            tokens = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(seed))[:some]
            bound = distance.from_some(logits[:, tokens], reference[:, tokens]).numpy()
            assert np.isfinite(bound).all() and (bound >= 0).all()
            assert (bound <= whole).all()


@pytest.mark.parametrize(("name", "near"), [("jsd", 0.9), ("kl", 0.999)])  # three tangents nearly touch the curve
def test_the_bound_is_the_least_divergence_over_what_is_not_known(name: str, near: float) -> None:
    distance = DISTANCES[name]
    assert distance.from_some is not None
    tokens = torch.arange(30)
    reference = torch.log_softmax(REFERENCE, -1)[:, tokens]
    bound = distance.from_some(FAR[:, tokens], reference).double()
    p, q = reference.double().exp(), torch.softmax(FAR[:, tokens].double(), -1)
    p = torch.cat([p, 1 - p.sum(-1, keepdim=True)], dim=-1)
    least = torch.full((POSITIONS,), math.inf, dtype=torch.float64)
    for s in torch.linspace(1e-4, 1 - 1e-4, 4001, dtype=torch.float64):
        joined = torch.cat([s * q, (1 - s).expand(POSITIONS, 1)], dim=-1)
        m = (p + joined) / 2
        jsd, kl = ((p * (p / m).log()) + (joined * (joined / m).log())).sum(-1) / 2, (p * (p / joined).log()).sum(-1)
        least = torch.minimum(least, jsd if name == "jsd" else kl)
    assert (bound <= least + 1e-6).all()
    assert bound.sum() >= near * least.sum()
