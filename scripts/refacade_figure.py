"""Make the figure of refacade's page in the documentation: input, texture removed, reference, and result.

lamella run refacade --image textured --mask textured --reference textured --seed 1 -o drawn
python scripts/refacade_figure.py drawn docs/assets/refacade-strips.png
"""

from __future__ import annotations

import argparse
import base64
import io
from pathlib import Path

from PIL import Image

from lamella.results import Evidence

SCALE, GAP = 2, 8  # magnification of pixels, and pixels between strips


def main() -> int:
    """Parse the arguments and run the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="output folders of `lamella run refacade`")
    parser.add_argument("out", type=Path, help="the PNG to write")
    chosen = parser.parse_args()
    rows = []
    for folder in chosen.folders:
        strips = Evidence.read(folder).findings["strips"].values()
        rows.append([Image.open(io.BytesIO(base64.b64decode(each))) for each in strips])
    width = sum(each.width + GAP for each in rows[0]) - GAP
    figure = Image.new("RGB", (width, sum(row[0].height + GAP for row in rows) - GAP), "white")
    for index, row in enumerate(rows):
        left = 0
        for each in row:
            figure.paste(each, (left, index * (row[0].height + GAP)))
            left += each.width + GAP
    figure.resize((SCALE * figure.width, SCALE * figure.height), Image.Resampling.NEAREST).save(
        chosen.out, optimize=True
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
