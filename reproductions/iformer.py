"""iFormer at small scale: textures that need high frequencies, arrangements that need distant positions.

Checks the published numbers of parameters and the definition of a mixer; trains small iFormers with and without their
branches, with a ramp, flat and reversed; measures the spectra of branches and of a vision transformer; and prunes
heads of vision transformers, with or without local paths as a replacement.

Branches are compared on textures that are fainter than the noise. With plain textures and spots at any position,
networks of four layers learn all of the textures and nothing of the spots, whatever their branches (25 percent of 20
classes).

    python reproductions/iformer.py            # about two hours on one core; an interrupted run resumes
    python reproductions/iformer.py --quick    # few steps, one seed
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from harness import Run, main
from harness.measured import Measured
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lamella.data import InputContext
from lamella.files import Finished, Work
from lamella.methods.iformer import (
    BASE,
    LARGE,
    SMALL,
    Album,
    Geometry,
    IFormerClassifier,
    InceptionMixer,
    InceptionTransformer,
    StageShape,
    Vision,
    allocate,
    apply_plan,
    compare,
    convolution_replacement,
    fit_convolutions,
    importance,
    mirrored,
    most_important,
    plan,
    spectra,
    spectrum,
    train,
)
from lamella.methods.iformer.baselines import cut, least_cut, nothing
from lamella.methods.iformer.measuring import mixers
from lamella.methods.iformer.method import costs
from lamella.methods.iformer.recipe import Distilled, rows
from lamella.methods.iformer.textures import CLASSES, SIDE
from lamella.results import Record
from lamella.train import TrainConfig, class_cross_entropy, fit, supervised

PUBLISHED = {"S": (SMALL, 19_866_344), "B": (BASE, 47_866_216), "L": (LARGE, 86_637_096)}
NANO = StageShape(depths=(2, 2), widths=(48, 96), head_dim=16, attention=(1, 1, 4, 4))
NETWORKS = {  # equal numbers of parameters, by the width of their feed-forward sublayers
    "attention alone": replace(NANO, attention=(3, 3, 6, 6)),
    "attention and convolution": replace(NANO, paths="conv"),
    "attention and pooling": replace(NANO, paths="pool"),
    "all three, ramp": NANO,
    "all three, flat": replace(NANO, attention=(1, 2, 3, 3)),
    "all three, reversed": replace(NANO, attention=(2, 2, 2, 2)),
}
RAMP = "all three, ramp"
BESIDE = {  # one seed, without claims
    "convolution alone": replace(NANO, attention=(0, 0, 0, 0), paths="conv"),
    "all three, ramp, not fused": replace(NANO, fused=False),
}
BUDGETS = (0.25, 0.5)  # fractions of pruned heads
WAYS = ("cut", "ramp", "reversed", "random")
KERNEL, RIDGE, POOL = 3, 1e-3, 0.5
LEARNING = TrainConfig(schedule="cosine", warmup=0.1, batch=64, weight_decay=0.05)


@dataclass(frozen=True)
class Size:
    """Scale of the experiment."""

    pictures: int = 10_000
    steps: int = 1000
    see: int = 2000  # training steps of a vision transformer; healing takes a tenth of them
    calibration: int = 320
    seeds: int = 3


FULL, QUICK = Size(), Size(pictures=120, steps=4, see=10, calibration=20, seeds=1)


# Exactness


@torch.no_grad()
def exact(run: Record) -> None:
    with torch.device("meta"):
        counts = {
            name: sum(each.numel() for each in InceptionTransformer(shape).parameters())
            for name, (shape, _) in PUBLISHED.items()
        }
    same = counts == {name: count for name, (_, count) in PUBLISHED.items()}
    run.exact("parameters of S, B and L", "19,866,344, 47,866,216 and 86,637,096", counts, same)
    torch.manual_seed(0)
    out = InceptionTransformer(SMALL).eval()(torch.randn(1, 3, 224, 224))
    run.exact("iFormer-S at 224 pixels", "1 x 1000", list(out.shape), out.shape == (1, 1000))
    wide = InceptionTransformer(SMALL, img_size=64).eval().forward_features(torch.randn(1, 3, 64, 96))
    run.exact("iFormer-S at 64 x 96 pixels, its last map", "1 x 2 x 3 x 384", list(wide.shape),
              wide.shape == (1, 2, 3, 384))  # fmt: skip
    mixer, x = drawn(InceptionMixer(64, 4, 4)), torch.randn(2, 6, 6, 64, dtype=torch.float64)
    apart = float((attended(mixer, x) - mixer(x)).abs().max())
    run.exact("a mixer whose heads all attend, and attention with its fusion", "within 1e-10", apart, apart <= 1e-10)
    mixer = drawn(InceptionMixer(64, 4, 2))
    for each in mixer.high_mixer.parameters():
        each.zero_()
    apart = float((attended(mixer, x) - mixer(x)).abs().max())
    run.exact("a mixer whose high branch outputs zero, and the same", "within 1e-10", apart, apart <= 1e-10)
    apart = float((permuted(mixer)(x) - mixer(x)).abs().max())
    run.exact("heads of the low branch in another order", "within 1e-10", apart, apart <= 1e-10)
    shapes = [list(drawn(InceptionMixer(64, 4, 2, pool))(x[:, :5]).shape) for pool in (1, 2)]
    run.exact("attention at full and at half resolution, 5 x 6 positions", "one shape", shapes, shapes[0] == shapes[1])
    noise = torch.randn(64, 4, 8, 8)
    places = torch.stack(torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij"), -1).flatten(0, 1)
    weights = (-torch.cdist(places, places).square() / 4).softmax(-1)
    averaged = (weights @ noise.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(-1, (8, 8))
    shares = [spectrum(each).high for each in (noise, averaged)]
    run.exact("energy beyond pi / 2 of white noise, and averaged by attention", "falls to a quarter or less", shares,
              shares[1] < shares[0] / 4)  # fmt: skip


def attended(mixer: InceptionMixer, x: Tensor) -> Tensor:
    """Return the expected mixer output: torch's own attention over the last channels, zeros elsewhere, fusion."""
    low = mixer.low_dim
    plain = nn.MultiheadAttention(low, mixer.low_mixer.heads, batch_first=True).double()
    plain.in_proj_weight.copy_(mixer.low_mixer.qkv.weight)
    plain.in_proj_bias.copy_(mixer.low_mixer.qkv.bias)
    plain.out_proj.weight.copy_(torch.eye(low))
    plain.out_proj.bias.zero_()
    tokens = x[..., -low:].flatten(1, 2)
    y = plain(tokens, tokens, tokens)[0].transpose(1, 2).unflatten(-1, x.shape[1:3])
    y = torch.cat([y.new_zeros(len(x), 2 * mixer.high_dim, *x.shape[1:3]), y], 1)
    return mixer.proj(y + mixer.conv_fuse(y)).permute(0, 2, 3, 1)


