"""Make the picture of refacade's page in the documentation: before, without texture, the reference, and the result.

lamella run refacade --image textured --mask textured --reference textured --seed 1 -o drawn
python scripts/refacade_picture.py drawn docs/assets/refacade-strips.png
"""

from __future__ import annotations

import argparse
import base64
import io
from pathlib import Path

from PIL import Image

from lamella.results import Evidence

TIMES, GAP = 2, 8  # how much larger each pixel is, and pixels between strips


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("drawn", type=Path, nargs="+", help="what `lamella run refacade` has written")
    parser.add_argument("out", type=Path, help="the PNG to write")
    chosen = parser.parse_args()
    rows = []
    for folder in chosen.drawn:
        strips = Evidence.read(folder).findings["strips"].values()
        rows.append([Image.open(io.BytesIO(base64.b64decode(each))) for each in strips])
    width = sum(each.width + GAP for each in rows[0]) - GAP
    sheet = Image.new("RGB", (width, sum(row[0].height + GAP for row in rows) - GAP), "white")
    for place, row in enumerate(rows):
        left = 0
        for each in row:
            sheet.paste(each, (left, place * (row[0].height + GAP)))
            left += each.width + GAP
    sheet.resize((TIMES * sheet.width, TIMES * sheet.height), Image.Resampling.NEAREST).save(chosen.out, optimize=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
