r"""Take the screenshots of agile3d's page in the documentation, with a headless Chromium.

    lamella run agile3d rooms --count 100 --encoder nano --voxel 0.12 --hidden 48 --heads 4 --feedforward 128 \\
        --background 6 --rounds 5 --no-turn --steps 500 --lr 1e-3 --schedule cosine --warmup 0.1 --batch 3 -o clicker
    lamella run agile3d collages --count 200 --encoder efficientnet-lite0 --frozen --hidden 48 --heads 4 \\
        --feedforward 128 --background 6 --rounds 5 --steps 500 --lr 1e-3 --schedule cosine --warmup 0.1 --batch 3 \\
        -o painter
    python scripts/agile3d_page.py clicker --scenes rooms --index 3 docs/assets/agile3d-page.png
    python scripts/agile3d_page.py painter --scenes collages docs/assets/agile3d-image.png

A simulated user clicks on every object, and then where the labels are most deeply wrong. The camera and the clicks are
the same each time; fonts differ between machines.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from screenshot import BROWSERS, reduce_colours

from lamella.data import InputContext
from lamella.methods.agile3d import Scenes, Segmenter, Viewer, simulate_clicks
from lamella.methods.agile3d.clicks import task_labels
from lamella.methods.agile3d.judge import visible
from lamella.methods.agile3d.session import Session

BROWSER_OPTIONS = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]  # no graphics card needed
MAX_OBJECTS = 6  # objects


def main() -> None:
    """Read the arguments and take the screenshot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="the output folder of `lamella run agile3d`")
    parser.add_argument("image", type=Path, help="the PNG to write")
    parser.add_argument("--scenes", required=True, help="scenes with known objects")
    parser.add_argument("--more", type=int, default=6, help="clicks after those on each object")
    parser.add_argument("--index", type=int, default=0, help="index of the scene to show")
    arguments = parser.parse_args()
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit(f"no {' or '.join(BROWSERS)} found: install one, then run this again")
    from playwright.sync_api import sync_playwright

    scenes = Scenes.open(arguments.scenes, InputContext(split="test"), count=arguments.index + 1)
    viewer = Viewer(Segmenter.read(arguments.model).model, scenes.scenes[arguments.index :])
    click(viewer.session, arguments.more)
    viewer._show()
    with sync_playwright() as driver:
        page = driver.chromium.launch(executable_path=browser, args=BROWSER_OPTIONS).new_page(
            viewport={"width": 1200, "height": 640}
        )
        page.goto(viewer.address)
        page.wait_for_selector("#state")
        page.wait_for_timeout(3000)
        page.get_by_role("button", name="Close").or_(page.locator(".mantine-Notification-closeButton")).first.click()
        page.wait_for_timeout(1000)
        page.screenshot(path=arguments.image)
    viewer.stop()
    reduce_colours(arguments.image)
    print(f"{arguments.image}: {arguments.image.stat().st_size / 1000:.0f} kB")


def click(session: Session, more: int) -> None:
    """Click once on each object, and then `more` times where the labels are most deeply wrong."""
    tokens, rng = session.tokens, np.random.default_rng(0)
    truth = task_labels(tokens.objects, visible(tokens)[:MAX_OBJECTS])
    labels = torch.zeros_like(truth)
    for most in (int(truth.max()), *[1] * more):
        for label, token in simulate_clicks(truth, labels, tokens.coords, most, rng):
            session.add(label, int(tokens.kept[token]))
        labels = session.model.labels(session.encoded, session.clicks)


if __name__ == "__main__":
    main()
