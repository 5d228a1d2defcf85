"""Images embedded in a page, which needs no other file."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from lamella.extras import require

SIDE = 96  # minimum height in pixels: small images are enlarged


def png_base64(images: Iterable[npt.NDArray[np.uint8]]) -> str:
    """Return images of the same height [height, width, 3], concatenated horizontally, as a Base64 PNG.

    Raises:
        LamellaError: if Pillow is missing.
    """
    pillow = require("PIL.Image", "vision", "images")
    row = np.concatenate(list(images), axis=1)
    scale = max(1, SIDE // row.shape[0])
    image = pillow.fromarray(np.repeat(np.repeat(row, scale, axis=0), scale, axis=1))
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()