def drawn(mixer: InceptionMixer) -> InceptionMixer:
    torch.manual_seed(0)
    for each in mixer.parameters():
        each.copy_(0.2 * torch.randn_like(each))
    return mixer.double().eval()


def permuted(mixer: InceptionMixer) -> InceptionMixer:
    """Return a mixer with the two heads of its low branch in swapped order."""
    again = drawn(InceptionMixer(64, 4, 2))
    again.load_state_dict(mixer.state_dict())
    for name in ("weight", "bias"):
        qkv = getattr(mixer.low_mixer.qkv, name)
        getattr(again.low_mixer.qkv, name).copy_(qkv.view(3, 2, 16, -1).flip(1).reshape(qkv.shape))
    for each, axis in ((again.conv_fuse.weight, 0), (again.proj.weight, 1)):
        low = each.narrow(axis, 64, 32)
        low.copy_(torch.cat(low.chunk(2, axis)[::-1], axis))
    return again


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


def learnt(name: str, seed: int, size: Size, out: Path) -> dict[str, Any]:
    """Train a network on faint textures; return its test accuracy, its size, and the spectra of its branches."""
    images = Album.open("faint-textures", InputContext(), count=size.pictures)
    shape = sized((NETWORKS | BESIDE)[name], parameters(NANO))
    config = replace(LEARNING, steps=size.steps, lr=2e-3, seed=seed, save_every=size.steps)
    done: IFormerClassifier = train(images, shape=shape, size=SIDE, config=config, work=Work(out))
    found = {"accuracy": 100 * done.findings["accuracy"], "parameters": done.findings["parameters"]}
    if name == RAMP:
        found["spectra"] = spectra(done.vision, images.part("test").items[: size.calibration])
    return found


