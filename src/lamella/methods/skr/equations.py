"""Families of linear systems from partial differential equations, drawn from one distribution of parameters.

All are flux-conservative finite volumes on the unit square or cube with a Dirichlet boundary: cells of width h = 1 /
grid, harmonic means of the coefficient on faces. The authors' scripts use a stencil that is not conservative; see the
page. A system is made when it is asked for, from its parameters, which come from the seed and its own number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from lamella.errors import LamellaError

Array = NDArray[np.float64]


class Drawn(NamedTuple):
    """A family as it was drawn.

    Attributes:
        parameters: of all systems, as blocks [N, ...].
        assemble: makes A and b of the parameters of one system; other processes get it, so it must be picklable.
        description: where they come from, for provenance.
    """

    parameters: tuple[Array, ...]
    assemble: Callable[..., tuple[Any, Array]]
    description: dict[str, Any]


@dataclass(frozen=True)
class GaussianField:
    """A periodic Gaussian random field g by FFT, with covariance (tau^2 - Laplacian)^-alpha and mean 0.

    Attributes:
        alpha, tau: the authors' 2.5 and 7.
    """

    alpha: float = 2.5
    tau: float = 7.0

    def draw(self, random: np.random.Generator, shape: tuple[int, ...]) -> Array:
        """One field of this shape; its eigenvalues are those of the authors' code (in two dimensions)."""
        d, cells = len(shape), np.prod(shape)
        waves = np.meshgrid(*(np.fft.fftfreq(s, 1 / s) for s in shape), indexing="ij")
        sigma = self.tau ** ((2 * self.alpha - d) / 2)
        energy = 4 * np.pi**2 * sum(wave**2 for wave in waves) + self.tau**2
        root = cells * np.sqrt(2) * sigma * energy ** (-self.alpha / 2)
        root[(0,) * d] = 0.0
        noise = random.standard_normal(shape) + 1j * random.standard_normal(shape)
        return np.fft.ifftn(root * noise).real


def darcy(grid: int, count: int, *, dimensions: int = 2, field: GaussianField | None = None, seed: int = 0) -> Drawn:
    """-div(a grad u) = 1 with a = exp(g), g a Gaussian field; sorted on a [grid, grid] or [grid, grid, grid].

    Args:
        grid: cells along each side, so n = grid ** dimensions.
        count: systems.
        dimensions: 2 or 3.
        field: of g; the authors' by default.
    """
    shape = _shape(grid, count, dimensions)
    coefficients = [np.exp((field or GaussianField()).draw(_random(seed, i), shape)) for i in range(count)]
    described = {"equation": "darcy", "grid": grid, "count": count, "dimensions": dimensions, "seed": seed}
    described |= {"field": repr(field or GaussianField())}
    return Drawn((np.stack(coefficients),), _Darcy(), described)


def clustered_darcy(
    grid: int, count: int, *, clusters: int = 4, contrast: float = 85.0, spread: float = 0.1, seed: int = 0
) -> Drawn:
    """Darcy fields around a few centres, in random order: what sorting is for.

    Args:
        clusters: how many centres.
        contrast: max a / min a of each centre.
        spread: standard deviation of a member's own field, in those of its centre.
    """
    shape, random = _shape(grid, count, 2), _random(seed, count)
    centres = [GaussianField().draw(random, shape) for _ in range(clusters)]
    centres = [g * np.log(contrast) / np.ptp(g) for g in centres]
    fields = []
    for i in range(count):
        centre, own = centres[random.integers(clusters)], GaussianField().draw(_random(seed, i), shape)
        fields.append(np.exp(centre + own * spread * centre.std() / own.std()))
    described = {"equation": "clustered darcy", "grid": grid, "count": count, "clusters": clusters}
    described |= {"contrast": contrast, "spread": spread, "seed": seed}
    return Drawn((np.stack(fields),), _Darcy(), described)


def poisson(grid: int, count: int, *, seed: int = 0) -> Drawn:
    """-div grad u = b with random b: the matrix never changes, as in two of the paper's four datasets."""
    shape = _shape(grid, count, 2)
    sources = np.stack([GaussianField().draw(_random(seed, i), shape) for i in range(count)])
    described = {"equation": "poisson, one matrix", "grid": grid, "count": count, "seed": seed}
    return Drawn((sources,), _Poisson(), described)


def helmholtz(
    grid: int,
    count: int,
    *,
    dimensions: int = 2,
    wavenumber: tuple[float, float] = (6.0, 10.0),
    medium: GaussianField | None = GaussianField(),
    seed: int = 0,
) -> Drawn:
    """-div grad u - kappa^2 w u = 1, sorted on the medium w and on kappa.

    It is indefinite once kappa passes about pi times the root of the dimensions: 4.4, or 5.4.

    Args:
        dimensions: 2 or 3.
        wavenumber: kappa is drawn evenly from this range. The authors draw it from (0, 1).
        medium: of log w; None for w = 1, and then kappa alone is the parameter.
    """
    shape = _shape(grid, count, dimensions)
    draws = [_random(seed, i) for i in range(count)]
    kappa = np.array([random.uniform(*wavenumber) for random in draws])
    described = {"equation": "helmholtz", "grid": grid, "count": count, "wavenumber": list(wavenumber), "seed": seed}
    described |= {"dimensions": dimensions, "medium": repr(medium)}
    if medium is None:
        return Drawn((kappa,), _Helmholtz(shape), described)
    w = np.stack([np.exp(medium.draw(random, shape)) for random in draws])
    return Drawn((kappa, w), _Helmholtz(shape), described)


