"""AGILE3D at small scale: rooms furnished by chance, in four colours each, segmented click by click.

A small sparse U-Net with its decoder learns on 100 rooms and is judged on 24 others, by a user who clicks where the
prediction is most deeply wrong. Beside it stand the label of the nearest click, which needs no training, and the same
weights with one object at a time, the clicks on others hidden. Prefixes of the decoder and one layer that runs several
times say what its depth is worth, and interleaved timings what it saves to encode a scene once.

    python reproductions/agile3d.py            # about forty minutes on one core; stopped, it goes on
    python reproductions/agile3d.py --quick    # fewer rooms and steps, one seed
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import fmean

import numpy as np
import torch
from harness import Run, main
from harness.measured import Measured

from lamella.evaluate import Ratio
from lamella.files import Work
from lamella.methods.agile3d import (
    Click,
    ClickDecoder,
    ClickSegmenter,
    Practice,
    Scenes,
    Segmenter,
    Shape,
    SparseUNet,
    Tokens,
    Widths,
    agile3d,
    answers,
    clicks_to,
    iou_at,
    nearest_click,
    play,
    rooms,
)
from lamella.methods.agile3d.judge import Curve, Round, visible
from lamella.train import TrainConfig

SEEDS = (0, 1, 2)
BUDGET = 6  # clicks for each object, on average
OBJECTS = 8  # at most, of a test room
AT = (1, 2, 3, 4, 5)
QUALITY = 0.8


@dataclass(frozen=True)
class Size:
    """How much is done."""

    rooms: int
    tests: int
    steps: int
    voxel: float
    seeds: Sequence[int]


FULL, QUICK = Size(100, 24, 500, 0.12, SEEDS), Size(8, 3, 30, 0.2, SEEDS[:1])


def shape(size: Size, shared: bool = False) -> Shape:
    return Shape("nano", size.voxel, hidden=48, heads=4, feedforward=128, layers=3, background=6, shared=shared)


def trained(size: Size, seed: int, shared: bool = False) -> ClickSegmenter:
    scenes = Scenes(tuple(islice(rooms("train"), size.rooms)), {"data": "rooms"})
    config = TrainConfig(
        steps=size.steps, lr=1e-3, schedule="cosine", warmup=0.1, batch=3, weight_decay=1e-4, clip=0.1, seed=seed,
        save_every=size.steps,
    )  # fmt: skip
    practice = Practice(rounds=5, turn=False)
    found: Segmenter = agile3d(scenes, shape=shape(size, shared), practice=practice, config=config, work=Work())
    return found.model


def tests(model: ClickSegmenter, size: Size, seed: int) -> list[tuple[Tokens, list[int]]]:
    """Rooms that nobody has trained on, each with the objects that are to be segmented."""
    drawn, found = np.random.default_rng(seed), []
    for scene in islice(rooms("test"), size.tests):
        tokens = model.tokenise(scene)
        here = visible(tokens)
        count = int(drawn.integers(1, min(OBJECTS, len(here)) + 1))
        found.append((tokens, drawn.choice(here, count, replace=False).tolist()))
    return found


def together(curves: Sequence[Curve]) -> Curve:
    """One curve of objects that were segmented one at a time, at equal clicks for each."""
    return [Round(rounds[0].clicks, fmean(each.iou for each in rounds)) for rounds in zip(*curves, strict=True)]


def judged(size: Size, seed: int) -> dict[str, list[Curve]]:
    """The curves of one model and its rivals, room by room."""
    model = trained(size, seed)
    found: dict[str, list[Curve]] = {name: [] for name in ("agile3d", "alone", "nearest click", "layer 1", "layer 2")}
    for tokens, chosen in tests(model, size, seed):
        with torch.no_grad():
            (encoded,) = model.encode([tokens])
        found["agile3d"].append(play(answers(model, encoded), tokens, chosen, BUDGET, seed))
        alone = [play(answers(model, encoded), tokens, [each], BUDGET, seed) for each in chosen]
        found["alone"].append(together(alone))
        found["nearest click"].append(play(nearest_click(tokens), tokens, chosen, BUDGET, seed))
        for depth in (1, 2):
            curve = play(answers(model, encoded, depth), tokens, chosen, BUDGET, seed)
            found[f"layer {depth}"].append(curve)
    return found


def looped(size: Size, seed: int) -> dict[str, list[Curve]]:
    """The curves of a model whose one layer runs one to four times; three times in training."""
    model = trained(size, seed, shared=True)
    found: dict[str, list[Curve]] = {f"{loops} loops": [] for loops in (1, 2, 3, 4)}
    for tokens, chosen in tests(model, size, seed):
        with torch.no_grad():
            (encoded,) = model.encode([tokens])
        for loops in (1, 2, 3, 4):
            found[f"{loops} loops"].append(play(answers(model, encoded, loops), tokens, chosen, BUDGET, seed))
    return found


def read(found: dict[str, list[list[list[float]]]]) -> dict[str, list[Curve]]:
    """Curves as JSON has kept them."""
    return {name: [[Round(*each) for each in curve] for curve in curves] for name, curves in found.items()}


# Exactness


@torch.no_grad()
def exactness(run: Run, size: Size) -> None:
    model = fresh(size)
    scenes = [model.tokenise(scene) for scene in islice(rooms("test"), 3)]
    clicks = (Click(2, 9), Click(1, 40), Click(0, 3), Click(3, 70))
    together, alone = model.encode(scenes), [model.encode([each])[0] for each in scenes]
    apart = max(float((a.f - b.f).abs().max()) for a, b in zip(together, alone, strict=True))
    run.exact("scenes in one pass are encoded as each alone", "at most 1e-5 apart", apart, apart <= 1e-5)
    kept, anew = (model.decode(each, clicks)[-1] for each in (alone[0], model.encode([scenes[0]])[0]))
    apart = float((kept - anew).abs().max())
    run.exact("decoding what was kept is encoding anew", "at most 1e-6 apart", apart, apart <= 1e-6)
    number = (0, 3, 1, 2)
    renamed = model.decode(alone[0], tuple(Click(number[label], token) for label, token in clicks))[-1]
    apart = float((kept - renamed[:, list(number)]).abs().max())
    run.exact("other numbers for objects are other columns", "at most 1e-4 apart", apart, apart <= 1e-4)
    labels = model.labels(alone[0], clicks)
    right = all(int(labels[token]) == label for label, token in clicks)
    run.exact("clicked tokens carry the label of their click", "all", "all" if right else "not all", right)


def fresh(size: Size, wider: int = 1) -> ClickSegmenter:
    """A model that has learnt nothing, with an encoder so many times as wide."""
    torch.manual_seed(0)
    widths = Widths(16 * wider, (32 * wider, 48 * wider), (32 * wider, 32 * wider), (1, 1, 1, 1))
    return ClickSegmenter(SparseUNet(widths, size.voxel), ClickDecoder(3, 48, 4, 128, background=6)).eval()


# Cost


@torch.no_grad()
def saved(size: Size, wider: int, rounds: int) -> Ratio:
    """How many times faster a click is on an encoded scene; the maps of the scene are there for both."""
    model = fresh(size, wider)
    tokens = model.tokenise(next(rooms("test")))
    kept = model.encode([tokens])[0]
    clicks = tuple(Click(label, 31 * label + 7 * turn) for turn in range(3) for label in range(1, 6))
    ways: tuple[Callable[[], object], ...] = (
        lambda: model.decode(model.encode([tokens])[0], clicks),
        lambda: model.decode(kept, clicks),
    )
    ratios = []
    for _ in range(rounds + 2):
        anew, cached = (timed(way) for way in ways)
        ratios.append(anew / cached)
    return Ratio.of(ratios[2:])  # the first two warm up


def timed(way: Callable[[], object]) -> float:
    began = time.perf_counter()
    way()
    return time.perf_counter() - began


def costs(run: Run, size: Size) -> None:
    found = {wider: saved(size, wider, 5 if run.quick else 15) for wider in (1, 2, 4)}
    run.table(
        "A click on an encoded scene, against encoding it anew",
        ["width of the encoder", "times faster"],
        [[f"{wider} x", str(each)] for wider, each in found.items()],
    )
    nano = Measured.over_rounds(found[1])
    run.further("time of a click saved, smallest encoder", "at least 1.7 times", nano, nano.at_least(1.7))
    medians = [each.median for each in found.values()]
    grows = medians == sorted(medians)
    run.further("what is saved grows with the encoder", "from width to width", ", ".join(f"{m:.2f}" for m in medians),
                grows)  # fmt: skip


def experiment(run: Run) -> None:
    size = QUICK if run.quick else FULL
    run.data = (
        f"{size.rooms} rooms to learn from and {size.tests} to judge on, voxels of {size.voxel} m, furnished by chance"
    )
    run.part("exactness", exactness, size)
    of_seeds = [read(run.arm(f"judged, {seed}", judged, size, seed)) for seed in size.seeds]
    table(run, "Mean IoU of the objects, in percent, after clicks for each", of_seeds)

    def gain(ours: str, theirs: str, clicks: Sequence[int]) -> Measured:
        """By how many points of IoU one is above the other, in pairs of seeds."""
        return Measured.over_seeds(
            [fmean(100 * (iou_at(each[ours], k) - iou_at(each[theirs], k)) for k in clicks) for each in of_seeds]
        )

    for clicks, bound in ((1, 25), (3, 15), (5, 8)):
        above = gain("agile3d", "nearest click", [clicks])
        run.main(f"IoU@{clicks} above the nearest click's", f"at least {bound} points", above, above.at_least(bound))
    above = gain("agile3d", "alone", AT)
    run.main(
        "all objects at once above one at a time, mean of IoU@1 to 5", "at least 1 point", above, above.at_least(1)
    )
    interval = bootstrapped(of_seeds)
    run.further("the same, room by room", "an interval above 0", interval, interval.at_least(0))
    rising = [[fmean(iou_at(each["agile3d"], k) for k in clicks) for clicks in ((1,), (3,), (5,))] for each in of_seeds]
    mean = [100 * fmean(column) for column in zip(*rising, strict=True)]
    run.further("IoU@1, @3 and @5", "rising", ", ".join(f"{each:.1f}" for each in mean), mean[0] < mean[1] < mean[2])
    first, second = (gain("agile3d", f"layer {depth}", [3]) for depth in (1, 2))
    run.further("IoU@3 of three layers above that of one", "at least 1 point", first, first.at_least(1))
    run.further("IoU@3 of three layers above that of two", "at most 1 point", second, second.at_most(1))
    if not run.quick:
        loops = [read(run.arm(f"looped, {seed}", looped, size, seed)) for seed in size.seeds]
        table(run, "One layer that runs several times, three in training", loops)
    run.part("costs", costs, size)


def table(run: Run, title: str, of_seeds: Sequence[dict[str, list[Curve]]]) -> None:
    rows = []
    for name in of_seeds[0]:
        ious = [100 * fmean(iou_at(each[name], k) for each in of_seeds) for k in AT]
        rows.append([name, *ious, fmean(clicks_to(each[name], QUALITY, BUDGET) for each in of_seeds)])
    run.table(title, ["", *map(str, AT), f"clicks to {100 * QUALITY:.0f}, {BUDGET} if never"], rows)


def bootstrapped(of_seeds: Sequence[dict[str, list[Curve]]], draws: int = 2000) -> Measured:
    """The gain of all objects at once over one at a time, with an interval from drawing rooms anew."""
    gains = np.array(
        [
            fmean(100 * (iou_at([ours], k) - iou_at([theirs], k)) for k in AT)
            for each in of_seeds
            for ours, theirs in zip(each["agile3d"], each["alone"], strict=True)
        ]
    )
    drawn = np.random.default_rng(0)
    means = gains[drawn.integers(len(gains), size=(draws, len(gains)))].mean(axis=1)
    return Measured(float(gains.mean()), *map(float, np.quantile(means, [0.025, 0.975])))


if __name__ == "__main__":
    raise SystemExit(main(experiment, quick="eight rooms, thirty steps, one seed"))
