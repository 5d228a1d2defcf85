"""The cost of a click on an encoded scene, the latency of the page, and the savings of sparse convolution.

Rooms with random furniture, in voxels of several sizes. A click decodes the stored encoding, or encodes the scene
again, as in methods whose network takes clicks as input; the pairs of voxels are given to both. In the page with 20,000
points, in a headless Chromium, the time from the release of the button until the page has the answer is measured, and
the time that the browser needs for a frame: an answer is drawn in the frame after the one in which it arrives. A
convolution with a kernel of 3 voxels runs over the occupied voxels, densely over the room's bounding box, and, if
spconv is installed (`pip install spconv`), with that. Compared variants are timed alternately.

    python benchmarks/agile3d.py            # about two minutes on one core
    python benchmarks/agile3d.py --quick    # large voxels, fewer rounds
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import conv3d

from lamella.evaluate import Ratio
from lamella.methods.agile3d import (
    Click,
    ClickDecoder,
    ClickScene,
    ClickSegmenter,
    SparseUNet,
    UNetWidths,
    Viewer,
    rooms,
)
from lamella.methods.agile3d.sparse import SparseConv
from lamella.results import Record

CHANNELS = 32  # of the convolution that is timed alone
WIDTHS = {
    "nano": UNetWidths(16, (32, 48), (32, 32), (1, 1, 1, 1)),
    "twice as wide": UNetWidths(32, (64, 96), (64, 64), (1, 1, 1, 1)),
    "the paper's": UNetWidths(),
}


POINTS = 20_000  # in the page
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
WITHOUT = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]  # a sandbox, a graphics card
TRIPS = """
window.trips = []
let began = 0, shown = "0"
document.addEventListener("pointerup", () => { began = performance.now() }, true)
new MutationObserver(() => {
  const now = document.querySelector("#state")?.dataset.clicks ?? shown
  if (now !== shown) { shown = now; window.trips.push(performance.now() - began) }
}).observe(document.body, { subtree: true, childList: true, attributes: true })
"""

FRAMES = """() => new Promise((done) => {
  const at = []
  const step = (now) => {
    at.push(now)
    window.__viserMutable.requestRender()
    at.length < 40 ? requestAnimationFrame(step) : done(at.slice(1).map((each, index) => each - at[index]))
  }
  requestAnimationFrame(step)
})"""


def in_turn(rounds: int, *ways: Callable[[], object]) -> list[list[float]]:
    """Return the seconds of each variant, round by round, after two warm-up rounds."""
    found: list[list[float]] = [[] for _ in ways]
    for _ in range(rounds + 2):
        for way, seconds in zip(ways, found, strict=True):
            began = time.perf_counter()
            way()
            seconds.append(time.perf_counter() - began)
    return [seconds[2:] for seconds in found]


def faster(slow: list[float], fast: list[float]) -> Ratio:
    return Ratio.of([s / f for s, f in zip(slow, fast, strict=True)])


def ms(seconds: list[float]) -> float:
    return 1000 * median(seconds)


def segmenter(widths: UNetWidths, voxel: float, seed: int) -> ClickSegmenter:
    """Return a segmenter with the small decoder of the reproduction, and random weights."""
    torch.manual_seed(seed)
    return ClickSegmenter(SparseUNet(widths, voxel), ClickDecoder(3, 48, 4, 128, background=6)).eval()


@torch.no_grad()
def clicks(record: Record, voxel: float, rounds: int) -> None:
    fifteen = tuple(Click(label, 31 * label + 7 * turn) for turn in range(3) for label in range(1, 6))
    ways: list[Callable[[], object]] = []
    for widths in WIDTHS.values():
        model = segmenter(widths, voxel, record.seed)
        tokens = model.tokenise(next(rooms("test", seed=record.seed)))
        (kept,) = model.encode([tokens])
        ways.append(partial(lambda model, tokens: model.decode(model.encode([tokens])[0], fifteen), model, tokens))
        ways.append(partial(model.decode, kept, fifteen))
    found = in_turn(rounds, *ways)
    anew, cached = found[::2], found[1::2]
    times = [np.divide(slow, fast) for slow, fast in zip(anew, cached, strict=True)]
    rows = [
        [name, len(tokens), ms(slow), ms(fast), str(faster(slow, fast))]
        for name, slow, fast in zip(WIDTHS, anew, cached, strict=True)
    ]
    heads = ["encoder", "tokens", "with re-encoding, ms", "with the stored encoding, ms", "speed-up"]
    record.table(f"A click among fifteen, voxels of {voxel} m, the small decoder", heads, rows)
    nano = float(np.median(times[0]))
    record.check("a click with the smallest encoder", "at least 1.7 times faster", nano, nano >= 1.7)
    growth = [float(np.median(b / a)) for a, b in pairwise(times)]
    ratios = ", ".join(f"{each:.2f} times" for each in growth)
    record.check("speed-up from row to row", "grows", ratios, min(growth) > 1)


class Timed(Viewer):
    """A page that records the processor time of each click in seconds."""

    def _click(self, event: Any, label: int) -> None:
        began = time.thread_time()
        super()._click(event, label)
        self.seconds = [*getattr(self, "seconds", []), time.thread_time() - began]


def page(record: Record, voxel: float, rounds: int) -> None:
    """Measure the time from the release of the button to the answer, in a real browser."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None or not (find_spec("viser") and find_spec("playwright")):
        record.check("a click in the page", "under 100 ms", "not measured: no Chromium, viser or playwright here", None)
        return
    from playwright.sync_api import sync_playwright

    viewer = Timed(segmenter(WIDTHS["nano"], voxel, record.seed), [scene_of(POINTS, record.seed)])
    try:
        with sync_playwright() as driver:
            tab = driver.chromium.launch(executable_path=browser, args=WITHOUT).new_page()
            tab.goto(viewer.address)
            tab.wait_for_selector("#state")
            tab.wait_for_timeout(3000)  # until the camera stands
            tab.evaluate(TRIPS)
            box = tab.locator("canvas").first.bounding_box()
            assert box is not None
            for turn in range(rounds + 2):
                tab.keyboard.press(str(1 + turn % 5))
                tab.mouse.click(box["x"] + box["width"] / 2 + 5 * turn, box["y"] + box["height"] / 2 + 3 * turn)
                tab.wait_for_function(f"window.trips.length === {turn + 1}")
                tab.wait_for_timeout(300)  # a person looks
            trips = tab.evaluate("window.trips")[2:]
            frame = median(tab.evaluate(FRAMES))
    finally:
        viewer.stop()
    low, middle, high = quantiles(trips)
    heads = ["clicks", "median, ms", "quartiles, ms", "longest, ms", "processor time of the server, ms", "a frame, ms"]
    row = [len(trips), middle, f"{low:.0f} to {high:.0f}", max(trips), ms(viewer.seconds[2:]), frame]
    record.table(f"A click in the page, {POINTS} points", heads, [row])
    record.check("a click in the page, median", "under 100 ms", middle, middle < 100)


