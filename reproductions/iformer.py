"""iFormer at small scale: textures that need high frequencies, arrangements that need distant positions.

The premise is that attention alone leaves at least 5 percent of the images wrong, so that there is something to gain.
The main claims: with both branches a network is more accurate than with either alone, with either more than with
attention alone, with both by at least 2 points; and high branches have a higher amplitude at the highest frequency than
low ones, by 0.5 in logarithm. Further checks compare the ramp with a flat and a reversed allocation of equal size.

Then heads of vision transformers are removed, which is an extension of Lamella: replaced by fitted local paths with the
measured ramp, its reverse, or at random, or cut without a replacement, at equal multiply-adds of attention. The cut
networks get at least as many multiply-adds as the ramp. A ramp that is flat is its own reverse, so that comparison is
over the seeds whose ramp is not. All are healed alike.

Networks are compared on textures that are fainter than the noise. With plain textures and spots at any position,
networks of four layers learn all of the textures and nothing of the spots, whatever their branches. Each has its own
learning rate, chosen on validation images; all share seeds, data order, test images and timm's mixup. Flips, rotations
and crops would change the arrangement, which is part of the class.

    python reproductions/iformer.py            # about 85 minutes on one core; an interrupted run resumes
    python reproductions/iformer.py --quick    # few steps, one seed
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from harness import Run, main
from harness.design import Rate, tuned
from harness.measured import Measured
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from lamella.data import InputContext
from lamella.files import Finished
from lamella.methods.iformer import (
    Album,
    Geometry,
    StageShape,
    Vision,
    allocate,
    apply_plan,
    convolution_replacement,
    costs_by_heads,
    fit_convolutions,
    importance,
    mirrored,
    most_important,
    plan,
    spectra,
)
from lamella.methods.iformer.baselines import cut, least_cut, nothing
from lamella.methods.iformer.measuring import mixers
from lamella.methods.iformer.method import costs
from lamella.methods.iformer.recipe import Distilled, new_network
from lamella.methods.iformer.textures import CLASSES, SIDE
from lamella.results import Record
from lamella.train import Augmentation, AugmentedLoss, TrainConfig, class_cross_entropy, fit, supervised

NANO = StageShape(depths=(2, 2), widths=(48, 96), head_dim=16, attention=(1, 1, 4, 4))
NETWORKS = {  # equal numbers of parameters, by the width of their feed-forward sublayers
    "attention alone": replace(NANO, attention=(3, 3, 6, 6)),
    "attention and convolution": replace(NANO, paths="conv"),
    "attention and pooling": replace(NANO, paths="pool"),
    "all three, ramp": NANO,
}
ALLOCATIONS = {  # at the ramp's learning rate
    "all three, flat": replace(NANO, attention=(1, 2, 3, 3)),
    "all three, reversed": replace(NANO, attention=(2, 2, 2, 2)),
}
ALONE, CONV, POOLED, RAMP = NETWORKS
FLAT, REVERSED = ALLOCATIONS
MIXED = Augmentation(crop=1.0, flip=0.0, policy="", erasing=0.0, mixup=0.8, cutmix=0.0)
RATES = (1e-3, 2e-3, 4e-3)
CHOOSES = 100  # the seed with which rates are chosen
ROOM = 5.0  # percent of the images that attention alone must get wrong
SHARES = (0.85, 0.7)  # multiply-adds of attention that remain
WAYS = ("cut", "ramp", "reversed", "random")
MATTERS = 1.0  # points that random replacement must cost after healing, for the ways to differ
KERNEL, RIDGE, POOL = 3, 1e-3, 0.5
LEARNING = TrainConfig(schedule="cosine", warmup=0.1, batch=64, weight_decay=0.05)


@dataclass(frozen=True)
class Size:
    """Scale of the experiment."""

    images: int = 10_000
    tests: int = 2000
    steps: int = 800
    see: int = 1500  # training steps of a vision transformer; healing takes a tenth of them
    calibration: int = 320
    seeds: int = 8
    operated: int = 6  # seeds of the vision transformers


FULL, QUICK = Size(), Size(images=120, tests=40, steps=4, see=10, calibration=20, seeds=1, operated=1)


rendered: dict[tuple[str, str, int], tuple[Tensor, Tensor]] = {}


def prepared(world: str, part: str, count: int) -> tuple[Tensor, Tensor]:
    """Return images in [-1, 1] and classes: to train on, to choose on (of another seed), or to judge by."""
    if (world, part, count) not in rendered:
        context = InputContext(split="calibration" if part == "train" else "test", seed=int(part == "validation"))
        images = Album.open(world, context, count=count).items
        x = torch.stack([torch.from_numpy(each.image).permute(2, 0, 1) for each in images]) / 127.5 - 1
        rendered[world, part, count] = x, torch.tensor([each.label for each in images])
    return rendered[world, part, count]


def samples(world: str, count: int) -> list[dict[str, Tensor]]:
    return [{"x": x, "y": y} for x, y in zip(*prepared(world, "train", count), strict=True)]


@torch.no_grad()
def logits(vision: Vision, x: Tensor) -> Tensor:
    return torch.cat([vision.model(each) for each in x.split(200)])


def right(vision: Vision, world: str, part: str, count: int) -> list[float]:
    """Return 100 for each image that is named correctly, and 0 for the others."""
    x, y = prepared(world, part, count)
    return (100.0 * (logits(vision, x).argmax(1) == y)).tolist()


# Branches and ramps


def sized(shape: StageShape, count: int) -> StageShape:
    """Return a shape whose feed-forward sublayers compensate for the different sizes of its mixers."""
    ratios = [each / 96 for each in range(96, 960)]
    return replace(
        shape, mlp_ratio=min(ratios, key=lambda ratio: abs(parameters(replace(shape, mlp_ratio=ratio)) - count))
    )


def parameters(shape: StageShape) -> int:
    """Return the number of parameters by the formula of a mixer.

    Networks of these widths otherwise differ in their feed-forward sublayers only.
    """
    found = 0
    for width, kept in zip(shape.widths, shape.by_stage(), strict=True):
        for each in kept:
            low = each * shape.head_dim
            high, fused = width - low, 2 * width - low
            paths = {"both": high**2 + 10 * high, "conv": 2 * high**2 + 18 * high, "pool": 2 * high**2 + 2 * high}
            hidden = int(width * shape.mlp_ratio)
            found += paths[shape.paths] + 3 * low**2 + 3 * low + 9 * fused * shape.fused + fused * width + width
            found += 2 * width * hidden + hidden + width
    return found


FAINT = "faint-textures"


def taught(shape: StageShape, seed: int, size: Size, rate: float) -> Vision:
    """Train a network on faint textures, with as many parameters as the ramp."""
    vision = new_network(sized(shape, parameters(NANO)), SIDE, 3, CLASSES, seed=seed)
    config = replace(LEARNING, steps=size.steps, lr=rate, seed=seed, save_every=size.steps)
    loss = AugmentedLoss(MIXED, CLASSES, vision.mean, vision.std)
    with tempfile.TemporaryDirectory() as work:
        fit(vision.model, samples(FAINT, size.images), supervised(loss), config, out=work, trainable=lambda name: True)
    vision.model.eval()
    return vision


def learnt(shape: StageShape, seed: int, size: Size, rate: float) -> dict[str, Any]:
    """Return the images that a trained network names correctly, its size, and the spectra of its branches."""
    vision = taught(shape, seed, size, rate)
    found = {
        "right": right(vision, FAINT, "test", size.tests),
        "parameters": sum(each.numel() for each in vision.model.parameters()),
    }
    if shape == NANO:
        test = Album.open(FAINT, InputContext(split="test"), count=size.calibration).items
        found["spectra"] = spectra(vision, test)
    return found


def held_out(shape: StageShape, size: Size, rate: float) -> float:
    """Return the loss on validation images, in nats."""
    vision = taught(shape, CHOOSES, size, rate)
    x, y = prepared(FAINT, "validation", size.tests)
    return float(cross_entropy(logits(vision, x), y))


def wrong(shape: StageShape, size: Size, rate: float) -> float:
    """Return the percentage of validation images that are named wrongly."""
    return 100 - statistics.fmean(right(taught(shape, CHOOSES, size, rate), FAINT, "validation", size.tests))


def on_branches(run: Run, size: Size) -> None:
    errors = run.arm("premise", wrong, NETWORKS[ALONE], size, RATES[1])
    run.premise("attention alone: wrong on validation images, percent", f"at least {ROOM:g}", errors, errors >= ROOM)
    if run.quick:
        rates = {name: Rate(RATES[1], {RATES[1]: 0.0}) for name in NETWORKS}
    else:
        rates = tuned(run, {name: partial(held_out, shape, size) for name, shape in NETWORKS.items()}, RATES)
    rates |= dict.fromkeys(ALLOCATIONS, rates[RAMP])
    seeds = range(run.seed, run.seed + size.seeds)
    run.freeze("mean over seeds and test images of paired differences in accuracy", seeds, scale=vars(size),
               rates={name: rate.value for name, rate in rates.items()}, shares=SHARES)  # fmt: skip
    runs = {
        name: [run.arm(f"{name}, {seed}", learnt, shape, seed, size, rates[name].value) for seed in seeds]
        for name, shape in (NETWORKS | ALLOCATIONS).items()
    }
    scores = {name: np.array([each["right"] for each in found]) for name, found in runs.items()}  # [seeds, images]
    table = []
    for name, each in scores.items():
        means = each.mean(1)
        table.append([name, runs[name][0]["parameters"], rates[name].value, means.mean(), means.min(), means.max()])
    run.table(f"Accuracy on test images, percent, over {size.seeds} seeds (chance: {100 / CLASSES:g})",
              ["network", "parameters", "rate", "mean", "least", "most"], table)  # fmt: skip
    counts = [found[0]["parameters"] for found in runs.values()]
    run.exact("parameters of all networks", "within 1 percent", max(counts) / min(counts) - 1,
              max(counts) / min(counts) <= 1.01)  # fmt: skip
    branch = min((CONV, POOLED), key=lambda name: min(rates[name].scores.values()))
    worse = CONV if branch == POOLED else POOLED
    claims = [
        (RAMP, branch, 0.0, run.main), (worse, ALONE, 0.0, run.main), (RAMP, ALONE, 2.0, run.main),
        (RAMP, FLAT, 0.0, run.further), (FLAT, REVERSED, 0.0, run.further), (RAMP, REVERSED, 0.0, run.further),
    ]  # fmt: skip
    for ours, theirs, least, kind in claims:
        gain = Measured.over_seeds_and_items(scores[ours] - scores[theirs])
        kind(f"{ours} over {theirs}, points", f"at least {least:g}", gain, gain.at_least(least))
    branches([each["spectra"] for each in runs[RAMP]], run)


def branches(found: Sequence[Sequence[dict[str, Any]]], run: Record) -> None:
    """Report the spectra of high and low branches of trained networks, seed by seed."""
    rows = []
    for layer in range(len(found[0])):
        parts = [[seed[layer][part] for seed in found] for part in ("high", "low", "mixer")]
        rows.append([layer, *(statistics.fmean(each["delta"][-1] for each in part) for part in parts),
                     *(statistics.fmean(each["high"] for each in part) for part in parts)])  # fmt: skip
    columns = ["layer", "high", "low", "both mixed", "high, energy", "low, energy", "both mixed, energy"]
    run.table("Branches of a trained iFormer: log amplitude at pi, and energy beyond pi / 2", columns, rows)
    least = Measured.over_seeds(
        [min(layer["high"]["delta"][-1] - layer["low"]["delta"][-1] for layer in seed) for seed in found]
    )
    run.main("high branch over low branch at pi, in the layer where least", "at least 0.5", least, least.at_least(0.5))


# Surgery

PLAIN = "textures"


def seeing(seed: int, size: Size, folder: Path) -> dict[str, Any]:
    """Train a vision transformer of six layers and four heads, saved in a folder; return its answers and spectra."""
    vision = blank(seed)
    config = replace(LEARNING, steps=size.see, lr=5e-4, seed=seed, save_every=size.see)
    fit(vision.model, samples(PLAIN, size.images), supervised(class_cross_entropy), config, out=folder / "run",
        trainable=lambda name: True)  # fmt: skip
    vision.model.eval()
    save_file({name: each.contiguous() for name, each in vision.model.state_dict().items()}, folder / "vit.safetensors")
    test = Album.open(PLAIN, InputContext(split="test"), count=size.calibration).items
    return {"right": right(vision, PLAIN, "test", size.tests), "spectra": spectra(vision, test)}


def blank(seed: int) -> Vision:
    torch.manual_seed(seed)
    model = timm.create_model("vit_tiny_patch16_224", img_size=SIDE, patch_size=4, embed_dim=64, depth=6, num_heads=4,
                              num_classes=CLASSES)  # fmt: skip
    # As large as patch embeddings: from timm's 0.02, attention is not learnt in so few steps.
    model.pos_embed.data.mul_(25)
    return Vision.of(model, "a small ViT")


def operated(way: str, share: float, seed: int, size: Size, folder: Path) -> dict[str, Any]:
    """Remove heads of a vision transformer, and return what it names correctly before and after healing."""
    vision = blank(seed)
    vision.model.load_state_dict(load_file(folder / "vit.safetensors"))
    built, kept = without_heads(vision, way, share, seed, size)
    before = right(built, PLAIN, "test", size.tests)
    loss = Distilled(vision.model, temperature=1.0, features=1.0, labels=0.0)
    steps = max(1, size.see // 10)
    config = replace(LEARNING, steps=steps, lr=5e-4, seed=seed, save_every=steps)
    with tempfile.TemporaryDirectory() as work:
        fit(built.model, samples(PLAIN, size.images), supervised(loss), config, out=work, trainable=lambda name: True)
    built.model.eval()
    cost = costs(Geometry.of(vision.model), mixers(vision.model), mixers(built.model))
    return {
        "kept": [len(each) for each in kept],
        "before": before,
        "healed": right(built, PLAIN, "test", size.tests),
        **{name: each["after"] / each["before"] for name, each in cost.items()},
    }


def without_heads(
    vision: Vision, way: str, share: float, seed: int, size: Size
) -> tuple[Vision, Sequence[tuple[int, ...]]]:
    """Return a network with fewer heads, and the heads that remain, at a fraction of attention's multiply-adds."""
    chosen = Album.open(PLAIN, InputContext(), count=size.calibration).items
    geometry, unfinished = Geometry.of(vision.model), Finished(None, [])
    found = fit_convolutions(vision, geometry, chosen, KERNEL, RIDGE)
    worth = importance(vision, geometry, chosen, convolution_replacement(found, geometry, KERNEL), unfinished)
    afford = [each.flops for each in costs_by_heads(vision, geometry, KERNEL, POOL)]
    whole = geometry.depth * afford[-1]
    counts = allocate(worth, afford, int(share * whole))
    if way == "cut":
        spared = 1 - sum(afford[count] for count in counts) / whole
        gone = int(spared * geometry.depth * geometry.heads)  # at least as many multiply-adds remain
        kept = least_cut(importance(vision, geometry, chosen, nothing, Finished(None, [])), gone)
        return cut(vision, geometry, kept), kept
    drawn = np.random.default_rng(seed)
    if way == "random":
        worth, counts = drawn.random(worth.shape), [counts[each] for each in drawn.permutation(len(counts))]
    kept = most_important(worth, mirrored(counts) if way == "reversed" else counts)
    return apply_plan(vision, geometry, plan(geometry, kept, POOL), found, KERNEL, seed), kept