def on_branches(run: Run, size: Size) -> None:
    seeds = range(size.seeds)
    runs = {
        name: [run.arm(f"{name}, {seed}", learnt, name, seed, size, run.work / f"{name} {seed}") for seed in seeds]
        for name in NETWORKS
    }
    right = {name: [each["accuracy"] for each in found] for name, found in runs.items()}
    rows = [
        [name, runs[name][0]["parameters"], statistics.fmean(each), min(each), max(each)]
        for name, each in right.items()
    ]
    run.table(f"Accuracy on test images, percent, over {size.seeds} seeds (chance: {100 / CLASSES:g})",
              ["network", "parameters", "mean", "least", "most"], rows)  # fmt: skip
    beside = {name: run.arm(f"{name}, 0", learnt, name, 0, size, run.work / f"{name} 0") for name in BESIDE}
    rows = [[name, each["parameters"], each["accuracy"]] for name, each in {RAMP: runs[RAMP][0], **beside}.items()]
    run.table("Other networks, accuracy in percent, first seed only", ["network", "parameters", "named"], rows)
    counts = [each["parameters"] for each in (*(found[0] for found in runs.values()), *beside.values())]
    run.exact("parameters of all networks", "within 1 percent", max(counts) / min(counts) - 1,
              max(counts) / min(counts) <= 1.01)  # fmt: skip
    conv, pool, alone = (
        right[name] for name in ("attention and convolution", "attention and pooling", "attention alone")
    )
    gain = over(right[RAMP], [max(pair) for pair in zip(conv, pool, strict=True)])
    run.main("all three, over the better of two branches", "more", gain, denied(gain.at_most(0.0)))
    gain = over([min(pair) for pair in zip(conv, pool, strict=True)], alone)
    run.main("the worse of two branches, over attention alone", "more", gain, denied(gain.at_most(0.0)))
    gain = over(right[RAMP], alone)
    run.main("all three, over attention alone", "at least 2 points more", gain, gain.at_least(2.0))
    gain = over(right[RAMP], right["all three, flat"])
    run.further("ramp, over flat", "not less", gain, gain.at_least(0.0))
    gain = over(right["all three, flat"], right["all three, reversed"])
    run.further("flat, over reversed", "not less", gain, gain.at_least(0.0))
    branches([each["spectra"] for each in runs[RAMP]], run)


def over(ours: Sequence[float], theirs: Sequence[float]) -> Measured:
    return Measured.over_seeds([a - b for a, b in zip(ours, theirs, strict=True)])


def denied(verdict: bool | None) -> bool | None:
    """Negate a comparison with an upper bound of 0; undecided stays undecided."""
    return None if verdict is None else not verdict


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


def seeing(seed: int, size: Size, folder: Path) -> dict[str, Any]:
    """Train a vision transformer of six layers and four heads, saved in a folder; return accuracy and spectra."""
    images = Album.open("textures", InputContext(), count=size.pictures)
    vision = blank(seed)
    config = replace(LEARNING, steps=size.see, lr=5e-4, seed=seed, save_every=size.see)
    fit(vision.model, rows(vision, images.items), supervised(class_cross_entropy), config, out=folder / "run",
        trainable=lambda name: True)  # fmt: skip
    vision.model.eval()
    save_file({name: each.contiguous() for name, each in vision.model.state_dict().items()}, folder / "vit.safetensors")
    test = images.part("test").items
    labels = torch.tensor([each.label for each in test])
    named = float((vision.logits(test).argmax(1) == labels).double().mean())
    return {"accuracy": 100 * named, "spectra": spectra(vision, test[: size.calibration])}


def blank(seed: int) -> Vision:
    torch.manual_seed(seed)
    model = timm.create_model("vit_tiny_patch16_224", img_size=SIDE, patch_size=4, embed_dim=64, depth=6, num_heads=4,
                              num_classes=CLASSES)  # fmt: skip
    # As large as patch embeddings: from timm's 0.02, attention is not learnt in so few steps.
    model.pos_embed.data.mul_(25)
    return Vision.of(model, "a small ViT")