def scene_of(points: int, seed: int) -> ClickScene:
    """Return a room with so many points, some of which are adjacent to others."""
    scene = next(rooms("test", seed=seed))
    more = np.random.default_rng(seed).integers(len(scene), size=points - len(scene))
    coords = np.concatenate([scene.coords, scene.coords[more] + np.float32(0.005)])
    return ClickScene(coords, np.concatenate([scene.colours, scene.colours[more]]), name="room")


@torch.no_grad()
def convolutions(record: Record, voxels: tuple[float, ...], rounds: int) -> None:
    rows, apart = [], 0.0
    for voxel in voxels:
        tokens = SparseUNet(WIDTHS["nano"], voxel).tokenise(next(rooms("test", seed=record.seed)))
        torch.manual_seed(record.seed)
        x, conv = torch.randn(len(tokens), CHANNELS), SparseConv(CHANNELS, CHANNELS, 27)
        began = time.perf_counter()
        pairs = tokens.grid.neighbours(3)
        maps = time.perf_counter() - began
        sides = (tokens.cells.max(dim=0).values + 1).tolist()
        ways = {"ours": lambda x=x, conv=conv, pairs=pairs: conv(x, pairs, len(x))}
        ways |= dense(x, conv, tokens.cells, sides) | by_spconv(x, conv, tokens.cells, sides)
        found = [way() for way in ways.values()]
        apart = max([apart, *(float((each - found[0]).abs().max()) for each in found[1:])])
        ours, *others = in_turn(rounds, *ways.values())
        row = [voxel, len(tokens), f"{len(tokens) / np.prod(sides):.1%}", 1000 * maps, ms(ours)]
        for seconds in others:
            row += [ms(seconds), str(faster(seconds, ours))]
        rows.append(row)
    heads = ["voxel, m", "occupied", "fraction of the box", "pairs, once, ms", "ours, ms"]
    for name in [*ways][1:]:
        heads += [f"{name}, ms", "speed-up"]
    record.table(f"A convolution of 3 voxels a side, {CHANNELS} channels", heads, rows)
    record.check("difference of the outputs", "at most 1e-4 apart", apart, apart <= 1e-4)


def dense(x: Tensor, conv: SparseConv, cells: Tensor, sides: list[int]) -> dict[str, Callable[[], Tensor]]:
    """Return the same convolution over the whole bounding box."""
    cube = torch.zeros(1, CHANNELS, *sides)
    cube[0, :, *cells.T] = x.T
    kernel = conv.weight.reshape(3, 3, 3, CHANNELS, CHANNELS).permute(4, 3, 0, 1, 2).contiguous()
    return {"dense": lambda: conv3d(cube, kernel, padding=1)[0, :, *cells.T].T}


def by_spconv(x: Tensor, conv: SparseConv, cells: Tensor, sides: list[int]) -> dict[str, Callable[[], Tensor]]:
    """Return the same convolution with spconv on the CPU, if installed; its pairs are computed once, too."""
    if not find_spec("spconv"):
        return {}
    import spconv.pytorch as spconv

    theirs = spconv.SubMConv3d(CHANNELS, CHANNELS, 3, bias=False, indice_key="pairs")
    theirs.weight.copy_(conv.weight.reshape(3, 3, 3, CHANNELS, CHANNELS).permute(4, 0, 1, 2, 3))
    scene = spconv.SparseConvTensor(x, torch.cat([cells.new_zeros(len(cells), 1), cells], dim=1).int(), sides, 1)
    return {"spconv": lambda: theirs(scene).features}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="large voxels, fewer rounds; writes agile3d-quick.json")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    record = Record("agile3d", "a room with random furniture, random weights", chosen.seed)
    clicks(record, 0.25 if chosen.quick else 0.12, 3 if chosen.quick else 15)
    page(record, 0.25 if chosen.quick else 0.12, 5 if chosen.quick else 30)
    convolutions(record, (0.25,) if chosen.quick else (0.12, 0.08, 0.05), 3 if chosen.quick else 15)
    return record.finish(Path(__file__).parent / "results" / f"agile3d{'-quick' * chosen.quick}.json")


if __name__ == "__main__":
    raise SystemExit(main())
