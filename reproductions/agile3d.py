"""AGILE3D at small scale: randomly furnished rooms with four colours each, segmented by clicks.

A small sparse U-Net and its decoder are trained on 100 rooms and evaluated on 24 others, by a simulated user who clicks
where the prediction is most deeply wrong. The baselines are the label of the nearest click, which needs no training,
and the same weights applied to one object at a time, with the clicks on other objects hidden. Prefixes of the decoder
and one layer that runs several times show what its depth contributes, and interleaved timings show what encoding a
scene only once saves. Ablations train the model without one of its parts; without learned queries for the background it
cannot train, since a background without clicks then has no logit. Collages of textured shapes serve as images: on a
frozen public image network (EfficientNet-Lite0, downloaded once), each level of features is evaluated separately. The
claims about rooms use 1,000 steps and five seeds, since after 500 steps the differences between seeds are as large as
the claimed effects; images, and results that are only reported in a table, use fewer of both.

    python reproductions/agile3d.py            # about an hour and a half on one core; an interrupted run resumes
    python reproductions/agile3d.py --quick    # fewer rooms and steps, one seed
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice, pairwise
from statistics import fmean, median
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from harness import Run, main
from harness.measured import Measured
from torch import Tensor, nn

from lamella.evaluate import Ratio
from lamella.files import Work
from lamella.methods.agile3d import (
    Click,
    ClickDecoder,
    Clicks,
    ClickScene,
    ClickSegmenter,
    ClickSimulation,
    ImageEncoder,
    Scenes,
    Segmenter,
    SegmenterShape,
    SparseUNet,
    Tokens,
    UNetWidths,
    agile3d,
    answers,
    clicks_to,
    collages,
    iou_at,
    nearest_click,
    play,
    rooms,
)
from lamella.methods.agile3d.judge import Curve, CurvePoint, visible
from lamella.methods.agile3d.recipe import train_segmenter
from lamella.results.record import together
from lamella.train import TrainConfig
from lamella.zoo import ZOO, pull

SEEDS = (0, 1, 2, 3, 4)
BUDGET = 6  # average clicks per object
OBJECTS = 8  # maximum number of objects per test room
AT = (1, 2, 3, 4, 5)
QUALITY = 0.8


@dataclass(frozen=True)
class Size:
    """Scale of the experiment.

    Attributes:
        rooms, tests: number of training rooms and of test rooms.
        steps: training steps of the models that claims are about.
        short: training steps of models that are only reported in a table.
        brief: training steps of the image models, which start from a pretrained backbone.
        voxel: voxel size in metres.
        seeds: random seeds of the models that claims are about.
        few: random seeds of all other models.
        without: parts that the ablations remove.
        levels: feature levels of the image network, evaluated one by one.
    """

    rooms: int
    tests: int
    steps: int
    short: int
    brief: int
    voxel: float
    seeds: Sequence[int]
    few: Sequence[int]
    without: Sequence[str]
    levels: Sequence[int]


NONE, CLICKED, SCENE, PLACES, TIMES, EQUAL, RANDOM = (
    "nothing", "click-to-click attention", "scene-to-click attention", "position encodings", "time encodings",
    "weights near clicks", "rounds of clicks, but one random click on each object",
)  # fmt: skip
FULL = Size(
    100, 24, 1000, 500, 300, 0.12, SEEDS, SEEDS[:3], (CLICKED, SCENE, PLACES, TIMES, EQUAL, RANDOM), (0, 1, 2, 3)
)
QUICK = Size(6, 2, 24, 24, 8, 0.2, SEEDS[:1], SEEDS[:1], (SCENE,), (0, 3))
NETWORK = "efficientnet-lite0"


def shape(size: Size, shared: bool = False) -> SegmenterShape:
    return SegmenterShape(
        "nano", size.voxel, hidden=48, heads=4, feedforward=128, layers=3, background=6, shared=shared
    )


def config(steps: int, seed: int) -> TrainConfig:
    return TrainConfig(
        steps=steps, lr=1e-3, schedule="cosine", warmup=0.1, batch=3, weight_decay=1e-4, clip=0.1, seed=seed,
        save_every=steps,
    )  # fmt: skip


PRACTICE = ClickSimulation(rounds=5, turn=False)


@cache
def made(kind: Callable[..., Iterator[ClickScene]], part: str, count: int) -> Sequence[ClickScene]:
    """Return rooms or collages, which are the same for all arms."""
    return tuple(islice(kind(part), count))


def trained(size: Size, seed: int, steps: int, shared: bool = False) -> ClickSegmenter:
    scenes = Scenes(tuple(made(rooms, "train", size.rooms)), {"data": "rooms"})
    how = {"shape": shape(size, shared), "simulation": PRACTICE, "config": config(steps, seed)}
    found: Segmenter = agile3d(scenes, **how, work=Work())
    return found.model


def tests(
    model: ClickSegmenter, size: Size, seed: int, scenes: Callable[..., Iterator[ClickScene]] = rooms
) -> list[tuple[Tokens, list[int]]]:
    """Return held-out scenes, each with the objects to segment."""
    drawn, found = np.random.default_rng(seed), []
    for scene in made(scenes, "test", size.tests):
        tokens = model.tokenise(scene)
        here = visible(tokens)
        count = int(drawn.integers(1, min(OBJECTS, len(here)) + 1))
        found.append((tokens, drawn.choice(here, count, replace=False).tolist()))
    return found


def averaged(curves: Sequence[Curve]) -> Curve:
    """Return the mean curve of objects that were segmented one at a time, at equal clicks per object."""
    return [CurvePoint(rounds[0].clicks, fmean(each.iou for each in rounds)) for rounds in zip(*curves, strict=True)]


def judged(size: Size, seed: int) -> dict[str, list[Curve]]:
    """Return the curves of one model and its baselines, room by room."""
    model = trained(size, seed, size.steps)
    found: dict[str, list[Curve]] = {name: [] for name in ("agile3d", "alone", "nearest click", "layer 1", "layer 2")}
    for tokens, chosen in tests(model, size, seed):
        with torch.no_grad():
            (encoded,) = model.encode([tokens])
        found["agile3d"].append(play(answers(model, encoded), tokens, chosen, BUDGET, seed))
        alone = [play(answers(model, encoded), tokens, [each], BUDGET, seed) for each in chosen]
        found["alone"].append(averaged(alone))
        found["nearest click"].append(play(nearest_click(tokens), tokens, chosen, BUDGET, seed))
        for depth in (1, 2):
            curve = play(answers(model, encoded, depth), tokens, chosen, BUDGET, seed)
            found[f"layer {depth}"].append(curve)
    return found


def looped(size: Size, seed: int) -> dict[str, list[Curve]]:
    """Return the curves of a model whose single layer runs one to four times, and three times in training."""
    model = trained(size, seed, size.short, shared=True)
    found: dict[str, list[Curve]] = {f"{loops} loops": [] for loops in (1, 2, 3, 4)}
    for tokens, chosen in tests(model, size, seed):
        with torch.no_grad():
            (encoded,) = model.encode([tokens])
        for loops in (1, 2, 3, 4):
            found[f"{loops} loops"].append(play(answers(model, encoded, loops), tokens, chosen, BUDGET, seed))
    return found


# Ablations


class Nothing(nn.Module):
    """Replacement of an attention module that returns zeros."""

    def forward(self, query: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        return torch.zeros_like(query), None


class Nowhere(nn.Module):
    """Replacement of the position encoding."""

    def forward(self, coords: Tensor) -> Tensor:
        return coords.new_zeros(len(coords), 48)


def at_random(model: Any, tokens: Any, encoded: Any, truth: Tensor, rounds: int, drawn: np.random.Generator) -> Clicks:
    """Return one click at a random position of each object, in random order."""
    labels = drawn.permutation(range(1, int(truth.max()) + 1)).tolist()
    return tuple(Click(label, int(drawn.choice(torch.nonzero(truth == label)[:, 0].numpy()))) for label in labels)


INSTEAD: dict[str, tuple[str, Callable[..., Any]]] = {
    TIMES: ("decoder.time", lambda t, hidden: torch.zeros(len(t), hidden)),
    EQUAL: ("recipe.click_weights", lambda coords, clicks, reach: torch.ones(len(coords))),
    RANDOM: ("recipe.simulate_rounds", at_random),
}


def ablated(size: Size, seed: int, part: str) -> dict[str, list[Curve]]:
    """Return the curves of a model that was trained without one of its parts, or with all of them."""
    torch.manual_seed(seed)
    model = shape(size).build()
    for layer in model.decoder.layers:
        layer.click_to_click = Nothing() if part == CLICKED else layer.click_to_click
        layer.scene_to_click = Nothing() if part == SCENE else layer.scene_to_click
    model.decoder.place = Nowhere() if part == PLACES else model.decoder.place
    target, other = INSTEAD.get(part, ("recipe.simulate_rounds", lambda *arguments: None))
    with patch(f"lamella.methods.agile3d.{target}", other) if part in INSTEAD else patch.dict({}):
        train_segmenter(model, made(rooms, "train", size.rooms), config(size.short, seed), PRACTICE, Work().directory())
        return {part: curves(model.eval(), tests(model, size, seed), seed)}


@torch.no_grad()
def curves(model: ClickSegmenter, samples: Sequence[tuple[Tokens, list[int]]], seed: int) -> list[Curve]:
    return [play(answers(model, model.encode([tokens])[0]), tokens, chosen, BUDGET, seed) for tokens, chosen in samples]


# Images


def judged_images(size: Size, seed: int, level: int | None) -> dict[str, list[Curve]]:
    """Return the curves of a decoder on one feature level of a frozen public network, or on all levels."""
    torch.manual_seed(seed)
    levels = None if level is None else [level]
    weights = pull(NETWORK) / "model.safetensors"
    encoder = ImageEncoder(ZOO[NETWORK].architecture, 48, weights=weights, frozen=True, levels=levels)
    model = ClickSegmenter(encoder, ClickDecoder(2, 48, 4, 128, background=6))
    train_segmenter(model, made(collages, "train", size.rooms), config(size.brief, seed), PRACTICE, Work().directory())
    return {named(level): curves(model.eval(), tests(model, size, seed, collages), seed)}


def named(level: int | None) -> str:
    return "all levels" if level is None else f"level {level}, stride {4 * 2**level}"


def read(found: dict[str, list[list[list[float]]]]) -> dict[str, list[Curve]]:
    """Restore curves from their JSON form."""
    return {name: [[CurvePoint(*each) for each in curve] for curve in curves] for name, curves in found.items()}


# Cost


def fresh(size: Size, wider: int = 1) -> ClickSegmenter:
    """Return an untrained model with an encoder ``wider`` times as wide."""
    torch.manual_seed(0)
    widths = UNetWidths(16 * wider, (32 * wider, 48 * wider), (32 * wider, 32 * wider), (1, 1, 1, 1))
    return ClickSegmenter(SparseUNet(widths, size.voxel), ClickDecoder(3, 48, 4, 128, background=6)).eval()


WIDER = (1, 2, 4)
CLICKS = tuple(Click(label, 31 * label + 7 * turn) for turn in range(3) for label in range(1, 6))


@torch.no_grad()
def saved(size: Size, rounds: int) -> dict[int, list[float]]:
    """Measure the speed-up of a click on an encoded scene over encoding it again, for encoders of several widths.

    All methods share the precomputed maps of the scene. The first two rounds are warm-up.
    """
    ways: dict[int, tuple[Callable[[], object], Callable[[], object]]] = {}
    for wider in WIDER:
        model = fresh(size, wider)
        tokens = model.tokenise(next(rooms("test")))
        kept = model.encode([tokens])[0]
        again = partial(lambda model, tokens: model.decode(model.encode([tokens])[0], CLICKS), model, tokens)
        ways[wider] = again, partial(model.decode, kept, CLICKS)
    found = [[timed(again) / timed(cached) for again, cached in ways.values()] for _ in range(rounds + 2)]
    return {wider: list(each) for wider, each in zip(WIDER, zip(*found[2:], strict=True), strict=True)}


@torch.no_grad()
def layered(size: Size, rounds: int = 9) -> list[list[Any]]:
    """Time a click by the number of decoder layers, or of loops of one shared layer."""
    torch.manual_seed(0)
    ways: dict[str, Callable[[], object]] = {}
    for model, what, counts in (
        (fresh(size), "layers", (1, 2, 3)),
        (shape(size, shared=True).build().eval(), "loops of one layer", (1, 2, 3, 4)),
    ):
        kept = model.encode([model.tokenise(next(rooms("test")))])[0]
        ways |= {f"{count} {what}": partial(model.decode, kept, CLICKS, count) for count in counts}
    found = [[timed(way) for way in ways.values()] for _ in range(rounds + 2)]
    return [[what, 1000 * median(seconds)] for what, seconds in zip(ways, zip(*found[2:], strict=True), strict=True)]


def timed(way: Callable[[], object]) -> float:
    began = time.perf_counter()
    way()
    return time.perf_counter() - began


def costs(run: Run, size: Size) -> None:
    found = saved(size, 5 if run.quick else 15)
    rows = [[f"{wider} x", str(Ratio.of(each))] for wider, each in found.items()]
    run.table(
        "Speed-up of a click on an encoded scene over encoding it again", ["width of the encoder", "speed-up"], rows
    )
    run.table("Time of a click by number of decoder layers", ["", "ms"], layered(size))
    nano = Measured.over_rounds(Ratio.of(found[1]))
    run.further("time of a click saved, smallest encoder", "at least 1.7 times", nano, nano.at_least(1.7))
    growth = [Measured.over_rounds(Ratio.of(np.divide(found[b], found[a]).tolist())) for a, b in pairwise(WIDER)]
    grows = together([each.at_least(1) for each in growth])
    run.further("speed-up from width to width", "grows", ", ".join(map(str, growth)), grows)


def experiment(run: Run) -> None:
    size = QUICK if run.quick else FULL
    run.data = f"{size.rooms} training rooms and {size.tests} test rooms, voxels of {size.voxel} m, randomly furnished"
    of_seeds = [read(run.arm(f"judged, {seed}", judged, size, seed)) for seed in size.seeds]
    table(run, f"Mean IoU of the objects (%) by clicks per object; {size.steps} steps", of_seeds)

    def gain(ours: str, theirs: str, clicks: Sequence[int]) -> Measured:
        """Return the difference of two arms in points of IoU, seed by seed."""
        return Measured.over_seeds(
            [fmean(100 * (iou_at(each[ours], k) - iou_at(each[theirs], k)) for k in clicks) for each in of_seeds]
        )

    for clicks, bound in ((1, 25), (3, 15), (5, 8)):
        above = gain("agile3d", "nearest click", [clicks])
        run.main(f"IoU@{clicks} gain over the nearest click", f"at least {bound} points", above, above.at_least(bound))
    above = gain("agile3d", "alone", AT)
    run.main(
        "gain of all objects at once over one at a time, mean of IoU@1 to 5",
        "at least 1 point",
        above,
        above.at_least(1),
    )
    interval = Measured.over_seeds_and_items([room_by_room(each) for each in of_seeds])
    run.further("the same, room by room", "an interval above 0", interval, interval.at_least(0))
    rising = [[fmean(iou_at(each["agile3d"], k) for k in clicks) for clicks in ((1,), (3,), (5,))] for each in of_seeds]
    mean = [100 * fmean(column) for column in zip(*rising, strict=True)]
    run.further("IoU@1, @3 and @5", "rising", ", ".join(f"{each:.1f}" for each in mean), mean[0] < mean[1] < mean[2])
    first, second = (gain("agile3d", f"layer {depth}", [3]) for depth in (1, 2))
    run.further("IoU@3 gain of three layers over one", "at least 1 point", first, first.at_least(1))
    run.further("IoU@3 gain of three layers over two", "within 1 point", second, second.within(-1, 1))
    if not run.quick:
        loops = [read(run.arm(f"looped, {seed}", looped, size, seed)) for seed in size.few]
        table(run, f"One shared layer run several times, three times in training; {size.short} steps", loops)
    without_parts(run, size)
    of_pictures(run, size)
    run.part("costs", costs, size)


def without_parts(run: Run, size: Size) -> None:
    """Report ablations of single parts beside complete models."""
    of_seeds = []
    for seed in size.few:
        found: dict[str, list[Curve]] = {}
        for part in (NONE, *size.without):
            found |= read(run.arm(f"without {part}, {seed}", ablated, size, seed, part))
        of_seeds.append(found)
    table(run, f"Ablation: trained without ..., {size.short} steps", of_seeds)


def of_pictures(run: Run, size: Size) -> None:
    """Compare the levels of a public network: is the finest one at least as good as every other?"""
    of_seeds = []
    for seed in size.few:
        found: dict[str, list[Curve]] = {}
        for level in (None, *size.levels):
            found |= read(run.arm(f"pictures, {named(level)}, {seed}", judged_images, size, seed, level))
        of_seeds.append(found)
    table(run, "Collages, with a frozen public backbone", of_seeds)
    finest, *others = ([100 * iou_at(each[named(level)], 1) for each in of_seeds] for level in size.levels)
    above = Measured.over_seeds(np.subtract(finest, max(others, key=fmean)).tolist())
    run.further(
        "IoU@1 gain of the finest level over the best other level", "at least 0 points", above, above.at_least(0)
    )


def table(run: Run, title: str, of_seeds: Sequence[dict[str, list[Curve]]]) -> None:
    rows = []
    for name in of_seeds[0]:
        ious = [100 * fmean(iou_at(each[name], k) for each in of_seeds) for k in AT]
        rows.append([name, *ious, fmean(clicks_to(each[name], QUALITY, BUDGET) for each in of_seeds)])
    run.table(title, ["", *map(str, AT), f"clicks to {100 * QUALITY:.0f}, {BUDGET} if never"], rows)


def room_by_room(found: dict[str, list[Curve]]) -> list[float]:
    """Return the gain in points of segmenting all objects of a room at once over one at a time, of each room."""
    return [
        fmean(100 * (iou_at([ours], k) - iou_at([theirs], k)) for k in AT)
        for ours, theirs in zip(found["agile3d"], found["alone"], strict=True)
    ]


if __name__ == "__main__":
    raise SystemExit(main(experiment, quick="six rooms, two dozen steps, one seed"))