def on_surgery(run: Run, size: Size) -> None:
    seeds = range(run.seed, run.seed + size.operated)
    folders = [run.work / f"vit {seed}" for seed in seeds]
    seen = [run.arm(f"vision transformer, {seed}", seeing, seed, size, folder)
            for seed, folder in zip(seeds, folders, strict=True)]  # fmt: skip
    falls(seen, run)
    original = np.array([each["right"] for each in seen])
    table: list[list[Any]] = [["all heads", "", "", original.mean(), 1, 1]]
    for share in SHARES:
        done = {
            way: [run.arm(f"{way}, {share:.0%}, {seed}", operated, way, share, seed, size, folder)
                  for seed, folder in zip(seeds, folders, strict=True)]
            for way in WAYS
        }  # fmt: skip
        healed = {way: np.array([each["healed"] for each in found]) for way, found in done.items()}
        for way, found in done.items():
            fitted, flops, count = (np.mean([each[key] for each in found]) for key in ("before", "flops", "parameters"))
            heads = " ".join(map(str, found[0]["kept"]))
            table.append([f"{way}, {share:.0%}", heads, float(fitted), healed[way].mean(), float(flops), float(count)])
        lost = Measured.over_seeds_and_items(original - healed["random"])
        run.further(f"{share:.0%}: points that random replacement costs after healing", f"at least {MATTERS:g}", lost,
                    lost.at_least(MATTERS))  # fmt: skip
        if not lost.at_least(MATTERS) and not run.quick:  # then the ways cannot be told apart
            continue
        steep = [a["kept"] != b["kept"] for a, b in zip(done["ramp"], done["reversed"], strict=True)]
        for other in ("cut", "random", "reversed"):
            counted = steep if other == "reversed" else [True] * len(steep)
            name = f"{share:.0%}: ramp over {other} after healing, points, {sum(counted)} seeds"
            if not any(counted):
                run.further(name, "at least 0", "all ramps are flat", None)
                continue
            gain = Measured.over_seeds_and_items((healed["ramp"] - healed[other])[counted])
            run.further(name, "at least 0", gain, gain.at_least(0.0))
    run.table(f"Vision transformers with fewer heads, accuracy in percent, means over {len(seeds)} seeds",
              ["removed heads, multiply-adds", "remaining heads by layer, first seed", "before healing", "healed",
               "attention's multiply-adds", "attention's parameters"], table)  # fmt: skip


def falls(seen: Sequence[dict[str, Any]], run: Record) -> None:
    """Check whether attention passes fewer high frequencies in deeper layers."""
    layers = range(len(seen[0]["spectra"]))
    deltas = [[seed["spectra"][layer]["mixer"]["delta"][-1] for layer in layers] for seed in seen]
    rows = [[layer, *(each[layer] for each in deltas)] for layer in layers]
    run.table("Output of attention in a trained vision transformer: log amplitude at pi, by seed",
              ["layer", *(f"seed {seed}" for seed in range(len(seen)))], rows)  # fmt: skip
    fall = Measured.over_seeds([float(np.polyfit(list(layers), each, 1)[0]) for each in deltas])
    run.further("log amplitude at pi, by layer", "falls with depth", fall, fall.at_most(0.0))


def experiment(run: Run) -> None:
    size = QUICK if run.quick else FULL
    run.data = (
        "images of 32 x 32 pixels, five fine textures by four arrangements of two spots; faint textures for the "
        "branches"
    )
    on_branches(run, size)
    on_surgery(run, size)


if __name__ == "__main__":
    raise SystemExit(main(experiment, quick="few steps, one seed"))
