"""Pictures inside a page, which needs no other file."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from lamella.extras import require

SIDE = 96  # pixels, at least: small pictures are shown larger


def png_base64(pictures: Iterable[npt.NDArray[np.uint8]]) -> str:
    """Pictures of one height [height, width, 3] side by side, as the text of a PNG.

    Raises:
        LamellaError: when Pillow is missing.
    """
    image = require("PIL.Image", "vision", "pictures")
    row = np.concatenate(list(pictures), axis=1)
    times = max(1, SIDE // row.shape[0])
    made = image.fromarray(np.repeat(np.repeat(row, times, axis=0), times, axis=1))
    file = io.BytesIO()
    made.save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()
