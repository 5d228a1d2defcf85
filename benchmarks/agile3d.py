"""What a click costs on a scene that is encoded, and what it saves to convolve over occupied voxels alone.

Rooms furnished by chance, in voxels of several sizes. A click decodes what was kept, or encodes the scene anew, as
methods do whose network takes clicks as input; the pairs of voxels are there for both. A convolution of 3 voxels a side
runs over the occupied ones, and densely over the box that the room fills. Both are timed in turn.

    python benchmarks/agile3d.py            # about two minutes on one core
    python benchmarks/agile3d.py --quick    # large voxels, fewer rounds
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch.nn.functional import conv3d

from lamella.evaluate import Ratio
from lamella.methods.agile3d import Click, ClickDecoder, ClickSegmenter, SparseUNet, Widths, rooms
from lamella.methods.agile3d.sparse import SparseConv
from lamella.results import Record

CHANNELS = 32  # of the convolution that is timed alone
WIDTHS = {
    "nano": Widths(16, (32, 48), (32, 32), (1, 1, 1, 1)),
    "twice as wide": Widths(32, (64, 96), (64, 64), (1, 1, 1, 1)),
    "the paper's": Widths(),
}


def in_turn(slow: Callable[[], object], fast: Callable[[], object], rounds: int) -> tuple[float, float, Ratio]:
    """Median seconds of both, and how many times faster the second is; two rounds warm up."""
    found = []
    for _ in range(rounds + 2):
        each = []
        for way in (slow, fast):
            began = time.perf_counter()
            way()
            each.append(time.perf_counter() - began)
        found.append(each)
    kept = found[2:]
    return median(s for s, _ in kept), median(f for _, f in kept), Ratio.of([s / f for s, f in kept])


@torch.no_grad()
def clicks(record: Record, voxel: float, rounds: int) -> None:
    scene, rows, medians = next(rooms("test", seed=record.seed)), [], []
    fifteen = tuple(Click(label, 31 * label + 7 * turn) for turn in range(3) for label in range(1, 6))
    for name, widths in WIDTHS.items():
        torch.manual_seed(record.seed)
        decoder = ClickDecoder(3, 48, 4, 128, background=6)
        model = ClickSegmenter(SparseUNet(widths, voxel), decoder).eval()
        tokens = model.tokenise(scene)
        (kept,) = model.encode([tokens])

        def anew(model: ClickSegmenter = model, tokens: object = tokens) -> object:
            return model.decode(model.encode([tokens])[0], fifteen)  # type: ignore[list-item]

        def cached(model: ClickSegmenter = model, kept: object = kept) -> object:
            return model.decode(kept, fifteen)  # type: ignore[arg-type]

        slow, fast, ratio = in_turn(anew, cached, rounds)
        medians.append(ratio.median)
        rows.append([name, len(tokens), 1000 * slow, 1000 * fast, str(ratio)])
    heads = ["encoder", "tokens", "encoded anew, ms", "on what was kept, ms", "times faster"]
    record.table(f"A click among fifteen, voxels of {voxel} m, the small decoder", heads, rows)
    record.check("a click with the smallest encoder", "at least 1.7 times faster", medians[0], medians[0] >= 1.7)
    grows = medians == sorted(medians)
    record.check(
        "what is saved grows with the encoder", "from row to row", ", ".join(f"{m:.2f}" for m in medians), grows
    )


@torch.no_grad()
def convolutions(record: Record, voxels: tuple[float, ...], rounds: int) -> None:
    rows, apart = [], 0.0
    for voxel in voxels:
        tokens = SparseUNet(WIDTHS["nano"], voxel).tokenise(next(rooms("test", seed=record.seed)))
        torch.manual_seed(record.seed)
        x, conv = torch.randn(len(tokens), CHANNELS), SparseConv(CHANNELS, CHANNELS, 27)
        sides = (tokens.cells.max(dim=0).values + 1).tolist()
        cube = torch.zeros(1, CHANNELS, *sides)
        cube[0, :, *tokens.cells.T] = x.T
        kernel = conv.weight.reshape(3, 3, 3, CHANNELS, CHANNELS).permute(4, 3, 0, 1, 2).contiguous()
        began = time.perf_counter()
        pairs = tokens.grid.neighbours(3)
        maps = time.perf_counter() - began
        theirs = conv3d(cube, kernel, padding=1)[0, :, *tokens.cells.T].T
        apart = max(apart, float((conv(x, pairs, len(x)) - theirs).abs().max()))

        def dense(cube: torch.Tensor = cube, kernel: torch.Tensor = kernel) -> object:
            return conv3d(cube, kernel, padding=1)

        def sparse(x: torch.Tensor = x, conv: SparseConv = conv, pairs: object = pairs) -> object:
            return conv(x, pairs, len(x))

        slow, fast, ratio = in_turn(dense, sparse, rounds)
        share = len(tokens) / torch.tensor(sides).prod().item()
        rows.append([voxel, len(tokens), f"{share:.1%}", 1000 * maps, 1000 * slow, 1000 * fast, str(ratio)])
    heads = ["voxel, m", "occupied", "of the box", "pairs, once, ms", "dense, ms", "sparse, ms", "times faster"]
    record.table(f"A convolution of 3 voxels a side, {CHANNELS} channels", heads, rows)
    record.check("both compute the same", "at most 1e-4 apart", apart, apart <= 1e-4)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="large voxels, fewer rounds; writes agile3d-quick.json")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    record = Record("agile3d", "one room furnished by chance, random weights", chosen.seed)
    clicks(record, 0.25 if chosen.quick else 0.12, 3 if chosen.quick else 15)
    convolutions(record, (0.25,) if chosen.quick else (0.12, 0.08, 0.05), 3 if chosen.quick else 15)
    return record.finish(Path(__file__).parent / "results" / f"agile3d{'-quick' * chosen.quick}.json")


if __name__ == "__main__":
    raise SystemExit(main())
