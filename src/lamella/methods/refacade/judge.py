"""Metrics of retextured images: background, object against the ground truth, texture, leakage, and temporal stability.

All functions take images in [0, 1] [height, width, 3] and masks [height, width].
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

LEVELS, RINGS = 16, 8  # grey levels, and rings of the spectrum
ANGLES = (0.0, np.pi / 4, np.pi / 2, 3 * np.pi / 4)


def psnr(image: Floats, truth: Floats, where: Mask) -> float:
    """Return the PSNR in decibels over the pixels of a mask; 100 if the images are equal.

    Args:
        image: values in [0, 1] [height, width, 3].
        truth: the ground truth in the same shape.
        where: pixels to compare [height, width].
    """
    error = float(np.square(image[where] - truth[where]).mean())
    return 100.0 if error < 1e-10 else -10 * float(np.log10(error))


def colour_error(image: Floats, mask: Mask, truth: Floats, truth_mask: Mask) -> tuple[float, float]:
    """Return the differences of the means and of the standard deviations of the colours, averaged over RGB.

    Args:
        image: the image [height, width, 3].
        mask: mask of its object [height, width].
        truth: the image to compare with [height, width, 3].
        truth_mask: mask of the object in it [height, width].
    """
    ours, theirs = image[mask], truth[truth_mask]
    return (
        float(np.abs(ours.mean(axis=0) - theirs.mean(axis=0)).mean()),
        float(np.abs(ours.std(axis=0) - theirs.std(axis=0)).mean()),
    )


def cooccurrence(image: Floats, where: Mask) -> Floats:
    """Return the grey-level co-occurrence matrix of neighbours in four directions within a mask [levels, levels].

    Args:
        image: the image, in [0, 1] [height, width, 3].
        where: the mask [height, width].
    """
    texture = require("skimage.feature", "vision", "comparing textures")
    levels = (grey(image) * LEVELS).astype(int).clip(0, LEVELS - 1)
    levels[~where] = LEVELS  # a separate level, which is ignored
    pairs = texture.graycomatrix(levels.astype(np.uint8), [1], list(ANGLES), levels=LEVELS + 1, symmetric=True)
    counts = pairs[:LEVELS, :LEVELS].sum(axis=(2, 3)).astype(float)
    return counts / max(counts.sum(), 1)


def glcm_similarity(image: Floats, mask: Mask, truth: Floats, truth_mask: Mask) -> float:
    """Return the correlation of two grey-level co-occurrence matrices; 1 for the same texture.

    Args:
        image: the image, in [0, 1] [height, width, 3].
        mask: mask of its object [height, width].
        truth: the image to compare with, in [0, 1] [height, width, 3].
        truth_mask: mask of the object in it [height, width].
    """
    return correlation(cooccurrence(image, mask), cooccurrence(truth, truth_mask))


def spectrum(image: Floats, where: Mask) -> Floats:
    """Return the fraction of power in each ring of frequencies, of the zero-mean grey values within a mask [rings].

    Args:
        image: the image [height, width, 3].
        where: the mask [height, width].
    """
    values = grey(image)
    values = np.where(where, values - values[where].mean(), 0)
    power = np.abs(np.fft.fft2(values)) ** 2
    down, across = (np.fft.fftfreq(side) for side in values.shape)
    radius = np.hypot(down[:, None], across[None, :])
    ring = np.minimum((radius / 0.5 * RINGS).astype(int), RINGS - 1)
    found = np.bincount(ring.ravel(), power.ravel(), RINGS)
    return found / max(found.sum(), 1e-12)


def spectrum_error(image: Floats, mask: Mask, truth: Floats, truth_mask: Mask) -> float:
    """Return the sum of the absolute differences of two spectra, from 0 to 2.

    Args:
        image: the image [height, width, 3].
        mask: mask of its object [height, width].
        truth: the image to compare with [height, width, 3].
        truth_mask: mask of the object in it [height, width].
    """
    return float(np.abs(spectrum(image, mask) - spectrum(truth, truth_mask)).sum())


def leak(image: Floats, where: Mask, references: Sequence[Floats], number: int) -> float:
    """Measure how much of its reference's structure an image shows.

    It is the correlation of their edges within the object, minus that with other references.

    Args:
        image: the retextured image.
        where: mask of the object.
        references: original references, without jigsaw; ``references[number]`` is the image's own.
        number: index of its own reference.
    """
    filters, morphology = (require(f"skimage.{name}", "vision", "finding edges") for name in ("filters", "morphology"))
    inside = morphology.erosion(where, np.ones((3, 3), bool))  # without the outline of the object itself
    edges = filters.sobel(grey(image))[inside]
    found = [correlation(edges, filters.sobel(grey(each))[inside]) for each in references]
    others = [each for index, each in enumerate(found) if index != number]
    return found[number] - float(np.mean(others)) if others else found[number]


def warp_error(clip: Floats, where: Mask, centre: tuple[float, float], turn: float) -> float:
    """Measure how much the colours of an object change from frame to frame, given its true optical flow.

    Args:
        clip: square images [frames, side, side, 3].
        where: mask of the object [frames, side, side].
        centre: centre of its rotation in the image plane, x to the right and y upwards, both in [-1, 1].
        turn: rotation in radians per frame, anticlockwise.

    Returns:
        The mean squared difference of colours from those at the previous position, over pixels that come from the
        object. Moving light and resampling change colours, too: compare it with the value of the ground truth.
    """
    side = clip.shape[1]
    ticks = (np.arange(side) + 0.5) / side * 2 - 1
    x, y = np.meshgrid(ticks - centre[0], -ticks - centre[1])
    c, s = np.cos(turn), np.sin(turn)
    x, y = c * x + s * y + centre[0], c * y - s * x + centre[1]  # one frame before
    coordinates = np.stack([1 - y, 1 + x]) * side / 2 - 0.5  # rows and columns
    errors = []
    for before, after, mask_before, mask_after in zip(clip, clip[1:], where, where[1:], strict=False):
        moved = np.stack([map_coordinates(before[..., colour], coordinates, order=1) for colour in range(3)], axis=-1)
        both = mask_after & (map_coordinates(mask_before.astype(float), coordinates, order=1) > 1 - 1e-6)
        errors.append(np.square(after - moved)[both].mean())
    return float(np.mean(errors))


def correlation(one: Floats, other: Floats) -> float:
    """Return the Pearson correlation of two arrays; 0 if one is constant.

    Args:
        one: the first array.
        other: the second array, of the same shape.
    """
    one, other = one.ravel() - one.mean(), other.ravel() - other.mean()
    size = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(one @ other) / size if size > 1e-12 else 0.0


def grey(image: Floats) -> Floats:
    """Return the luminance [height, width], in [0, 1]."""
    return image @ np.array([0.299, 0.587, 0.114])


def unit(frames: Any) -> Floats:
    """Convert images in [-1, 1] [..., 3, height, width] to the format of these functions."""
    return (np.moveaxis(np.asarray(frames, dtype=float), -3, -1).clip(-1, 1) + 1) / 2