def convection(grid: int, count: int, *, speed: float = 200.0, seed: int = 0) -> Drawn:
    """-div grad u + c . grad u = 1, upwind, with c of this speed in a random direction: neighbours share little.

    Args:
        speed: |c|; the cell Peclet number is speed / grid.
    """
    _shape(grid, count, 2)
    angles = np.array([_random(seed, i).uniform(0, 2 * np.pi) for i in range(count)])
    described = {"equation": "rotating convection", "grid": grid, "count": count, "speed": speed, "seed": seed}
    direction = np.stack([np.cos(angles), np.sin(angles)], axis=1)  # [count, 2]: an angle would tear 0 from 2 pi
    return Drawn((direction,), _Convection(grid, speed), described)


FAMILIES: dict[str, Callable[..., Drawn]] = {
    "darcy": darcy,
    "clustered-darcy": clustered_darcy,
    "poisson": poisson,
    "helmholtz": helmholtz,
    "convection": convection,
}


def family(text: str) -> Drawn:
    """A family by its words, such as ``darcy:grid=32,count=8``.

    Raises:
        LamellaError: for a family or a setting that there is not.
    """
    name, _, settings = text.partition(":")
    if name not in FAMILIES:
        raise LamellaError(f"no file, folder or family '{text}'; families are: {', '.join(FAMILIES)}")
    given: dict[str, Any] = {"grid": 32, "count": 8}
    for part in filter(None, settings.split(",")):
        key, _, value = part.partition("=")
        if key not in ("grid", "count", "seed", "dimensions", "clusters"):
            raise LamellaError(f"{text}: no setting '{key}'; there are grid, count, seed, dimensions and clusters")
        try:
            given[key] = int(value)
        except ValueError:
            raise LamellaError(f"{text}: {key} is '{value}'; give a whole number") from None
    try:
        return FAMILIES[name](**given)
    except TypeError:
        raise LamellaError(f"{text}: the family '{name}' does not take all of {', '.join(given)}") from None


def _random(seed: int, index: int) -> np.random.Generator:
    """Of one system, so that a family of more begins with the same ones."""
    return np.random.default_rng([seed, index])


def _shape(grid: int, count: int, dimensions: int) -> tuple[int, ...]:
    if grid < 2 or count < 1 or dimensions not in (2, 3):
        raise LamellaError(
            f"a family of {count} systems on a grid of {grid} in {dimensions} dimensions; "
            "give at least one system, two cells a side, and 2 or 3 dimensions"
        )
    return (grid,) * dimensions


def fluxes(a: Array) -> Any:
    """The matrix of -div(a grad .) [n, n] for cell values a, with zero on the boundary, half a cell away."""
    number = np.arange(a.size).reshape(a.shape)
    diagonal = np.zeros(a.shape)
    rows, columns, values = [], [], []
    for axis in range(a.ndim):
        h = 1 / a.shape[axis]
        left, right = (_side(a.ndim, axis, slice(None, -1)), _side(a.ndim, axis, slice(1, None)))
        face = 2 * a[left] * a[right] / (a[left] + a[right]) / h**2
        diagonal[left] += face
        diagonal[right] += face
        for end in (0, -1):
            edge = _side(a.ndim, axis, end)
            diagonal[edge] += 2 * a[edge] / h**2
        rows += [number[left].ravel(), number[right].ravel()]
        columns += [number[right].ravel(), number[left].ravel()]
        values += [-face.ravel(), -face.ravel()]
    rows.append(number.ravel())
    columns.append(number.ravel())
    values.append(diagonal.ravel())
    entries = np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))
    return sparse.coo_array(entries, shape=(a.size, a.size)).tocsr()


def _side(d: int, axis: int, which: Any) -> tuple[Any, ...]:
    return tuple(which if each == axis else slice(None) for each in range(d))


@dataclass(frozen=True)
class _Darcy:
    def __call__(self, a: Array) -> tuple[Any, Array]:
        return fluxes(a), np.ones(a.size)


@dataclass(frozen=True)
class _Poisson:
    def __call__(self, source: Array) -> tuple[Any, Array]:
        return fluxes(np.ones_like(source)), source.ravel()


@dataclass(frozen=True)
class _Helmholtz:
    shape: tuple[int, ...]

    def __call__(self, kappa: Array, w: Array | None = None) -> tuple[Any, Array]:
        ones = np.ones(self.shape)
        shift = float(kappa) ** 2 * (ones if w is None else w)
        return (fluxes(ones) - sparse.diags_array(shift.ravel())).tocsr(), ones.ravel()


@dataclass(frozen=True)
class _Convection:
    grid: int
    speed: float

    def __call__(self, direction: Array) -> tuple[Any, Array]:
        one = sparse.eye_array(self.grid)
        along = [self._upwind(self.speed * float(part)) for part in direction]
        wind = sparse.kron(along[0], one) + sparse.kron(one, along[1])
        return (fluxes(np.ones((self.grid, self.grid))) + wind).tocsr(), np.ones(self.grid**2)

    def _upwind(self, c: float) -> Any:
        """c du/dx [grid, grid], from the side that the wind comes from."""
        ones = np.ones(self.grid)
        before = sparse.diags_array([ones, -ones[1:]], offsets=[0, -1])
        return abs(c) * self.grid * (before if c >= 0 else before.T)
