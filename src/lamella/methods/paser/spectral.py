"""Clusters of points by diffusion and non-negative factors: groups follow the shape of the data, not its centres.

    A_ij = exp(-|e_i - e_j|^2 / 2 sigma^2)      affinity, sigma the median distance
    I - D^-1 A                                  its K smallest eigenvectors are U [n, K]
    |U U^T| ~ W H,  W, H >= 0                   a point belongs to the column where its row of W is largest

The random-walk Laplacian has the spectrum of I - D^-1/2 A D^-1/2, whose eigenvectors times D^-1/2 are its own; so a
symmetric solver does. Beyond a few thousand points some of them, the landmarks, are clustered, and every other point
joins the nearest landmark's cluster.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lamella.errors import LamellaError
from lamella.extras import require

Graph = Literal["dense", "knn"]
FLAT = 1e-8  # eigenvalues that differ by less are all 0: the graph falls into more pieces than may be told apart
LANDMARKS = 2000  # points whose n x n matrices are made: 32 MB each


@dataclass(frozen=True)
class Clusters:
    """Points in groups.

    Attributes:
        labels: the group of each point [n], from 0.
        eigenvalues: the smallest ones of the Laplacian, in rising order.
        landmarks: how many points were clustered themselves.
    """

    labels: NDArray[np.int64]
    eigenvalues: NDArray[np.float64]
    landmarks: int


def spectral_clusters(
    points: NDArray[np.floating[Any]],
    count: int | None = None,
    *,
    most: int = 10,
    graph: Graph = "knn",
    neighbours: int = 20,
    seed: int = 0,
) -> Clusters:
    """Group points.

    Args:
        points: [n, d].
        count: K; left out, it is where the gap between eigenvalues is largest, from 2 to ``most``.
        graph: ``knn``: affinities between nearest neighbours alone, which follow winding shapes and leave clear gaps
            between eigenvalues; or ``dense``, between all points, which is the paper's kernel.
        neighbours: of each point, with ``knn``; mutual or not.
        seed: of the choice of landmarks.

    Raises:
        LamellaError: when scikit-learn is missing, or there are too few points.
    """
    check_scikit_learn()
    from sklearn.decomposition import NMF
    from sklearn.metrics import pairwise_distances_argmin

    n = len(points)
    if n < 3 or not (count is None or 1 <= count < n):
        raise LamellaError(f"{n} points cannot make {count or 'any'} clusters: give more points, or fewer clusters")
    chosen = np.arange(n)
    if n > LANDMARKS:
        chosen = np.sort(np.random.default_rng(seed).choice(n, LANDMARKS, replace=False))
    wide = np.asarray(points, dtype=np.float64)
    marks = wide[chosen]
    affinity = _dense(marks) if graph == "dense" else _nearest(marks, neighbours)
    values, vectors = _smallest(affinity, min(most + 1, len(marks) - 1) if count is None else max(count, 2))
    if count is None:
        gaps = np.diff(values)[1:]  # after 2, 3, ... eigenvalues
        count = 2 + int(np.argmax(gaps)) if gaps.max() > FLAT else len(values) - 1
    u = vectors[:, :count]
    similarity = np.abs(u @ u.T)
    factors = NMF(count, init="nndsvda", random_state=0, max_iter=500, tol=1e-5)
    with warnings.catch_warnings():  # that factors could still be improved: the largest entries have settled by then
        warnings.simplefilter("ignore")
        weights = factors.fit_transform(similarity / similarity.max())
    weights = weights * np.linalg.norm(factors.components_, axis=1)  # W and H share a scale that means nothing
    labels = np.unique(np.argmax(weights, axis=1), return_inverse=True)[1]
    if n > LANDMARKS:
        labels = labels[pairwise_distances_argmin(wide, marks)]
    return Clusters(labels.astype(np.int64), values, len(marks))


def check_scikit_learn() -> None:
    """Raise a :class:`LamellaError` when scikit-learn is not installed."""
    require("sklearn", "select", "clustering")


def _dense(points: NDArray[np.float64]) -> NDArray[np.float64]:
    from scipy.spatial.distance import pdist, squareform

    distances = pdist(points)
    sigma = np.median(distances) or 1.0
    affinity: NDArray[np.float64] = squareform(np.exp(-(distances**2) / (2 * sigma**2)))
    np.fill_diagonal(affinity, 1.0)
    return affinity


def _nearest(points: NDArray[np.float64], neighbours: int) -> NDArray[np.float64]:
    """Affinities between neighbours, symmetrised; all others are 0."""
    from sklearn.neighbors import kneighbors_graph

    distances = kneighbors_graph(points, min(neighbours, len(points) - 1), mode="distance")
    sigma = np.median(distances.data) or 1.0
    distances.data = np.exp(-(distances.data**2) / (2 * sigma**2))
    affinity: NDArray[np.float64] = distances.maximum(distances.T).toarray()
    np.fill_diagonal(affinity, 1.0)
    return affinity


def _smallest(affinity: NDArray[np.float64], count: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The smallest eigenvalues of the random-walk Laplacian, and its eigenvectors [n, count]."""
    from scipy.linalg import eigh

    root = 1 / np.sqrt(affinity.sum(axis=1))
    symmetric = np.eye(len(affinity)) - root[:, None] * affinity * root[None]
    values, vectors = eigh(symmetric, subset_by_index=(0, count - 1))
    return values, vectors * root[:, None]
