"""Spectral clustering by diffusion and non-negative factors: clusters follow the shape of the data, not its centres.

    A_ij = exp(-|e_i - e_j|^2 / 2 sigma^2)      affinity, sigma the median distance
    I - D^-1 A                                  its eigenvectors of the K smallest eigenvalues are U [n, K]
    |U U^T| ~ W H,  W, H >= 0                   a point belongs to the column where its row of W is largest

The random-walk Laplacian has the spectrum of I - D^-1/2 A D^-1/2, and its eigenvectors are those times D^-1/2, so a
symmetric solver suffices. Of more than 2000 points a random subset, the landmarks, is clustered, and every other point
joins the cluster of its nearest landmark.
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
FLAT = 1e-8  # gaps below this are rounding: more clusters are far apart than eigenvalues were computed
LANDMARKS = 2000  # number of points whose n x n matrices are computed: 32 MB each


@dataclass(frozen=True)
class Clusters:
    """A clustering of points.

    Attributes:
        labels: the cluster of each point [n], from 0.
        eigenvalues: the smallest eigenvalues of the Laplacian, in rising order.
        landmarks: number of points that were clustered directly.
    """

    labels: NDArray[np.int64]
    eigenvalues: NDArray[np.float64]
    landmarks: int


def spectral_clusters(
    points: NDArray[np.floating[Any]],
    count: int | None = None,
    *,
    most: int = 10,
    graph: Graph = "dense",
    neighbours: int = 20,
    seed: int = 0,
) -> Clusters:
    """Cluster points.

    Args:
        points: [n, d].
        count: K; if None, it is where the gap between eigenvalues is largest, from 2 to ``most``.
        most: largest number of clusters if ``count`` is None.
        graph: ``dense``: affinities between all points, the paper's kernel; or ``knn``, between nearest neighbours
            alone, which follow curved shapes and leave clear gaps between eigenvalues.
        neighbours: neighbours of each point, with ``knn``; mutual or not. They are doubled until the graph has no more
            components than there may be clusters, since all components have the eigenvalue 0.
        seed: random seed of the choice of landmarks.

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
    affinity = _dense(marks) if graph == "dense" else _nearest(marks, neighbours, count or most)
    values, vectors = _smallest(affinity, min(most + 1, len(marks) - 1) if count is None else max(count, 2))
    if count is None:
        gaps = np.diff(values)[1:]  # after 2, 3, ... eigenvalues
        count = 2 + int(np.argmax(gaps)) if gaps.max(initial=0) > FLAT else max(len(values) - 1, 2)
    u = vectors[:, :count]
    similarity = np.abs(u @ u.T)
    factors = NMF(count, init="nndsvda", random_state=0, max_iter=500, tol=1e-5)
    with warnings.catch_warnings():  # on convergence of the factors: their largest entries have settled by then
        warnings.simplefilter("ignore")
        weights = factors.fit_transform(similarity / similarity.max())
    weights = weights * np.linalg.norm(factors.components_, axis=1)  # the scale between W and H is arbitrary
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


def _nearest(points: NDArray[np.float64], neighbours: int, components: int) -> NDArray[np.float64]:
    """Return the affinities between nearest neighbours, symmetrised, in at most ``components`` components."""
    from scipy.sparse.csgraph import connected_components
    from sklearn.neighbors import kneighbors_graph

    others = len(points) - 1
    distances = kneighbors_graph(points, min(neighbours, others), mode="distance")
    while connected_components(distances, directed=False)[0] > components:
        neighbours *= 2
        distances = kneighbors_graph(points, min(neighbours, others), mode="distance")
    sigma = np.median(distances.data) or 1.0
    distances.data = np.exp(-(distances.data**2) / (2 * sigma**2))
    affinity: NDArray[np.float64] = distances.maximum(distances.T).toarray()
    np.fill_diagonal(affinity, 1.0)
    return affinity


def _smallest(affinity: NDArray[np.float64], count: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the smallest eigenvalues of the random-walk Laplacian, and its eigenvectors [n, count]."""
    from scipy.linalg import eigh

    root = 1 / np.sqrt(affinity.sum(axis=1))
    symmetric = np.eye(len(affinity)) - root[:, None] * affinity * root[None]
    values, vectors = eigh(symmetric, subset_by_index=(0, count - 1))
    return values, vectors * root[:, None]
