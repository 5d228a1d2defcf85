"""Clusters that follow the shape of the data."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from sklearn.cluster import KMeans
from sklearn.datasets import make_moons

from lamella.errors import LamellaError
from lamella.methods.paser import spectral, spectral_clusters


def accuracy(found: np.ndarray, true: np.ndarray) -> float:
    """The share of points in the right group, under the best naming of the groups."""
    names = range(max(found.max(), true.max()) + 1)
    return max(float((np.array(order)[found] == true).mean()) for order in permutations(names))


def blobs(count: int, each: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    centres = 8 * np.eye(count, 6)
    points = np.concatenate([centre + generator.normal(size=(each, 6)) for centre in centres])
    return points, np.repeat(np.arange(count), each)


def test_it_finds_two_moons_where_centres_do_not() -> None:
    points, true = make_moons(400, noise=0.05, random_state=0)
    found = spectral_clusters(points, 2, graph="knn", neighbours=15).labels
    centres = KMeans(2, n_init=10, random_state=0).fit_predict(points)
    assert accuracy(found, true) >= 0.95
    assert accuracy(centres, true) <= 0.9


@pytest.mark.parametrize("count", [3, 4, 5])
@pytest.mark.parametrize("graph", ["knn", "dense"])
def test_the_number_of_clusters_is_read_off_the_eigenvalues(count: int, graph: spectral.Graph) -> None:
    points, true = blobs(count, 40)
    found = spectral_clusters(points, graph=graph)
    assert found.labels.max() + 1 == count and accuracy(found.labels, true) == 1
    assert found.eigenvalues[0] == pytest.approx(0, abs=1e-9) and (np.diff(found.eigenvalues) >= 0).all()


def test_eigenvectors_are_those_of_the_random_walk() -> None:
    affinity = spectral._dense(blobs(3, 10)[0])
    values, vectors = spectral._smallest(affinity, 3)
    laplacian = np.eye(30) - affinity / affinity.sum(axis=1, keepdims=True)
    assert np.allclose(laplacian @ vectors, vectors * values, atol=1e-10)


def test_many_points_join_their_nearest_landmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectral, "LANDMARKS", 60)
    points, true = blobs(4, 100)
    runs = [spectral_clusters(points, graph="knn", seed=seed) for seed in (0, 0, 1)]
    assert all(accuracy(run.labels, true) == 1 and run.landmarks == 60 for run in runs)
    assert (runs[0].labels == runs[1].labels).all()


def test_more_pieces_than_can_be_distinguished_make_as_many_clusters_as_may_be() -> None:
    points = np.repeat(1000.0 * np.arange(16), 25)[:, None] + np.tile(np.arange(25.0), 16)[:, None]
    assert spectral_clusters(points, most=6, graph="knn", neighbours=10).labels.max() + 1 == 6


@pytest.mark.parametrize("given", [None, 3])
def test_more_pieces_than_clusters_are_joined_with_their_nearest(given: int | None) -> None:
    generator = np.random.default_rng(0)
    pieces = np.concatenate([12.0 * np.eye(3, 8).repeat(4, axis=0) + 2 * np.tile(np.eye(4, 8, 3), (3, 1))])
    points = pieces.repeat(30, axis=0) + 0.3 * generator.normal(size=(360, 8))
    found = spectral_clusters(points, given, most=8, graph="knn", neighbours=10)
    assert accuracy(found.labels, np.repeat(range(3), 120)) == 1


@pytest.mark.parametrize("graph", ["knn", "dense"])
def test_three_points_are_enough(graph: spectral.Graph) -> None:
    found = spectral_clusters(np.array([[0.0], [0.1], [5.0]]), graph=graph)
    assert accuracy(found.labels, np.array([0, 0, 1])) == 1


@pytest.mark.parametrize(("points", "count"), [(2, None), (5, 5), (5, 0)])
def test_too_few_points_are_refused(points: int, count: int | None) -> None:
    with pytest.raises(LamellaError, match="give more points"):
        spectral_clusters(np.zeros((points, 2)), count)
