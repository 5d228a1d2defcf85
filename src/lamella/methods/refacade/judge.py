"""How good a retextured picture is: its background, its object beside the truth, its texture, and what leaked; and how
still the texture of a clip is on an object that moves.

All are of pictures from 0 to 1 [height, width, 3] and masks [height, width].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import map_coordinates

from lamella.extras import require

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

LEVELS, RINGS = 16, 8  # of grey, and of the spectrum
ANGLES = (0.0, np.pi / 4, np.pi / 2, 3 * np.pi / 4)


def psnr(picture: Floats, truth: Floats, where: Mask) -> float:
    """In decibels, over the pixels of a mask; 100 where there is no difference."""
    error = float(np.square(picture[where] - truth[where]).mean())
    return 100.0 if error < 1e-10 else -10 * float(np.log10(error))


def colour_error(picture: Floats, here: Mask, truth: Floats, there: Mask) -> tuple[float, float]:
    """How far means and standard deviations of the colours are apart, on average over red, green and blue."""
    ours, theirs = picture[here], truth[there]
    return (
        float(np.abs(ours.mean(axis=0) - theirs.mean(axis=0)).mean()),
        float(np.abs(ours.std(axis=0) - theirs.std(axis=0)).mean()),
    )


def cooccurrence(picture: Floats, where: Mask) -> Floats:
    """How often two greys are neighbours, in four directions, both within a mask [levels, levels]."""
    texture = require("skimage.feature", "vision", "comparing textures")
    levels = (grey(picture) * LEVELS).astype(int).clip(0, LEVELS - 1)
    levels[~where] = LEVELS  # one of its own, which is left out
    pairs = texture.graycomatrix(levels.astype(np.uint8), [1], list(ANGLES), levels=LEVELS + 1, symmetric=True)
    counted = pairs[:LEVELS, :LEVELS].sum(axis=(2, 3)).astype(float)
    return counted / max(counted.sum(), 1)


def glcm_similarity(picture: Floats, here: Mask, truth: Floats, there: Mask) -> float:
    """The correlation of how often greys are neighbours; 1 for the same texture."""
    return correlation(cooccurrence(picture, here), cooccurrence(truth, there))


def spectrum(picture: Floats, where: Mask) -> Floats:
    """The share of power in each ring of frequencies, of the grey within a mask less its mean [rings]."""
    shown = grey(picture)
    shown = np.where(where, shown - shown[where].mean(), 0)
    power = np.abs(np.fft.fft2(shown)) ** 2
    down, across = (np.fft.fftfreq(side) for side in shown.shape)
    radius = np.hypot(down[:, None], across[None, :])
    ring = np.minimum((radius / 0.5 * RINGS).astype(int), RINGS - 1)
    found = np.bincount(ring.ravel(), power.ravel(), RINGS)
    return found / max(found.sum(), 1e-12)


def spectrum_error(picture: Floats, here: Mask, truth: Floats, there: Mask) -> float:
    """How far apart the shares are, in sum."""
    return float(np.abs(spectrum(picture, here) - spectrum(truth, there)).sum())


def leak(picture: Floats, where: Mask, references: Sequence[Floats], number: int) -> float:
    """How much of its reference's structure a picture shows: the correlation of their edges within the object, less
    that with other references.

    Args:
        references: as they were before any jigsaw; ``references[number]`` is its own.
    """
    filters, morphology = (require(f"skimage.{name}", "vision", "finding edges") for name in ("filters", "morphology"))
    inside = morphology.erosion(where, np.ones((3, 3), bool))  # the object's own outline is its own
    edges = filters.sobel(grey(picture))[inside]
    found = [correlation(edges, filters.sobel(grey(each))[inside]) for each in references]
    others = [each for place, each in enumerate(found) if place != number]
    return found[number] - float(np.mean(others)) if others else found[number]


def warp_error(clip: Floats, where: Mask, centre: tuple[float, float], turn: float) -> float:
    """How much an object's colours change from frame to frame beside its movement, of which the true flow is known.

    Args:
        clip: square pictures [frames, side, side, 3].
        where: the object is [frames, side, side].
        centre: about which it turns in the plane of the picture, x to the right and y upwards, both from -1 to 1.
        turn: radians from frame to frame, against the clock.

    Returns:
        The mean square of colours less those from where they have come, over pixels that have come from the object.
        Light that moves and the grid of pixels change colours, too: compare it with that of the truth.
    """
    side = clip.shape[1]
    ticks = (np.arange(side) + 0.5) / side * 2 - 1
    x, y = np.meshgrid(ticks - centre[0], -ticks - centre[1])
    c, s = np.cos(turn), np.sin(turn)
    x, y = c * x + s * y + centre[0], c * y - s * x + centre[1]  # one frame before
    places = np.stack([1 - y, 1 + x]) * side / 2 - 0.5  # rows and columns
    errors = []
    for before, after, here, there in zip(clip, clip[1:], where, where[1:], strict=False):
        came = np.stack([map_coordinates(before[..., colour], places, order=1) for colour in range(3)], axis=-1)
        both = there & (map_coordinates(here.astype(float), places, order=1) > 1 - 1e-6)
        errors.append(np.square(after - came)[both].mean())
    return float(np.mean(errors))


def correlation(one: Floats, other: Floats) -> float:
    """Of two arrays of one shape; 0 where one never changes."""
    one, other = one.ravel() - one.mean(), other.ravel() - other.mean()
    size = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(one @ other) / size if size > 1e-12 else 0.0


def grey(picture: Floats) -> Floats:
    """Luminance [height, width], from 0 to 1."""
    return picture @ np.array([0.299, 0.587, 0.114])


def unit(frames: Any) -> Floats:
    """Pictures from -1 to 1 [..., 3, height, width] as these functions take them."""
    return (np.moveaxis(np.asarray(frames, dtype=float), -3, -1).clip(-1, 1) + 1) / 2
