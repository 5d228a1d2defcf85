"""Make the figure of muranet's page in the documentation: plans, predictions, and ground truth.

    lamella run muranet synthetic --count 280 --encoder nano --size 128 --no-jitter --steps 280 \\
        --lr 3e-3 --warmup 0.1 --weight-decay 0.01 -o recogniser
    lamella run muranet judge recogniser --plans synthetic --count 24 -o judged
    python scripts/muranet_figure.py judged docs/assets/muranet-plans.png
"""

from __future__ import annotations

import argparse
import base64
import io
from pathlib import Path

from PIL import Image

from lamella.results import Evidence

PLANS, GAP = 2, 8  # number of plans, and pixels between them


def main() -> int:
    """Parse the arguments and run the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("judged", type=Path, help="result folder of `lamella run muranet judge`")
    parser.add_argument("out", type=Path, help="the PNG to write")
    chosen = parser.parse_args()
    found = Evidence.read(chosen.judged).findings["images"][:PLANS]
    rows = [Image.open(io.BytesIO(base64.b64decode(each["image"]))) for each in found]
    figure = Image.new("RGB", (rows[0].width, sum(row.height + GAP for row in rows) - GAP), "white")
    for index, row in enumerate(rows):
        figure.paste(row, (0, index * (row.height + GAP)))
    figure.resize((2 * figure.width, 2 * figure.height), Image.Resampling.NEAREST).save(chosen.out, optimize=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
