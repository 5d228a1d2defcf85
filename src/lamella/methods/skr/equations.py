"""Families of linear systems from partial differential equations with random parameters.

All are flux-conservative finite volumes on the unit square or cube with a Dirichlet boundary: cells of width h = 1 /
grid, harmonic means of the coefficient on faces. The authors' scripts use a stencil that is not conservative; see the
page. A system is assembled on access from its parameters, which depend on the seed and its index and are drawn on
access, too: a family of any size needs the memory of one system.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from lamella.errors import LamellaError
from lamella.methods.skr.rows import LazyRows, Rows

Array = NDArray[np.float64]


class EquationFamily(NamedTuple):
    """The parameters of a family of systems.

    Attributes:
        parameters: the parameters of all systems, as blocks [N, ...].
        assemble: builds A and b from the parameters of one system; must be picklable for other processes.
        description: the origin of the systems, for provenance.
    """

    parameters: tuple[Rows, ...]
    assemble: Callable[..., tuple[Any, Array]]
    description: dict[str, Any]


@dataclass(frozen=True)
class GaussianField:
    """A periodic Gaussian random field g by FFT, with covariance (tau^2 - Laplacian)^-alpha and mean 0.

    Attributes:
        alpha: exponent of the covariance; the authors use 2.5.
        tau: inverse length scale; the authors use 7.
    """

    alpha: float = 2.5
    tau: float = 7.0

    def draw(self, random: np.random.Generator, shape: tuple[int, ...]) -> Array:
        """Draw one field; its eigenvalues are those of the authors' code (in two dimensions).

        Args:
            random: the random number generator.
            shape: the shape of the field.
        """
        d, cells = len(shape), np.prod(shape)
        waves = np.meshgrid(*(np.fft.fftfreq(s, 1 / s) for s in shape), indexing="ij")
        sigma = self.tau ** ((2 * self.alpha - d) / 2)
        energy = 4 * np.pi**2 * sum(wave**2 for wave in waves) + self.tau**2
        root = cells * np.sqrt(2) * sigma * energy ** (-self.alpha / 2)
        root[(0,) * d] = 0.0
        noise = random.standard_normal(shape) + 1j * random.standard_normal(shape)
        return np.fft.ifftn(root * noise).real


def darcy(
    grid: int, count: int, *, dimensions: int = 2, field: GaussianField | None = None, seed: int = 0
) -> EquationFamily:
    """Draw -div(a grad u) = 1 with a = exp(g), g a Gaussian field; sorted by a [grid, grid] or [grid, grid, grid].

    Args:
        grid: cells along each side, so n = grid ** dimensions.
        count: number of systems.
        dimensions: 2 or 3.
        field: distribution of g; the authors' if None.
        seed: random seed.
    """
    shape = _shape(grid, count, dimensions)
    coefficients = LazyRows(partial(_log_normal, field or GaussianField(), shape, seed), (count, *shape))
    description = {"equation": "darcy", "grid": grid, "count": count, "dimensions": dimensions, "seed": seed}
    description |= {"field": repr(field or GaussianField())}
    return EquationFamily((coefficients,), _Darcy(), description)


def clustered_darcy(
    grid: int, count: int, *, clusters: int = 4, contrast: float = 85.0, spread: float = 0.1, seed: int = 0
) -> EquationFamily:
    """Draw Darcy fields around a few centres in random order, a family for which sorting pays off.

    Args:
        grid: cells along each side.
        count: number of systems.
        clusters: number of centres.
        contrast: max a / min a of each centre.
        spread: standard deviation of a member's own field, relative to that of its centre.
        seed: random seed.
    """
    shape, random = _shape(grid, count, 2), _random(seed, count)
    centres = [GaussianField().draw(random, shape) for _ in range(clusters)]
    centres = [g * np.log(contrast) / np.ptp(g) for g in centres]
    chosen = [int(random.integers(clusters)) for _ in range(count)]
    fields = LazyRows(partial(_clustered, centres, chosen, spread, seed), (count, *shape))
    description = {"equation": "clustered darcy", "grid": grid, "count": count, "clusters": clusters}
    description |= {"contrast": contrast, "spread": spread, "seed": seed}
    return EquationFamily((fields,), _Darcy(), description)


def poisson(grid: int, count: int, *, seed: int = 0) -> EquationFamily:
    """Draw -div grad u = b with random b: the matrix never changes, as in two of the paper's four datasets.

    Args:
        grid: cells along each side.
        count: number of systems.
        seed: random seed.
    """
    shape = _shape(grid, count, 2)
    sources = LazyRows(partial(_normal, GaussianField(), shape, seed), (count, *shape))
    description = {"equation": "poisson, one matrix", "grid": grid, "count": count, "seed": seed}
    return EquationFamily((sources,), _Poisson(), description)


def helmholtz(
    grid: int,
    count: int,
    *,
    dimensions: int = 2,
    wavenumber: tuple[float, float] = (6.0, 10.0),
    medium: GaussianField | None = GaussianField(),
    seed: int = 0,
) -> EquationFamily:
    """Draw -div grad u - kappa^2 w u = 1, sorted by the medium w and by kappa.

    It is indefinite once kappa exceeds about pi times the root of the dimensions: 4.4, or 5.4.

    Args:
        grid: cells along each side.
        count: number of systems.
        dimensions: 2 or 3.
        wavenumber: kappa is uniform in this range. The authors use (0, 1).
        medium: distribution of log w; None for w = 1, and then kappa is the only parameter.
        seed: random seed.
    """
    shape = _shape(grid, count, dimensions)
    kappa = np.array([_random(seed, i).uniform(*wavenumber) for i in range(count)])
    description = {"equation": "helmholtz", "grid": grid, "count": count, "wavenumber": list(wavenumber), "seed": seed}
    description |= {"dimensions": dimensions, "medium": repr(medium)}
    if medium is None:
        return EquationFamily((kappa,), _Helmholtz(shape), description)
    w = LazyRows(partial(_medium, medium, wavenumber, shape, seed), (count, *shape))
    return EquationFamily((kappa, w), _Helmholtz(shape), description)


def convection(grid: int, count: int, *, speed: float = 200.0, seed: int = 0) -> EquationFamily:
    """Draw -div grad u + c . grad u = 1, upwind, with c of fixed speed in a random direction: neighbours share little.

    Args:
        grid: cells along each side.
        count: number of systems.
        speed: |c|; the cell Peclet number is speed / grid.
        seed: random seed.
    """
    _shape(grid, count, 2)
    angles = np.array([_random(seed, i).uniform(0, 2 * np.pi) for i in range(count)])
    description = {"equation": "rotating convection", "grid": grid, "count": count, "speed": speed, "seed": seed}
    direction = np.stack(
        [np.cos(angles), np.sin(angles)], axis=1
    )  # [count, 2]: as angles, 0 and 2 pi would be far apart
    return EquationFamily((direction,), _Convection(grid, speed), description)


FAMILIES: dict[str, Callable[..., EquationFamily]] = {
    "darcy": darcy,
    "clustered-darcy": clustered_darcy,
    "poisson": poisson,
    "helmholtz": helmholtz,
    "convection": convection,
}


def family(text: str) -> EquationFamily:
    """Draw a family from its description, such as ``darcy:grid=32,count=8``.

    Raises:
        LamellaError: for an unknown family or setting.
    """
    name, _, settings = text.partition(":")
    if name not in FAMILIES:
        raise LamellaError(f"'{text}' is no file, folder or family; families are: {', '.join(FAMILIES)}")
    options: dict[str, Any] = {"grid": 32, "count": 8}
    for part in filter(None, settings.split(",")):
        key, _, value = part.partition("=")
        if key not in ("grid", "count", "seed", "dimensions", "clusters"):
            raise LamellaError(
                f"{text}: unknown setting '{key}'; settings are grid, count, seed, dimensions and clusters"
            )
        try:
            options[key] = int(value)
        except ValueError:
            raise LamellaError(f"{text}: {key} is '{value}'; give a whole number") from None
    try:
        return FAMILIES[name](**options)
    except TypeError:
        raise LamellaError(f"{text}: the family '{name}' does not take all of {', '.join(options)}") from None


def _normal(field: GaussianField, shape: tuple[int, ...], seed: int, index: int) -> Array:
    return field.draw(_random(seed, index), shape)


def _log_normal(field: GaussianField, shape: tuple[int, ...], seed: int, index: int) -> Array:
    return np.exp(_normal(field, shape, seed, index))


def _clustered(centres: Sequence[Array], chosen: Sequence[int], spread: float, seed: int, index: int) -> Array:
    centre = centres[chosen[index]]
    local = _normal(GaussianField(), centre.shape, seed, index)
    return np.exp(centre + local * spread * centre.std() / local.std())


def _medium(
    medium: GaussianField, wavenumber: tuple[float, float], shape: tuple[int, ...], seed: int, index: int
) -> Array:
    random = _random(seed, index)
    random.uniform(*wavenumber)  # kappa, which is drawn first
    return np.exp(medium.draw(random, shape))


def _random(seed: int, index: int) -> np.random.Generator:
    """Return the generator of one system, so that a larger family begins with the same systems."""
    return np.random.default_rng([seed, index])


def _shape(grid: int, count: int, dimensions: int) -> tuple[int, ...]:
    if grid < 2 or count < 1 or dimensions not in (2, 3):
        raise LamellaError(
            f"a family of {count} systems on a grid of {grid} in {dimensions} dimensions; "
            "give at least one system, two cells per side, and 2 or 3 dimensions"
        )
    return (grid,) * dimensions


def fluxes(a: Array) -> Any:
    """Return the matrix of -div(a grad .) [n, n] for cell values a, with zero on the boundary, half a cell away."""
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
        """Return the upwind difference c du/dx [grid, grid]."""
        ones = np.ones(self.grid)
        difference = sparse.diags_array([ones, -ones[1:]], offsets=[0, -1])
        return abs(c) * self.grid * (difference if c >= 0 else difference.T)