def operated(way: str, share: float, seed: int, size: Size, folder: Path, out: Path) -> dict[str, Any]:
    """Prune a fraction of the heads of a vision transformer; return accuracies in percent before and after healing."""
    images = Album.open("textures", InputContext(), count=size.pictures)
    chosen, test = images.items[: size.calibration], images.part("test").items
    vision = blank(seed)
    vision.model.load_state_dict(load_file(folder / "vit.safetensors"))
    geometry = Geometry.of(vision.model)
    whole = geometry.depth * geometry.heads
    gone = round(share * whole)
    if way == "cut":
        worth = importance(vision, geometry, chosen, nothing, Finished(None, []))
        kept = least_cut(worth, gone)
        built = cut(vision, geometry, kept)
    else:
        found = fit_convolutions(vision, geometry, chosen, KERNEL, RIDGE)
        worth = importance(
            vision, geometry, chosen, convolution_replacement(found, geometry, KERNEL), Finished(None, [])
        )
        counts = allocate(worth, list(range(geometry.heads + 1)), whole - gone)
        if way == "random":
            kept = least_cut(np.random.default_rng(seed).random(worth.shape), gone)
        else:
            kept = most_important(worth, counts if way == "ramp" else mirrored(counts))
        built = apply_plan(vision, geometry, plan(geometry, kept, POOL), found, KERNEL, seed)
    before = compare(vision, built, test, CLASSES)
    loss = Distilled(vision.model, temperature=1.0, features=1.0, labels=0.0)
    steps = max(1, size.see // 10)
    config = replace(LEARNING, steps=steps, lr=5e-4, seed=seed, save_every=steps)
    fit(built.model, rows(built, images.items), supervised(loss), config, out=out, trainable=lambda name: True)
    built.model.eval()
    after = compare(vision, built, test, CLASSES)
    cost = costs(geometry, mixers(vision.model), mixers(built.model))
    return {
        "kept": [len(each) for each in kept],
        "fitted": 100 * before["accuracy"],
        "healed": 100 * after["accuracy"],
        "flops": cost["flops"]["after"] / cost["flops"]["before"],
        "parameters": cost["parameters"]["after"] / cost["parameters"]["before"],
    }


def on_surgery(run: Run, size: Size) -> None:
    seeds = range(size.seeds)
    folders = [run.work / f"vit {seed}" for seed in seeds]
    seen = [run.arm(f"vision transformer, {seed}", seeing, seed, size, folders[seed]) for seed in seeds]
    whole = statistics.fmean(each["accuracy"] for each in seen)
    falls(seen, run)
    rows: list[list[Any]] = [["all heads", "", "", whole, 1, 1]]
    done: dict[tuple[float, str], list[dict[str, Any]]] = {}
    flops = []
    for share in BUDGETS:
        for way in WAYS:
            name = f"{way}, {share:.0%}"
            found = [
                run.arm(f"{name}, {seed}", operated, way, share, seed, size, folders[seed], run.work / f"{name} {seed}")
                for seed in seeds
            ]
            done[share, way] = found
            flops += [each["flops"] for each in found]
            means = [
                statistics.fmean(each[key] for each in found) for key in ("fitted", "healed", "flops", "parameters")
            ]
            rows.append([name, " ".join(map(str, found[0]["kept"])), *means])
    run.table(f"Vision transformers with some heads removed, accuracy in percent, means over {size.seeds} seeds",
              ["removed heads", "remaining heads by layer, first seed", "before healing", "healed",
               "attention's multiply-adds", "attention's parameters"], rows)  # fmt: skip
    run.exact(
        "multiply-adds of attention with heads removed, relative to all heads", "below 1", max(flops), max(flops) < 1
    )
    for share in BUDGETS:
        for other, kind in (("cut", run.main), ("random", run.main), ("reversed", run.further)):
            ours, theirs = done[share, "ramp"], done[share, other]
            gain = over([each["healed"] for each in ours], [each["healed"] for each in theirs])
            same = other == "reversed" and any(a["kept"] == b["kept"] for a, b in zip(ours, theirs, strict=True))
            kind(f"ramp over {other}, {share:.0%} of the heads, healed", "above",
                 "a ramp that is flat, so reversed it is the same plan" if same else gain,
                 None if same else denied(gain.at_most(0.0)))  # fmt: skip


def falls(seen: Sequence[dict[str, Any]], run: Record) -> None:
    """Check whether attention passes fewer high frequencies in deeper layers."""
    layers = range(len(seen[0]["spectra"]))
    deltas = [[seed["spectra"][layer]["mixer"]["delta"][-1] for layer in layers] for seed in seen]
    rows = [[layer, *(each[layer] for each in deltas)] for layer in layers]
    run.table("Output of attention in a trained vision transformer: log amplitude at pi, by seed",
              ["layer", *(f"seed {seed}" for seed in range(len(seen)))], rows)  # fmt: skip
    fall = Measured.over_seeds([float(np.polyfit(list(layers), each, 1)[0]) for each in deltas])
    run.further("log amplitude at pi, by layer", "falls with depth", fall, denied(fall.at_least(0.0)))


def experiment(run: Run) -> None:
    size = QUICK if run.quick else FULL
    run.data = (
        "images of 32 x 32 pixels, five fine textures by four arrangements of two spots; faint textures for the "
        "branches"
    )
    exact(run)
    on_branches(run, size)
    on_surgery(run, size)


if __name__ == "__main__":
    raise SystemExit(main(experiment, quick="few steps, one seed"))
