"""Step 1 of the paper: an order in which each system is close to the previous one (Algorithm 1).

d(i, j) = ||P_i - P_j||_F, summed over blocks if there are several: for Helmholtz the field and the wavenumber. An
optimal tour is not worth its cost: the invariant subspace of the small eigenvalues changes little as it is.

Parameters may not fit in memory. Distances are computed from inner products, which are kept in place of rows that are
longer than there are systems, and these are computed from a few rows at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lamella.errors import LamellaError
from lamella.methods.skr.rows import Rows, iterate, tiles

Array = NDArray[np.float64]
Index = NDArray[np.intp]
Order = Literal["greedy", "none", "random", "grouped-greedy", "gray", "hilbert"]

LARGE = 10_000  # above this, greedy works in groups: its cost is quadratic (section 4.1 of the paper)
GROUP = 1_000  # systems per group; the paper uses 10^3 to 10^4
BLOCK = 12  # lowest frequencies of a field along each axis, and of a vector; the authors' code
GRAY_AXES = 7  # principal axes, each cut in half; the authors' code
HILBERT_AXES, HILBERT_BITS = 3, 4  # ours: 16^3 cells


def arrange(parameters: tuple[Rows, ...], count: int, order: Order, seed: int = 0) -> Index:
    """Return the order of a family: the indices of the systems in the order of solving [N].

    Args:
        parameters: blocks [N, ...].
        count: N.
        order: ``greedy`` visits the nearest remaining system, starting at the first (in groups for more than 10 000);
            ``gray`` and ``hilbert`` visit cells of a few principal axes, greedily within a cell; ``none`` keeps the
            caller's order, ``random`` shuffles it.
        seed: random seed of ``random``.

    Raises:
        LamellaError: if there are no parameters to sort by.
    """
    if order == "none":
        return np.arange(count)
    if order == "random":
        return np.random.default_rng(seed).permutation(count)
    if not parameters:
        raise LamellaError(f"order '{order}' needs the parameters of the systems; give them, or use order 'none'")
    rows = [CentredRows(block) for block in parameters]
    if order == "greedy" and count <= LARGE:
        return nearest(rows, np.arange(count), 0)
    if order in ("greedy", "grouped-greedy"):
        return _chain_groups(rows, _groups(rows))
    cells = _gray_cells if order == "gray" else _hilbert_cells
    return _chain_groups(rows, _split(cells(features(parameters))))


class CentredRows:
    """The parameters of all systems as rows [N, p] around their mean, which reduces cancellation in distances.

    Args:
        block: the parameters [N, ...].
    """

    def __init__(self, block: Rows) -> None:
        self.block, self.width = block, math.prod(block.shape[1:])
        self.mean = sum(rows.sum(axis=0) for _, rows in iterate(block)) / len(block)

    def __getitem__(self, members: Index) -> Array:
        """Return the rows of some systems [members, p]."""
        return (self.block[members] - self.mean).reshape(len(members), self.width)

    def parts(self, members: Index) -> list[Index]:
        """Divide systems into parts whose rows fit in memory."""
        return [members[tile] for tile in tiles(self.block) if tile.start < len(members)]

    def distances(self, members: Index, other: int) -> Array:
        """Return the norms of the differences of systems from another [members]."""
        last = self[np.array([other])]
        return np.concatenate([np.linalg.norm(self[part] - last, axis=1) for part in self.parts(members)])

    def products(self, members: Index) -> tuple[Array, Callable[[int], Array]]:
        """Return the squared norms of the rows of systems [members], and a function to their products with one of them.

        Either their rows are kept, or all products, whichever is smaller.
        """
        if self.width <= len(members):
            rows = self[members]
            return np.einsum("ij,ij->i", rows, rows), lambda current: rows @ rows[current]
        gram = np.empty((len(members), len(members)))
        parts = self.parts(np.arange(len(members)))
        for number, first in enumerate(parts):
            rows = self[members[first]]
            for second in parts[number:]:
                products = rows @ self[members[second]].T
                gram[np.ix_(first, second)], gram[np.ix_(second, first)] = products, products.T
        return gram.diagonal(), gram.__getitem__


def nearest(rows: list[CentredRows], members: Index, start: int) -> Index:
    """Run Algorithm 1: visit the nearest remaining member, starting at ``start``; the first one among equals.

    Args:
        rows: the parameters, by block.
        members: the systems to arrange.
        start: one of them.
    """
    products = [block.products(members) for block in rows]
    remaining = np.ones(len(members), dtype=bool)
    current = int(np.flatnonzero(members == start)[0])
    sequence = []
    for _ in members:
        sequence.append(current)
        remaining[current] = False
        current = int(np.argmin(np.where(remaining, _distances(products, current), math.inf)))
    return members[sequence]


def _distances(products: list[tuple[Array, Callable[[int], Array]]], current: int) -> Array:
    """Return d(current, j) for all j, the sum of the blocks' norms."""
    parts = [square + square[current] - 2 * with_all(current) for square, with_all in products]
    return np.sum([np.sqrt(np.maximum(part, 0)) for part in parts], axis=0)


