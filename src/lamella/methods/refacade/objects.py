"""Textured objects whose truth is known: shape, texture, light and background are drawn apart, so any can be changed.

    picture = albedo(u, v) (a + (1 - a) max(0, n . l))        a = 0.35; a plain twin has albedo 0.7 everywhere

The same shape under the same light can be drawn in any texture: what a retextured picture should be is known, and what
it should be without texture, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from lamella.errors import MethodError
from lamella.methods.refacade.shapes import Floats, Kind, Shape, Surface

Pattern = Literal["stripes", "checks", "dots", "ramp", "waves", "bricks"]
Part = Literal["train", "test", "unseen"]
Pixels = NDArray[np.float32]  # from -1 to 1

AMBIENT, PLAIN = 0.35, 0.7  # a, and the albedo of what has no texture
TURN, LIGHT_TURN = 0.12, 0.18  # radians from frame to frame
SHAPES: tuple[Kind, ...] = ("ellipsoid", "box")
PATTERNS: tuple[Pattern, ...] = ("stripes", "checks", "dots", "ramp", "waves")
UNSEEN_SHAPE: Kind = "torus"  # these two are in no picture to learn from
UNSEEN_PATTERN: Pattern = "bricks"


@dataclass(frozen=True)
class Texture:
    """Two colours in a pattern over a surface.

    Attributes:
        pattern: of them.
        colours: red, green and blue from 0 to 1, twice.
        frequency: periods over a length of 1.
        angle: by which the pattern is turned.
        phase: by which it is moved, in both directions; and of the waves that ``waves`` are a sum of.
    """

    pattern: Pattern
    colours: tuple[tuple[float, ...], tuple[float, ...]]
    frequency: float
    angle: float
    phase: tuple[float, ...]

    @classmethod
    def drawn(cls, drawn: np.random.Generator, pattern: Pattern) -> Texture:
        """One by chance; its colours can be told apart."""
        first = drawn.uniform(0.1, 1, 3)
        second = drawn.uniform(0.1, 1, 3)
        while np.abs(first - second).max() < 0.4:
            second = drawn.uniform(0.1, 1, 3)
        phase = tuple(drawn.uniform(0, 1, 6).tolist())
        colours = (tuple(first.tolist()), tuple(second.tolist()))
        return cls(pattern, colours, float(drawn.uniform(1.8, 3.6)), float(drawn.uniform(0, np.pi)), phase)

    def albedo(self, uv: Floats) -> Floats:
        """Colours [..., 3] at places on a surface [..., 2]."""
        c, s = np.cos(self.angle), np.sin(self.angle)
        a, b = np.moveaxis(uv @ np.array([[c, -s], [s, c]]) * self.frequency + np.array(self.phase[:2]), -1, 0)
        first, second = np.array(self.colours)
        share = self._share(a, b)[..., None]
        return first * (1 - share) + second * share

    def _share(self, a: Floats, b: Floats) -> Floats:
        """How much of the second colour there is, from 0 to 1."""
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
class Scene:
    """A shape before a background, in some light.

    Attributes:
        shape: of it.
        light: from the surface to the light, of unit length.
        background: two colours, and the angle of the ramp from one to the other.
    """

    shape: Shape
    light: tuple[float, float, float]
    background: tuple[tuple[float, ...], tuple[float, ...], float]

    @classmethod
    def drawn(cls, drawn: np.random.Generator, kind: Kind) -> Scene:
        """One by chance."""
        shape = Shape.drawn(drawn, kind)
        colours = drawn.uniform(0, 1, (2, 3)).tolist()
        return cls(shape, lit(drawn), (tuple(colours[0]), tuple(colours[1]), float(drawn.uniform(0, 2 * np.pi))))

    def at(self, frame: int) -> Scene:
        """The same some frames later: it turns, and the light moves."""
        if frame == 0:
            return self
        c, s = np.cos(LIGHT_TURN * frame), np.sin(LIGHT_TURN * frame)
        x, y, z = self.light
        return Scene(self.shape.turned(TURN * frame), (c * x - s * y, s * x + c * y, z), self.background)

    def shading(self, surface: Surface) -> Floats:
        """How much light each pixel has [height, width]."""
        return AMBIENT + (1 - AMBIENT) * (surface.normals @ np.array(self.light)).clip(0)

    def behind(self, res: int) -> Floats:
        """The background [res, res, 3]."""
        ticks = np.linspace(0, 1, res)
        first, second, angle = self.background
        ramp = np.cos(angle) * ticks[None, :] + np.sin(angle) * ticks[:, None]
        ramp = ((ramp - ramp.min()) / (np.ptp(ramp) + 1e-12))[..., None]
        return np.array(first) * (1 - ramp) + np.array(second) * ramp


def lit(drawn: np.random.Generator) -> tuple[float, float, float]:
    """The direction of a light somewhere before the object."""
    vector = drawn.normal(size=3)
    vector[2] = abs(vector[2]) + 0.5
    x, y, z = (vector / np.linalg.norm(vector)).tolist()
    return x, y, z


class TexturedObject(NamedTuple):
    """What one draw gives; pictures [frames, 3, res, res] from -1 to 1, masks [frames, 1, res, res] of 0 and 1.

    Attributes:
        composite: the object before its background.
        mask: where it is.
        foreground: it alone, on mid grey (0).
        untextured: its twin without texture on mid grey.
        depth: its height field, from -1 to 1 [frames, 1, res, res].
        donor: the same shape, light and background in another texture.
        own: its first frame on white [3, res, res], and where that is [1, res, res].
        cross: its texture on another shape under another light, likewise.
        centre: about which it turns by ``TURN`` from frame to frame, x to the right and y upwards, both from -1 to 1.
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
    """Draw an object; the same for the same arguments, on every machine.

    Args:
        seed: which one. Those of different parts have nothing in common.
        res: side of the picture, in pixels.
        frames: over which it turns while the light moves.
        part: to learn from, to judge on, or of a shape and a texture that are in neither.

    Raises:
        MethodError: for a picture without pixels or a clip without frames.
    """
    if res < 8 or frames < 1:
        raise MethodError(f"res {res}, frames {frames}: give pictures from 8 x 8 pixels and clips from 1 frame on")
    key = [get_args(Part).index(part), seed]
    kinds: tuple[Kind, ...] = (UNSEEN_SHAPE,) if part == "unseen" else SHAPES
    patterns: tuple[Pattern, ...] = (UNSEEN_PATTERN,) if part == "unseen" else PATTERNS
    of_scene, of_texture, of_other, of_donor = (np.random.default_rng([*key, stream]) for stream in range(4))
    scene = Scene.drawn(of_scene, kinds[of_scene.integers(len(kinds))])
    texture = Texture.drawn(of_texture, patterns[of_texture.integers(len(patterns))])
    other = Scene.drawn(of_other, kinds[of_other.integers(len(kinds))])
    donor = Texture.drawn(of_donor, patterns[of_donor.integers(len(patterns))])
    clip = [scene.at(frame) for frame in range(frames)]
    surfaces = [each.shape.seen(res) for each in clip]
    pairs = list(zip(clip, surfaces, strict=True))
    mask = np.stack([surface.mask for surface in surfaces])[..., None]  # [frames, res, res, 1]
    behind = scene.behind(res)
    textured = np.stack([render(each, surface, texture) for each, surface in pairs])
    plain = np.stack([render(each, surface, None) for each, surface in pairs])
    in_donor = np.stack([render(each, surface, donor) for each, surface in pairs])
    height = np.stack([surface.height for surface in surfaces])[..., None]
    seen = other.shape.seen(res)
    return TexturedObject(
        composite=pixels(np.where(mask, textured, behind)),
        mask=channels(mask),
        foreground=pixels(np.where(mask, textured, 0.5)),
        untextured=pixels(np.where(mask, plain, 0.5)),
        depth=channels(height),
        donor=pixels(np.where(mask, in_donor, behind)),
        own=(pixels(np.where(mask[0], textured[0], 1.0)), channels(mask[0])),
        cross=(
            pixels(np.where(seen.mask[..., None], render(other, seen, texture), 1.0)),
            channels(seen.mask[..., None]),
        ),
        centre=scene.shape.centre,
    )


def render(scene: Scene, surface: Surface, texture: Texture | None) -> Floats:
    """Colours of every pixel from 0 to 1 [res, res, 3], as if the surface were everywhere; without texture, grey."""
    albedo = np.full((*surface.mask.shape, 3), PLAIN) if texture is None else texture.albedo(surface.uv)
    return albedo * scene.shading(surface)[..., None]


def pixels(colours: Floats) -> Pixels:
    """From 0 to 1 [..., height, width, channels] to -1 to 1 [..., channels, height, width]."""
    return channels(colours * 2 - 1)


def channels(array: NDArray[np.generic]) -> Pixels:
    return np.ascontiguousarray(np.moveaxis(array, -1, -3), dtype=np.float32)


def objects(part: Part = "train", seed: int = 0, res: int = 32, frames: int = 1) -> Iterator[TexturedObject]:
    """Objects without end."""
    return (numbered(number, part, seed, res, frames) for number in count())


def numbered(number: int, part: Part = "train", seed: int = 0, res: int = 32, frames: int = 1) -> TexturedObject:
    """One of the objects of :func:`objects`, by its number."""
    return textured_object(seed * 1_000_000 + number, res, frames, part)
