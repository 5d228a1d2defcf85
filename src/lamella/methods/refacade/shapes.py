"""Solids seen from the front: which pixels they cover, which way their surface faces there, and where on it they are.

Each is a function of space that is negative inside. Rays go along the z axis into the picture; the first place where
the sign changes is bracketed on a grid and halved until it is known.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Kind = Literal["ellipsoid", "box", "torus"]

DEPTHS, HALVINGS = 28, 12  # along a ray: the first grid, and how often its cell is halved


class Surface(NamedTuple):
    """What the pixels of a picture see.

    Attributes:
        mask: which of them see the solid [height, width].
        normals: of unit length, towards the viewer is +z [height, width, 3]; zero where nothing is seen.
        uv: where on the surface, in lengths [height, width, 2].
        height: z [height, width]; -1 where nothing is seen.
    """

    mask: NDArray[np.bool_]
    normals: Floats
    uv: Floats
    height: Floats


@dataclass(frozen=True)
class Shape:
    """A solid.

    Attributes:
        kind: a super-ellipsoid, a box with round edges, or a torus.
        sizes: half axes; of a torus, its ring, its tube, and nothing.
        power: of the super-ellipsoid; 2 is an ellipsoid.
        angles: of its turns about x, y and z, in this order.
        centre: x and y; the picture reaches from -1 to 1.
    """

    kind: Kind
    sizes: tuple[float, float, float]
    power: float
    angles: tuple[float, float, float]
    centre: tuple[float, float]

    @classmethod
    def drawn(cls, drawn: np.random.Generator, kind: Kind) -> Shape:
        """One by chance; it lies within the picture."""
        if kind == "torus":
            ring = drawn.uniform(0.38, 0.5)
            sizes = (ring, drawn.uniform(0.16, 0.24), 0.0)
        elif kind == "box":
            sizes = tuple(drawn.uniform(0.36, 0.56, 3).tolist())
        else:
            sizes = tuple(drawn.uniform(0.4, 0.68, 3).tolist())
        tilt = drawn.uniform(-0.7, 0.7, 2) if kind == "torus" else drawn.uniform(-np.pi, np.pi, 2)
        angles = (float(tilt[0]), float(tilt[1]), float(drawn.uniform(-np.pi, np.pi)))
        power = float(drawn.uniform(2, 4))
        return cls(kind, sizes, power, angles, tuple(drawn.uniform(-0.12, 0.12, 2).tolist()))

    def turned(self, angle: float) -> Shape:
        """The same, turned about its last axis."""
        x, y, z = self.angles
        return Shape(self.kind, self.sizes, self.power, (x, y, z + angle), self.centre)

    def seen(self, res: int) -> Surface:
        """The surface that res x res pixels see."""
        ticks = (np.arange(res) + 0.5) / res * 2 - 1
        x, y = np.meshgrid(ticks - self.centre[0], -ticks - self.centre[1])  # y is up
        turn = rotation(self.angles)

        def solid(points: Floats) -> Floats:
            return FUNCTIONS[self.kind](points, self)

        def own(x: Floats, y: Floats, z: Floats) -> Floats:
            """Points [..., 3] in the solid's own space."""
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
        """Places on the surface: around the ring and around the tube; else the two coordinates that a normal does not
        point along, which keeps lengths nearly as they are."""
        x, y, z = np.moveaxis(points, -1, 0)
        if self.kind == "torus":
            out = np.hypot(x, y) - self.sizes[0]
            return np.stack([np.arctan2(y, x) * self.sizes[0], np.arctan2(z, out) * self.sizes[1]], axis=-1)
        along = np.abs(own).argmax(axis=-1)
        return np.stack([np.choose(along, [y, x, x]), np.choose(along, [z, z, y])], axis=-1)


def rotation(angles: tuple[float, float, float]) -> Floats:
    """The matrix R_z R_y R_x, by which own coordinates become those of the picture."""
    (cx, cy, cz), (sx, sy, sz) = np.cos(angles), np.sin(angles)
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


def gradient(function: Callable[[Floats], Floats], points: Floats, step: float = 1e-4) -> Floats:
    """By central differences."""
    return np.stack([(function(points + e) - function(points - e)) / (2 * step) for e in step * np.eye(3)], axis=-1)


def _ellipsoid(points: Floats, shape: Shape) -> Floats:
    scaled = np.abs(points / np.array(shape.sizes))
    return (scaled**shape.power).sum(axis=-1) - 1


def _box(points: Floats, shape: Shape) -> Floats:
    rounding = 0.3 * min(shape.sizes)
    beyond = np.abs(points) - np.array(shape.sizes) + rounding
    outside = np.linalg.norm(beyond.clip(0), axis=-1) + np.minimum(beyond.max(axis=-1), 0)
    return outside - rounding


def _torus(points: Floats, shape: Shape) -> Floats:
    ring, tube, _ = shape.sizes
    x, y, z = np.moveaxis(points, -1, 0)
    return np.hypot(np.hypot(x, y) - ring, z) - tube


FUNCTIONS: dict[str, Callable[[Floats, Shape], Floats]] = {"ellipsoid": _ellipsoid, "box": _box, "torus": _torus}
