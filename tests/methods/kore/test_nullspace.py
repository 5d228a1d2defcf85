"""Factors on directions that old inputs leave alone, by the properties that the paper's construction must have."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lamella.errors import MethodError
from lamella.methods.kore import factors, null_basis
from lamella.methods.kore.covariance import equal_rank

M, N, OLD, R = 20, 32, 12, 8


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(M, N, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def c() -> Tensor:
    """Of inputs that lie in 12 of 32 dimensions."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(200, OLD, generator=generator) @ torch.randn(OLD, N, generator=generator)
    return x.T @ x / 200


def test_the_product_is_the_weight_on_the_null_space(weight: Tensor, c: Tensor) -> None:
    a, b, *_ = factors(weight, c, R)
    values, vectors = torch.linalg.eigh(c.double())
    basis = vectors[:, values.argsort()[:R]]
    torch.testing.assert_close((b @ a).double(), weight.double() @ basis @ basis.T, rtol=1e-5, atol=1e-5)
    assert a.shape == (R, N) and b.shape == (M, R)


def test_what_is_trained_does_not_answer_to_old_inputs(weight: Tensor, c: Tensor) -> None:
    a, _, energy, _ = factors(weight, c, R)
    assert (a @ c @ a.T).norm() / c.norm() < 1e-6 and energy < 1e-6
    other = torch.randn(R, N, generator=torch.Generator().manual_seed(2))
    other *= a.norm(dim=1, keepdim=True) / other.norm(dim=1, keepdim=True)
    assert (a @ c @ a.T).norm() < 1e-3 * (other @ c @ other.T).norm()


def test_the_two_factors_are_balanced(weight: Tensor, c: Tensor) -> None:
    a, b, *_ = factors(weight, c, R)
    torch.testing.assert_close((a @ a.T).diagonal(), (b.T @ b).diagonal(), rtol=1e-4, atol=1e-5)  # both are S_w


def test_of_no_directions_and_of_all(weight: Tensor, c: Tensor) -> None:
    a, b, energy, _ = factors(weight, c, 0)
    assert a.shape == (0, N) and energy == 0 and not (b @ a).any()
    a, b, energy, _ = factors(weight, c, N)
    assert energy == pytest.approx(1)
    torch.testing.assert_close(b @ a, weight, rtol=1e-4, atol=1e-4)  # W_res is 0


def test_a_map_with_fewer_outputs_than_directions_has_empty_ones(weight: Tensor, c: Tensor) -> None:
    a, b, *_ = factors(weight[:5], c, R)
    assert not a[5:].any() and not b[:, 5:].any() and a[:5].any()


def test_the_rank_that_old_inputs_allow_leaves_a_hundredth_of_their_energy(c: Tensor) -> None:
    values = torch.linalg.eigvalsh(c.double()).clamp(min=0)
    allows = null_basis(c, R).allows
    assert N - OLD <= allows < N and values[:allows].sum() <= 0.01 * values.sum() < values[: allows + 1].sum()


def test_a_rank_above_the_inputs_is_refused(c: Tensor) -> None:
    with pytest.raises(MethodError, match=f"at most {N} directions"):
        null_basis(c, N + 1)


def test_the_rank_of_equal_budget_is_the_papers() -> None:
    width, hidden = 4096, 11008
    square = dict.fromkeys("qkvo", (width, width))
    assert equal_rank(square | {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}, 128) == 235


def test_empty_directions_are_no_part_of_the_budget() -> None:
    shapes = {"q": (576, 576), "k": (576, 192)}
    r = equal_rank(shapes, 150)
    numbers = [576 * r + 192 * min(r, 192) for r in (r, r + 1)]
    assert r > 192 and numbers[0] <= 150 * (1152 + 768) < numbers[1]
