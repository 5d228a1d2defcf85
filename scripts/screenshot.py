"""Make a picture of a report with a headless Chromium.

    python scripts/screenshot.py demo/report.html docs/assets/report.png

Fonts differ between machines, so the picture does too.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
WAIT = 5000  # milliseconds of the page's own time: enough to draw every chart
FRAME = "<!doctype html><style>body{{margin:0}}iframe{{border:0;width:{width}px;height:{height}px}}</style>"


def main() -> None:
    """Read the arguments and take the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, help="report.html or depth.html")
    parser.add_argument("picture", type=Path, help="the PNG to write")
    parser.add_argument("--width", type=int, default=1240, help="of the page, in pixels")
    parser.add_argument("--height", type=int, default=1980, help="of the part that is shown, in pixels")
    parser.add_argument("--dark", action="store_true", help="with the dark colours")
    given = parser.parse_args()
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        sys.exit(f"no {' or '.join(BROWSERS)} found: install one, then run this again")
    if not given.page.is_file():
        sys.exit(f"no page {given.page}: `lamella compress` writes one")
    given.picture.parent.mkdir(parents=True, exist_ok=True)
    take(browser, given.page, given.picture, given.width, given.height, given.dark)
    reduce_colours(given.picture)
    print(f"{given.picture}: {given.picture.stat().st_size / 1000:.0f} kB")


def take(browser: str, page: Path, picture: Path, width: int, height: int, dark: bool) -> None:
    """Show the page in a frame of the wanted size, since browser windows refuse to be narrow."""
    with tempfile.TemporaryDirectory() as place:
        frame = Path(place) / "frame.html"
        source = f'<iframe src="{page.resolve().as_uri()}"></iframe>'
        frame.write_text(FRAME.format(width=width, height=height) + source, encoding="utf-8")
        options = [
            "--headless",
            "--no-sandbox",  # containers have no user namespaces; the page is our own and loads nothing
            "--disable-gpu",
            "--hide-scrollbars",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            f"--window-size={width},{height}",
            f"--virtual-time-budget={WAIT}",
            f"--user-data-dir={place}/profile",
            f"--screenshot={picture.resolve()}",
        ]
        subprocess.run([browser, *options, frame.as_uri()], check=True, capture_output=True)


def reduce_colours(picture: Path) -> None:
    """A palette of 256 colours is plenty for a page of text and two hues, and a file several times smaller."""
    with Image.open(picture) as whole:
        few = whole.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    few.save(picture, optimize=True)


if __name__ == "__main__":
    main()
