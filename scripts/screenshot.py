"""Take a screenshot of a report with a headless Chromium.

    python scripts/screenshot.py demo/report.html docs/assets/report.png

Fonts differ between machines, and so do the screenshots.
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
WAIT = 5000  # milliseconds of virtual time: enough to draw every chart
FRAME = "<!doctype html><style>body{{margin:0}}iframe{{border:0;width:{width}px;height:{height}px}}</style>"


def main() -> None:
    """Read the arguments and take the screenshot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, help="report.html or depth.html")
    parser.add_argument("image", type=Path, help="the PNG to write")
    parser.add_argument("--width", type=int, default=1240, help="width of the page in pixels")
    parser.add_argument("--height", type=int, default=1980, help="height of the visible part in pixels")
    parser.add_argument("--dark", action="store_true", help="use dark colours")
    arguments = parser.parse_args()
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        sys.exit(f"no {' or '.join(BROWSERS)} found: install one, then run this again")
    if not arguments.page.is_file():
        sys.exit(f"no page {arguments.page}: `lamella compress` writes one")
    arguments.image.parent.mkdir(parents=True, exist_ok=True)
    take_screenshot(browser, arguments.page, arguments.image, arguments.width, arguments.height, arguments.dark)
    reduce_colours(arguments.image)
    print(f"{arguments.image}: {arguments.image.stat().st_size / 1000:.0f} kB")


def take_screenshot(browser: str, page: Path, image: Path, width: int, height: int, dark: bool) -> None:
    """Show the page in a frame of the given size, since browser windows have a minimum width.

    Args:
        browser: the path of the browser.
        page: the report.
        image: the PNG to write.
        width: the width in pixels.
        height: the height in pixels.
        dark: whether to use dark colours.
    """
    with tempfile.TemporaryDirectory() as folder:
        frame = Path(folder) / "frame.html"
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
            f"--user-data-dir={folder}/profile",
            f"--screenshot={image.resolve()}",
        ]
        subprocess.run([browser, *options, frame.as_uri()], check=True, capture_output=True)


def reduce_colours(image: Path) -> None:
    """Reduce an image to 256 colours, which is sufficient for a report, and makes the file several times smaller."""
    with Image.open(image) as original:
        reduced = original.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    reduced.save(image, optimize=True)


if __name__ == "__main__":
    main()
