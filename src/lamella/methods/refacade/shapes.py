"""Solids seen from the front: covered pixels, surface normals, and surface coordinates.

Each solid is an implicit function that is negative inside. Rays run along the z axis into the image; the first sign
change is bracketed on a grid and located by bisection.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Kind = Literal["ellipsoid", "box", "torus"]

DEPTHS, HALVINGS = 28, 12  # grid points along a ray, and number of bisections


class Surface(NamedTuple):
    """The visible surface, per pixel.

    Attributes:
        mask: pixels that see the solid [height, width].
        normals: unit normals, +z towards the viewer [height, width, 3]; zero elsewhere.
        uv: surface coordinates, in units of length [height, width, 2].
        height: z [height, width]; -1 elsewhere.
    """

    mask: NDArray[np.bool_]
    normals: Floats
    uv: Floats
    height: Floats


@dataclass(frozen=True)
class Solid:
    """A solid.

    Attributes:
        kind: a super-ellipsoid, a box with round edges, or a torus.
        sizes: half axes; for a torus, the radii of ring and tube, and 0.
        power: exponent of the super-ellipsoid; 2 is an ellipsoid.
        angles: rotations about x, y and z, in this order.
        centre: x and y; the image covers [-1, 1].
    """

    kind: Kind
    sizes: tuple[float, float, float]
    power: float
    angles: tuple[float, float, float]
    centre: tuple[float, float]

    @classmethod
    def random(cls, rng: np.random.Generator, kind: Kind) -> Solid:
        """Draw a random solid within the image.

        Args:
            rng: random number generator.
            kind: kind of the solid.
        """
        if kind == "torus":
            ring = rng.uniform(0.38, 0.5)
            sizes = (ring, rng.uniform(0.16, 0.24), 0.0)
        elif kind == "box":
            sizes = tuple(rng.uniform(0.36, 0.56, 3).tolist())
        else:
            sizes = tuple(rng.uniform(0.4, 0.68, 3).tolist())
        tilt = rng.uniform(-0.7, 0.7, 2) if kind == "torus" else rng.uniform(-np.pi, np.pi, 2)
        angles = (float(tilt[0]), float(tilt[1]), float(rng.uniform(-np.pi, np.pi)))
        power = float(rng.uniform(2, 4))
        return cls(kind, sizes, power, angles, tuple(rng.uniform(-0.12, 0.12, 2).tolist()))

    def rotated(self, angle: float) -> Solid:
        """Return the solid rotated about its last axis."""
        x, y, z = self.angles
        return Solid(self.kind, self.sizes, self.power, (x, y, z + angle), self.centre)

    def surface(self, res: int) -> Surface:
        """Return the surface visible to res x res pixels."""
        ticks = (np.arange(res) + 0.5) / res * 2 - 1
        x, y = np.meshgrid(ticks - self.centre[0], -ticks - self.centre[1])  # y is up
        turn = rotation(self.angles)

        def solid(points: Floats) -> Floats:
            return FUNCTIONS[self.kind](points, self)

        def own(x: Floats, y: Floats, z: Floats) -> Floats:
            """Return points [..., 3] in the solid's coordinates."""
            return np.stack(np.broadcast_arrays(x, y, z), axis=-1) @ turn

        negative = solid(own(x, y, np.linspace(1, -1, DEPTHS)[:, None, None])) < 0  # [depths, height, width]
        mask = np.asarray(negative.any(axis=0))
        x, y, first = x[mask], y[mask], negative.argmax(axis=0)[mask]  # [pixels], from here on
        step = 2 / (DEPTHS - 1)
        near = 1 - (first - 1) * step  # outside
        far = near - step  # inside
        for _ in range(HALVINGS):
            middle = (near + far) / 2
            is_inside = solid(own(x, y, middle)) < 0
            near, far = np.where(is_inside, near, middle), np.where(is_inside, middle, far)
        points = own(x, y, far)
        slopes = gradient(solid, points)
        slopes /= np.linalg.norm(slopes, axis=-1, keepdims=True) + 1e-12
        found = Surface(mask, np.zeros((res, res, 3)), np.zeros((res, res, 2)), np.full((res, res), -1.0))
        found.normals[mask], found.uv[mask], found.height[mask] = slopes @ turn.T, self._uv(points, slopes), far
        return found

    def _uv(self, points: Floats, own: Floats) -> Floats:
        """Return surface coordinates that approximately preserve lengths.

        For a torus they run around the ring and around the tube; otherwise they are the two coordinates along which the
        normal does not point.
        """
        x, y, z = np.moveaxis(points, -1, 0)
        if self.kind == "torus":
            out = np.hypot(x, y) - self.sizes[0]
            return np.stack([np.arctan2(y, x) * self.sizes[0], np.arctan2(z, out) * self.sizes[1]], axis=-1)
        along = np.abs(own).argmax(axis=-1)
        return np.stack([np.choose(along, [y, x, x]), np.choose(along, [z, z, y])], axis=-1)


def rotation(angles: tuple[float, float, float]) -> Floats:
    """Return the matrix R_z R_y R_x, from the solid's coordinates to those of the image."""
    (cx, cy, cz), (sx, sy, sz) = np.cos(angles), np.sin(angles)
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


def gradient(function: Callable[[Floats], Floats], points: Floats, step: float = 1e-4) -> Floats:
    """Return the gradient of a function by central differences [..., 3].

    Args:
        function: maps points [..., 3] to values [...].
        points: where to compute it [..., 3].
        step: half the distance between the two evaluations.
    """
    return np.stack([(function(points + e) - function(points - e)) / (2 * step) for e in step * np.eye(3)], axis=-1)


def _ellipsoid(points: Floats, shape: Solid) -> Floats:
    scaled = np.abs(points / np.array(shape.sizes))
    return (scaled**shape.power).sum(axis=-1) - 1


def _box(points: Floats, shape: Solid) -> Floats:
    rounding = 0.3 * min(shape.sizes)
    beyond = np.abs(points) - np.array(shape.sizes) + rounding
    outside = np.linalg.norm(beyond.clip(0), axis=-1) + np.minimum(beyond.max(axis=-1), 0)
    return outside - rounding


def _torus(points: Floats, shape: Solid) -> Floats:
    ring, tube, _ = shape.sizes
    x, y, z = np.moveaxis(points, -1, 0)
    return np.hypot(np.hypot(x, y) - ring, z) - tube


FUNCTIONS: dict[str, Callable[[Floats, Solid], Floats]] = {"ellipsoid": _ellipsoid, "box": _box, "torus": _torus}
