"""Spectra and locality against numpy, scikit-learn and cases whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from tests.methods.iformer.conftest import vit

from lamella.errors import MethodError
from lamella.methods.iformer.locality import Moments, attention_distance, heads_of, kernels
from lamella.methods.iformer.spectra import spectrum


@pytest.mark.parametrize("grid", [(8, 8), (6, 9), (7, 5), (4, 8), (12, 4), (3, 15)])
def test_a_spectrum_is_the_average_over_radii_of_numpys_transform(grid: tuple[int, int]) -> None:
    z = torch.randn(2, 3, *grid, generator=torch.Generator().manual_seed(0))
    found = spectrum(z)
    bins = max(grid) // 2
    edges = (np.arange(bins + 1) + 0.5) / bins  # halfway to the next, in pi
    deltas, high, whole = [], 0.0, 0.0
    for picture in z.double().numpy():
        for channel in picture:
            size = np.fft.fftshift(np.abs(np.fft.fft2(channel)))
            rings: list[list[float]] = [[] for _ in range(bins + 1)]
            for i, y in enumerate(np.fft.fftshift(np.fft.fftfreq(grid[0]))):
                for j, x in enumerate(np.fft.fftshift(np.fft.fftfreq(grid[1]))):
                    radius = 2 * math.hypot(y, x)  # in pi
                    whole += size[i, j] ** 2
                    high += size[i, j] ** 2 if radius > 0.5 + 1e-9 else 0.0
                    assert radius == 0 or min(abs(radius - edges)) > 1e-6  # on no edge, where either would do
                    if radius < edges[-1]:
                        rings[int(np.searchsorted(edges, radius))].append(size[i, j])
            assert len(rings[0]) == 1  # the mean alone
            logs = [math.log(np.mean(ring) + 1e-6) for ring in rings]
            deltas.append([each - logs[0] for each in logs])
    np.testing.assert_allclose(found.delta, np.mean(deltas, axis=0), rtol=1e-6, atol=1e-9)
    assert found.high == pytest.approx(high / whole)
    assert (
        len(found.frequencies) == bins + 1
        and found.frequencies[0] == 0
        and found.frequencies[-1] == pytest.approx(math.pi)
    )


def test_a_wave_shows_at_its_own_frequency_and_a_constant_nowhere() -> None:
    x = torch.arange(16.0)
    for period, share in ((16, 0.0), (2, 1.0)):
        wave = torch.cos(2 * math.pi * x / period).expand(1, 1, 16, 16)
        found = spectrum(wave)
        assert int(np.argmax(found.delta[1:])) + 1 == round(16 / period) and found.high == pytest.approx(
            share, abs=1e-9
        )
    assert spectrum(torch.ones(1, 1, 16, 16)).high == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("grid", [(4, 16), (16, 4), (2, 16)])
def test_amplitudes_of_a_long_map_are_those_beside_its_mean_alone(grid: tuple[int, int]) -> None:
    wave = 1 + 0.5 * torch.cos(2 * math.pi * torch.arange(16.0) / 16)
    z = (wave if grid[1] == 16 else wave[:, None]).expand(1, 1, *grid)
    assert spectrum(z).delta[:2] == pytest.approx([0, math.log(0.5 / 2)], abs=1e-6)  # half of it either way


def test_white_noise_is_flat_and_an_attention_that_averages_takes_its_high_frequencies() -> None:
    noise = torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    white = spectrum(noise)
    places = np.hypot(*np.meshgrid(np.fft.fftfreq(8), np.fft.fftfreq(8))) > 0.25 + 1e-9
    assert white.high == pytest.approx(places.mean(), abs=0.01)
    spots = torch.stack(torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij"), -1).flatten(0, 1)
    weights = (-torch.cdist(spots, spots).square() / 4).softmax(-1)
    averaged = spectrum((weights @ noise.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(-1, (8, 8)))
    assert averaged.high < 0.25 * white.high and averaged.delta[-1] < white.delta[-1] - 1


def test_a_map_in_which_nothing_can_change_is_refused() -> None:
    with pytest.raises(MethodError, match="has no spectrum: give larger images"):
        spectrum(torch.ones(1, 1, 1, 8))


def test_heads_are_those_of_the_attention_that_runs() -> None:
    attn = vit().blocks[0].attn
    x = torch.randn(2, 17, 24)
    weights, _, out = heads_of(attn, x)
    torch.testing.assert_close(attn.proj(out.transpose(1, 2).flatten(2)), attn(x))
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 17))


def test_distances_are_those_between_places_and_other_tokens_play_no_part() -> None:
    weights = torch.zeros(1, 2, 7, 7)  # a token, then a grid of 2 x 3
    weights[:, :, :, 0] = 0.5
    weights[:, 0] += 0.5 * torch.eye(7)  # looks at itself
    weights[:, 1, :, 1] += 0.5  # looks at the first place
    expected = np.mean([math.hypot(i, j) for i in range(2) for j in range(3)])
    assert attention_distance(weights, (2, 3)).tolist() == pytest.approx([0, expected])


def test_the_regression_is_scikit_learns() -> None:
    drawn = torch.Generator().manual_seed(0)
    v, out = torch.randn(6, 2, 5, 4, generator=drawn), torch.randn(6, 2, 5, 4, generator=drawn) + 3
    sums = Moments.empty(2, 3)
    for part in (slice(0, 2), slice(2, 6)):
        sums.add(v[part], out[part], 3)
    weights = sums.solve(0.1)
    r2 = []
    for channel in range(2):
        padded = np.pad(v[:, channel].double().numpy(), ((0, 0), (1, 1), (1, 1)))
        x = np.stack([padded[:, i : i + 5, j : j + 4].ravel() for i in range(3) for j in range(3)], 1)
        y = out[:, channel].double().numpy().ravel()
        penalty = 0.1 * (x**2).sum() / 9
        judge = Ridge(alpha=penalty).fit(x, y)
        np.testing.assert_allclose(weights[channel, :-1], judge.coef_, rtol=1e-6, atol=1e-9)
        assert float(weights[channel, -1]) == pytest.approx(judge.intercept_)
        r2.append([((y - judge.predict(x)) ** 2).sum(), ((y - y.mean()) ** 2).sum()])
    assert sums.explained(weights, 2) == pytest.approx([1 - error / total for error, total in r2])
    errors, totals = np.sum(r2, axis=0)
    assert sums.explained(weights, 1) == pytest.approx([1 - errors / totals])


def test_a_channel_that_is_always_0_is_fitted_by_the_mean() -> None:
    drawn = torch.Generator().manual_seed(0)
    v, out = torch.randn(6, 2, 5, 4, generator=drawn), torch.randn(6, 2, 5, 4, generator=drawn) + 3
    v[:, 1] = 0
    sums = Moments.empty(2, 3)
    sums.add(v, out, 3)
    for ridge in (0.0, 1e-3):
        weights = sums.solve(ridge)
        assert weights[1].tolist() == pytest.approx([0] * 9 + [float(out[:, 1].double().mean())])
        assert (weights[0, :-1] != 0).all()


def test_a_head_that_is_a_convolution_is_found_as_that_convolution() -> None:
    drawn = torch.Generator().manual_seed(0)
    v, true = torch.randn(8, 3, 6, 6, generator=drawn), torch.randn(3, 1, 3, 3, generator=drawn)
    out = torch.nn.functional.conv2d(v, true, torch.tensor([1.0, 2.0, 3.0]), padding=1, groups=3)
    sums = Moments.empty(3, 3)
    sums.add(v, out, 3)
    weights = sums.solve(0.0)
    weight, bias = kernels(weights, 3, [2, 0])
    torch.testing.assert_close(weight, true[[2, 0]])
    torch.testing.assert_close(bias, torch.tensor([3.0, 1.0]))
    assert sums.explained(weights, 3) == pytest.approx([1, 1, 1])