def _chain_groups(rows: list[CentredRows], groups: list[Index]) -> Index:
    """Arrange each group greedily, starting at the member closest to the end of the previous group."""
    sequence: list[Index] = []
    for members in groups:
        start = int(members[0])
        if sequence:
            last = int(sequence[-1][-1])
            distances = np.sum([block.distances(members, last) for block in rows], axis=0)
            start = int(members[np.argmin(distances)])
        sequence.append(nearest(rows, members, start))
    return np.concatenate(sequence)


def _groups(rows: list[CentredRows]) -> list[Index]:
    """Return groups of neighbours along the first principal axis."""
    everything = np.arange(len(rows[0].block))
    coordinates = _principal(np.hstack([block[everything] for block in rows]), 1)[:, 0]
    parts = math.ceil(len(coordinates) / GROUP)
    return list(np.array_split(np.argsort(coordinates, kind="stable"), parts))


def _split(cells: Index) -> list[Index]:
    """Return the systems of each cell, in the order of the cells."""
    by_cell = np.argsort(cells, kind="stable")
    return np.split(by_cell, np.flatnonzero(np.diff(cells[by_cell])) + 1)


def features(parameters: tuple[Rows, ...]) -> Array:
    """Return a few features of each system [N, f]: the lowest frequencies of its fields, real and imaginary parts."""
    parts = []
    for block in parameters:
        if block.ndim <= 2 and block[0].size <= 2:
            parts.append(np.asarray(block).reshape(len(block), -1))
            continue
        low = np.concatenate([_low_frequencies(rows) for _, rows in iterate(block)])
        parts += [low.real, low.imag]
    return np.hstack(parts)


def _low_frequencies(rows: Array) -> NDArray[np.complex128]:
    """Return the lowest frequencies of each row [rows, f]."""
    axes = tuple(range(1, rows.ndim))
    if rows.ndim == 2:
        return np.fft.fft(rows, axis=1)[:, :BLOCK]
    shifted = np.fft.fftshift(np.fft.fftn(rows, axes=axes), axes=axes)
    return shifted[(slice(None), *(_centre(size) for size in rows.shape[1:]))].reshape(len(rows), -1)


def _centre(size: int) -> slice:
    middle, half = size // 2, BLOCK // 2
    return slice(max(middle - half, 0), middle + half)


def _principal(X: Array, axes: int) -> Array:
    """Return the coordinates along the principal axes, scaled to [0, 1] [N, axes]; fewer if X has fewer."""
    X = X - X.mean(axis=0)
    gram = X.T @ X if X.shape[1] <= X.shape[0] else X @ X.T
    sizes, vectors = np.linalg.eigh(gram)
    vectors = vectors[:, ::-1][:, :axes]
    found = X @ vectors if X.shape[1] <= X.shape[0] else vectors * np.sqrt(np.maximum(sizes[::-1][:axes], 0))
    # The sign of an axis is arbitrary; the largest entry is made positive, so that every machine has the same order.
    found = found * np.where(found[np.abs(found).argmax(axis=0), range(found.shape[1])] < 0, -1, 1)
    low, width = found.min(axis=0), np.ptp(found, axis=0)
    return (found - low) / np.where(width > 0, width, 1)


def _gray_cells(X: Array) -> Index:
    """Return the index of each system's cell of 2^7 in binary-reflected Gray order: neighbours differ in one axis."""
    bits = (_principal(X, GRAY_AXES) >= 0.5).astype(np.intp)  # [N, axes]
    binary = np.cumsum(bits, axis=1) % 2  # the inverse of g = b xor (b >> 1), from the highest bit on
    return binary @ (1 << np.arange(bits.shape[1])[::-1])


def _hilbert_cells(X: Array) -> Index:
    """Return the index of each system's cell on a Hilbert curve (Skilling, "Programming the Hilbert curve", 2004)."""
    side = 1 << HILBERT_BITS
    cells = np.minimum((_principal(X, HILBERT_AXES) * side).astype(np.intp), side - 1)
    return np.array([_hilbert(cell.tolist(), HILBERT_BITS) for cell in cells])


def _hilbert(cell: list[int], bits: int) -> int:
    """Return the distance of a cell along the curve, by converting its axes to the transposed index."""
    x, axes = list(cell), len(cell)
    q = 1 << (bits - 1)
    while q > 1:
        for i in range(axes):
            if x[i] & q:
                x[0] ^= q - 1
            else:
                swap = (x[0] ^ x[i]) & (q - 1)
                x[0] ^= swap
                x[i] ^= swap
        q >>= 1
    for i in range(1, axes):
        x[i] ^= x[i - 1]
    flip, q = 0, 1 << (bits - 1)
    while q > 1:
        if x[-1] & q:
            flip ^= q - 1
        q >>= 1
    x = [value ^ flip for value in x]
    return sum(((x[i] >> bit) & 1) << (bit * axes + axes - 1 - i) for bit in range(bits) for i in range(axes))
