"""Synthetic textured objects with ground truth: shape, texture, light and background are independent.

    image = albedo(u, v) (a + (1 - a) max(0, n . l))        a = 0.35; the untextured version has albedo 0.7 everywhere

The same shape under the same light can be rendered in any texture, so the ground truth of a retextured image and of the
untextured object are known.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from lamella.errors import MethodError
from lamella.methods.refacade.shapes import Floats, Kind, Solid, Surface

Pattern = Literal["stripes", "checks", "dots", "ramp", "waves", "bricks"]
Part = Literal["train", "test", "unseen"]
Pixels = NDArray[np.float32]  # from -1 to 1

AMBIENT, PLAIN = 0.35, 0.7  # a, and the albedo of the untextured object
TURN, LIGHT_TURN = 0.12, 0.18  # radians per frame
SHAPES: tuple[Kind, ...] = ("ellipsoid", "box")
PATTERNS: tuple[Pattern, ...] = ("stripes", "checks", "dots", "ramp", "waves")
UNSEEN_SHAPE: Kind = "torus"  # these two are in no training image
UNSEEN_PATTERN: Pattern = "bricks"


@dataclass(frozen=True)
class Texture:
    """Two colours in a pattern over a surface.

    Attributes:
        pattern: kind of pattern.
        colours: two RGB colours in [0, 1].
        frequency: periods per unit length.
        angle: rotation of the pattern.
        phase: offsets of the pattern in both directions; and directions and phases of the sum of ``waves``.
    """

    pattern: Pattern
    colours: tuple[tuple[float, ...], tuple[float, ...]]
    frequency: float
    angle: float
    phase: tuple[float, ...]

    @classmethod
    def random(cls, rng: np.random.Generator, pattern: Pattern) -> Texture:
        """Draw a random texture with two distinct colours.

        Args:
            rng: random number generator.
            pattern: the pattern of the texture.
        """
        first = rng.uniform(0.1, 1, 3)
        second = rng.uniform(0.1, 1, 3)
        while np.abs(first - second).max() < 0.4:
            second = rng.uniform(0.1, 1, 3)
        phase = tuple(rng.uniform(0, 1, 6).tolist())
        colours = (tuple(first.tolist()), tuple(second.tolist()))
        return cls(pattern, colours, float(rng.uniform(1.8, 3.6)), float(rng.uniform(0, np.pi)), phase)

    def albedo(self, uv: Floats) -> Floats:
        """Return the colours [..., 3] at surface coordinates [..., 2]."""
        c, s = np.cos(self.angle), np.sin(self.angle)
        a, b = np.moveaxis(uv @ np.array([[c, -s], [s, c]]) * self.frequency + np.array(self.phase[:2]), -1, 0)
        first, second = np.array(self.colours)
        fraction = self._fraction(a, b)[..., None]
        return first * (1 - fraction) + second * fraction

    def _fraction(self, a: Floats, b: Floats) -> Floats:
        """Return the fraction of the second colour, in [0, 1]."""
        if self.pattern == "stripes":
            return (a % 1 < 0.5).astype(float)
        if self.pattern == "checks":
            return ((a % 1 < 0.5) ^ (b % 1 < 0.5)).astype(float)
        if self.pattern == "dots":
            return (np.hypot(a % 1 - 0.5, b % 1 - 0.5) < 0.3).astype(float)
        if self.pattern == "ramp":
            return (np.sin(2 * np.pi * a) + 1) / 2
        if self.pattern == "bricks":
            row = np.floor(2 * b)
            return ((2 * b % 1 < 0.2) | ((a + 0.5 * (row % 2)) % 1 < 0.12)).astype(float)
        turns = 2 * np.pi * np.array(self.phase)
        waves = sum(np.sin(2 * np.pi * (np.cos(turn) * a + np.sin(turn) * b) + 3 * turn) for turn in turns)
        return 1 / (1 + np.exp(-2 * waves))


@dataclass(frozen=True)
class ObjectScene:
    """A solid in front of a background, in some light.

    Attributes:
        shape: the solid.
        light: unit vector from the surface to the light.
        background: two colours, and the angle of the gradient between them.
    """

    shape: Solid
    light: tuple[float, float, float]
    background: tuple[tuple[float, ...], tuple[float, ...], float]

    @classmethod
    def random(cls, rng: np.random.Generator, kind: Kind) -> ObjectScene:
        """Draw a random scene: a solid, its light and the colours around it.

        Args:
            rng: random number generator.
            kind: kind of the solid.
        """
        shape = Solid.random(rng, kind)
        colours = rng.uniform(0, 1, (2, 3)).tolist()
        return cls(shape, random_light(rng), (tuple(colours[0]), tuple(colours[1]), float(rng.uniform(0, 2 * np.pi))))

    def at(self, frame: int) -> ObjectScene:
        """Return the scene some frames later: the solid is rotated, and the light has moved."""
        if frame == 0:
            return self
        c, s = np.cos(LIGHT_TURN * frame), np.sin(LIGHT_TURN * frame)
        x, y, z = self.light
        return ObjectScene(self.shape.rotated(TURN * frame), (c * x - s * y, s * x + c * y, z), self.background)

    def shading(self, surface: Surface) -> Floats:
        """Return the light intensity of each pixel [height, width]."""
        return AMBIENT + (1 - AMBIENT) * (surface.normals @ np.array(self.light)).clip(0)

    def render_background(self, res: int) -> Floats:
        """Return the background [res, res, 3]."""
        ticks = np.linspace(0, 1, res)
        first, second, angle = self.background
        ramp = np.cos(angle) * ticks[None, :] + np.sin(angle) * ticks[:, None]
        ramp = ((ramp - ramp.min()) / (np.ptp(ramp) + 1e-12))[..., None]
        return np.array(first) * (1 - ramp) + np.array(second) * ramp


def random_light(rng: np.random.Generator) -> tuple[float, float, float]:
    """Draw the direction of a light in front of the object."""
    vector = rng.normal(size=3)
    vector[2] = abs(vector[2]) + 0.5
    x, y, z = (vector / np.linalg.norm(vector)).tolist()
    return x, y, z


class TexturedObject(NamedTuple):
    """A random object; images are [frames, 3, res, res] in [-1, 1], masks [frames, 1, res, res] of 0 and 1.

    Attributes:
        composite: the object in front of its background.
        mask: mask of the object.
        foreground: the object on mid grey (0).
        untextured: the untextured object on mid grey.
        depth: its height field, in [-1, 1] [frames, 1, res, res].
        donor: the same shape, light and background with another texture.
        own: its first frame on white [3, res, res], and the mask [1, res, res].
        cross: its texture on another shape under another light, in the same form.
        centre: centre of its rotation by ``TURN`` per frame, x to the right and y upwards, both in [-1, 1].
    """

    composite: Pixels
    mask: Pixels
    foreground: Pixels
    untextured: Pixels
    depth: Pixels
    donor: Pixels
    own: tuple[Pixels, Pixels]
    cross: tuple[Pixels, Pixels]
    centre: tuple[float, float]


def textured_object(seed: int, res: int = 32, frames: int = 1, part: Part = "train") -> TexturedObject:
    """Render an object; the result is the same for the same arguments, on every machine.

    Args:
        seed: random seed. Objects of different splits have nothing in common.
        res: side of the image in pixels.
        frames: number of frames, over which it rotates while the light moves.
        part: the split: ``train``, ``test``, or ``unseen``, with a shape and a texture that are in neither.

    Raises:
        MethodError: for an image that is too small or a clip without frames.
    """
    if res < 8 or frames < 1:
        raise MethodError(
            f"res {res}, frames {frames}: give images of at least 8 x 8 pixels and clips of at least 1 frame"
        )
    key = [get_args(Part).index(part), seed]
    kinds: tuple[Kind, ...] = (UNSEEN_SHAPE,) if part == "unseen" else SHAPES
    patterns: tuple[Pattern, ...] = (UNSEEN_PATTERN,) if part == "unseen" else PATTERNS
    of_scene, of_texture, of_other, of_donor = (np.random.default_rng([*key, index]) for index in range(4))
    scene = ObjectScene.random(of_scene, kinds[of_scene.integers(len(kinds))])
    texture = Texture.random(of_texture, patterns[of_texture.integers(len(patterns))])
    other = ObjectScene.random(of_other, kinds[of_other.integers(len(kinds))])
    donor = Texture.random(of_donor, patterns[of_donor.integers(len(patterns))])
    clip = [scene.at(frame) for frame in range(frames)]
    surfaces = [each.shape.surface(res) for each in clip]
    pairs = list(zip(clip, surfaces, strict=True))
    mask = np.stack([surface.mask for surface in surfaces])[..., None]  # [frames, res, res, 1]
    background = scene.render_background(res)
    textured = np.stack([render(each, surface, texture) for each, surface in pairs])
    plain = np.stack([render(each, surface, None) for each, surface in pairs])
    in_donor = np.stack([render(each, surface, donor) for each, surface in pairs])
    height = np.stack([surface.height for surface in surfaces])[..., None]
    other_surface = other.shape.surface(res)
    return TexturedObject(
        composite=pixels(np.where(mask, textured, background)),
        mask=channels(mask),
        foreground=pixels(np.where(mask, textured, 0.5)),
        untextured=pixels(np.where(mask, plain, 0.5)),
        depth=channels(height),
        donor=pixels(np.where(mask, in_donor, background)),
        own=(pixels(np.where(mask[0], textured[0], 1.0)), channels(mask[0])),
        cross=(
            pixels(np.where(other_surface.mask[..., None], render(other, other_surface, texture), 1.0)),
            channels(other_surface.mask[..., None]),
        ),
        centre=scene.shape.centre,
    )


def render(scene: ObjectScene, surface: Surface, texture: Texture | None) -> Floats:
    """Render the colours of every pixel, also outside the mask, in [0, 1] [res, res, 3].

    Args:
        scene: gives the shading.
        surface: the visible surface of the solid.
        texture: its texture; None for plain grey.
    """
    albedo = np.full((*surface.mask.shape, 3), PLAIN) if texture is None else texture.albedo(surface.uv)
    return albedo * scene.shading(surface)[..., None]


def pixels(colours: Floats) -> Pixels:
    """Convert [0, 1] [..., height, width, channels] to [-1, 1] [..., channels, height, width]."""
    return channels(colours * 2 - 1)


def channels(array: NDArray[np.generic]) -> Pixels:
    """Move the channels before height and width, as float32."""
    return np.ascontiguousarray(np.moveaxis(array, -1, -3), dtype=np.float32)


def objects(part: Part = "train", seed: int = 0, res: int = 32, frames: int = 1) -> Iterator[TexturedObject]:
    """Return an infinite iterator of synthetic objects.

    Args:
        part: the split: ``train``, ``test`` or ``unseen``.
        seed: random seed.
        res: side of the images in pixels.
        frames: number of frames of each clip.
    """
    return (nth_object(index, part, seed, res, frames) for index in count())


def nth_object(index: int, part: Part = "train", seed: int = 0, res: int = 32, frames: int = 1) -> TexturedObject:
    """Return one of the objects of :func:`objects`, by its index.

    Args:
        index: index of the object.
        part: the split: ``train``, ``test`` or ``unseen``.
        seed: random seed.
        res: side of the images in pixels.
        frames: number of frames of the clip.
    """
    return textured_object(seed * 1_000_000 + index, res, frames, part)
