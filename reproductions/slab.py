"""SLAB at small scale: ViTs on digits, a small character-level Llama, and the norms of SmolLM2.

Checks that folding changes nothing, that a progressively replaced norm ends near the best alternative, that evaluation
before the end of the transition shows a broken model, that linear attention needs its local term, that a trained
decoder loses its norms by healing but not at once, and that norms whose scale varies little over tokens fold cheaply.

    python reproductions/slab.py            # about an hour on one core; an interrupted run resumes
    python reproductions/slab.py --quick    # few steps, one seed, a nano model instead of SmolLM2
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from harness import Run, main
from harness.measured import Measured
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import lamella
import lamella.errors
from lamella.data import CaptionedImages, InputContext, load_text, windows
from lamella.methods.slab import (
    GammaSchedule,
    LinearAttention,
    constancy,
    convert,
    free_sites,
    linear_attention,
    merge,
    prepbn_modules,
    refresh,
)
from lamella.methods.slab.method import fold_norms, order_sites, rms_statistics
from lamella.methods.slab.modules import PRepBN, initial_repbn
from lamella.methods.slab.recipe import without_norms
from lamella.methods.slab.sites import sites_of
from lamella.methods.slab.transition import Transition, sizes
from lamella.methods.slab.vision import VitConfig, accuracy, prepare_images, refresh_and_merge, train_network
from lamella.results import Record
from lamella.stack import Stack, share
from lamella.train import Task, TrainConfig, blocks, class_cross_entropy, fit, mean_loss, own, supervised
from lamella.train.losses import response_loss
from lamella.zoo import nano, open_tokenizer

VIT = VitConfig(size=8, patch=2, channels=1, width=48, depth=6, heads=4)
SEE = TrainConfig(lr=1e-3, schedule="constant", warmup=0.0, batch=64, weight_decay=0.05, clip=5.0)
NORMS = {  # kind of norm, and T as a fraction of the steps
    "layer norm": ("layer", 0.0),
    "batch norm at once": ("batch", 0.0),
    "RepBN at once": ("rep", 0.0),
    "progressive batch norm": ("progressive batch", 0.8),
    "PRepBN, half of the steps": ("progressive", 0.5),
    "PRepBN, four fifths": ("progressive", 0.8),
}
ATTENTION = {  # with layer norms: kind, and side of the local term
    "softmax": ("softmax", 0),
    "linear, no local term": ("linear", 0),
    "linear with its local term": ("linear", 3),
}


@dataclass(frozen=True)
class Size:
    """Scale of the experiment."""

    see: int = 900  # forty epochs
    speak: int = 500
    heal: int = 200
    rows: int = 3000
    seeds: int = 3
    windows: int = 16
    folds: tuple[int, ...] = (1, 2, 4, 8, 16, 32)


FULL, QUICK = Size(), Size(see=20, speak=10, heal=5, rows=64, seeds=1, windows=2, folds=(1, 3))


# Exactness


def exact(run: Record) -> None:
    drawn = torch.Generator().manual_seed(0)
    worst: dict[str, float] = {}
    for kind, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-11)):
        for name in ("ViT", "llama", "gpt2"):
            torch.manual_seed(0)
            model = VIT.build(10) if name == "ViT" else copy.deepcopy(nano(name))
            if name != "ViT" and model.lm_head.weight is model.get_input_embeddings().weight:
                model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
            sites = sites_of(model if name == "ViT" else Stack(model))
            convert(model, sites, steps=0)
            model = model.to(kind).eval()
            for each in prepbn_modules(model):
                each.rep.bn.running_mean.normal_(generator=drawn)
                each.rep.bn.running_var.uniform_(0.5, 2, generator=drawn)
                each.rep.bn.num_batches_tracked.fill_(1)
                each.rep.eta.data.fill_(0.3)
            x = torch.randn(2, 1, 8, 8).to(kind) if name == "ViT" else torch.randint(3, 100, (2, 9))
            with torch.no_grad():
                before = _told(model(x))
                merge(model, sites)
                after = _told(model(x))
            moved = float((after - before).abs().max() / before.abs().max())
            worst[f"{name} in {kind}".replace("torch.", "")] = moved / tolerance
    rows = [[name, each] for name, each in worst.items()]
    run.table("Folding error relative to the tolerance (1e-5 in float32, 1e-11 in float64)", ["model", "ratio"], rows)
    run.exact("folded and not", "within 1e-5 and 1e-11", max(worst.values()), max(worst.values()) <= 1)
    norm = nn.LayerNorm(8)
    place, x = PRepBN(norm, initial_repbn(norm, "zero"), steps=10).train(), torch.randn(3, 4, 8)
    same = torch.equal(place(x), norm(x) + 0 * x)
    run.exact("at gamma 1", "the original norm", same, same)
    place.step.fill_(4)
    part = float((place(x) - 0.6 * norm(x)).abs().max())
    run.exact("with all zeros at first", "gamma times the norm", part, part < 1e-6)
    q, k, v = (torch.rand(1, 2, 64, 8, generator=drawn) for _ in range(3))
    slow = (q @ k.transpose(-2, -1)) @ v / ((q @ k.transpose(-2, -1)).sum(-1, keepdim=True) + 1e-6)
    apart = float((linear_attention(q, k, v) - slow).abs().max())
    run.exact("both orders of linear attention's products", "within 1e-4", apart, apart <= 1e-4)


def _told(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out.logits


# Digits


def digits(size: Size) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    every = CaptionedImages.open("digits", InputContext(), count=10_000)
    parts = [every.items, every.part("test").items]
    return tuple(  # type: ignore[return-value]
        each for part in parts for each in (prepare_images(part, VIT), torch.tensor([one.label for one in part]))
    )


def seen(name: str, network: VitConfig, kind: str, share: float, seed: int, size: Size, out: Path) -> dict[str, float]:
    """Train and fold; return the accuracies, and the accuracy of evaluation half-way."""
    x, y, test_x, test_y = digits(size)
    schedule = GammaSchedule(share=share, init="vision")
    config = replace(SEE, steps=size.see, seed=seed, save_every=size.see)
    model, _, _ = train_network(network, 10, x, y, schedule, kind, config, out)  # type: ignore[arg-type]
    return refresh_and_merge(model, x, test_x, test_y, schedule, kind, config.batch)  # type: ignore[arg-type]


def halfway(size: Size, seed: int, out: Path) -> dict[str, float]:
    """Return the accuracies of evaluation and of mixed norms half-way through training, and the mixing coefficient.

    The transition takes four fifths of the steps.
    """
    x, y, test_x, test_y = digits(size)
    torch.manual_seed(seed)
    model = VIT.build(10)
    steps = round(0.8 * size.see)
    convert(model, sites_of(model), steps=steps, init="vision")
    rows = [{"x": a, "y": b} for a, b in zip(x, y, strict=True)]
    config = replace(SEE, steps=size.see // 2, seed=seed, save_every=size.see)
    fit(
        model, rows, supervised(class_cross_entropy), config, out=out, trainable=lambda name: True, hooks=[Transition()]
    )
    model.eval()
    alone = accuracy(model, test_x, test_y)
    for each in prepbn_modules(model):
        each.mixed = True
    return {"alone": alone, "mixed": accuracy(model, test_x, test_y), "gamma": prepbn_modules(model)[0].gamma}


def on_digits(run: Run, size: Size) -> None:
    seeds = range(size.seeds)
    found = {
        name: [run.arm(f"{name} {s}", seen, name, VIT, kind, share, s, size, run.work / f"{name} {s}") for s in seeds]
        for name, (kind, share) in NORMS.items()
    }
    attention = {
        name: [
            run.arm(
                f"attention {name} {s}", seen, name, replace(VIT, attention=kind, kernel=side), "layer", 0.0, s,
                size, run.work / f"attention {name} {s}",
            )
            for s in seeds
        ]
        for name, (kind, side) in ATTENTION.items()
    }  # fmt: skip
    both = [
        run.arm(f"both {s}", seen, "both", replace(VIT, attention="linear", kernel=3), "progressive", 0.8, s, size,
                run.work / f"both {s}")
        for s in seeds
    ]  # fmt: skip

    def mean(each: Sequence[dict[str, float]], point: str) -> Any:
        values = [one[point] for one in each if point in one]
        return 100 * fmean(values) if values else ""

    points = ("trained", "refreshed", "merged")
    rows = [[name, *(mean(each, point) for point in points)] for name, each in found.items()]
    rows += [[f"{name}, layer norm", *(mean(each, point) for point in points)] for name, each in attention.items()]
    rows.append(["linear with its local term, PRepBN", *(mean(both, point) for point in points)])
    run.table(f"Test digits that are named, percent, means over {len(seeds)} seeds", ["network", *points], rows)
    moved = max(one["moved"] for each in [*found.values(), both] for one in each if "moved" in one)
    run.exact("logits before and after folding", "within 1e-4", moved, moved <= 1e-4)

    def last(each: Sequence[dict[str, float]]) -> list[float]:
        return [one.get("merged", one["trained"]) for one in each]

    best = max((last(each) for each in found.values()), key=fmean)
    ours = max((last(found[name]) for name in NORMS if name.startswith("PRepBN")), key=fmean)
    gap = Measured.over_seeds([100 * (a - b) for a, b in zip(ours, best, strict=True)])
    run.main("PRepBN, beside the best of all norms", "at most 1 point below", gap, gap.at_least(-1.0))
    local = [
        100 * (a - b)
        for a, b in zip(
            last(attention["linear with its local term"]), last(attention["linear, no local term"]), strict=True
        )
    ]
    gain = Measured.over_seeds(local)
    run.main("linear attention with its local term, over none", "at least 3 points more", gain, gain.at_least(3.0))
    middle = run.arm("half-way", halfway, size, 0, run.work / "half-way")
    run.table(
        f"In the middle of a transition (gamma {middle['gamma']:.2f})",
        ["evaluated", "digits named, percent"],
        [["RepBN only, as in evaluation", 100 * middle["alone"]], ["the mix that trains", 100 * middle["mixed"]]],
    )
    end = fmean(last(found["PRepBN, four fifths"]))
    worse = middle["alone"] <= end - 0.2
    run.further("evaluation before the end", "at least 20 points below the end", 100 * (end - middle["alone"]), worse)


# A small decoder


def characters(size: Size) -> tuple[Any, Any, int]:
    text = load_text("pydoc", "calibration")[:400_000]
    test = load_text("pydoc", "test")[:40_000]
    known = {each: number for number, each in enumerate(sorted(set(text)))}

    def rows(part: str, count: int) -> Any:
        ids = torch.tensor([known[each] for each in part if each in known])
        return blocks(ids[: len(ids) // 128 * 128].view(-1, 128)[:count], loss_on="all")

    return rows(text, size.rows), rows(test, 60), len(known)


def spoken(size: Size, seed: int, out: Path) -> tuple[Stack, Any, Any]:
    """Return a Llama of four layers trained on documentation, with its training and test samples."""
    torch.manual_seed(seed)
    samples, test, count = characters(size)
    config = LlamaConfig(
        vocab_size=count, hidden_size=64, intermediate_size=176, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=256, tie_word_embeddings=False, pad_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    train = TrainConfig(steps=size.speak, lr=2e-3, schedule="cosine", batch=16, seed=seed, save_every=size.speak)
    fit(model, samples, Task(response_loss), train, out=out, trainable=lambda name: True)
    return Stack(model.eval(), name="a small Llama"), samples, test


HEALED = {  # replacement of norms, T as a fraction of the healing, initialisation of batch norms
    "batch norm, gain 1, at once": (0.0, "one"),
    "RepBN, eta 1, at once": (0.0, "vision"),
    "PRepBN from the norm, at once": (0.0, "norm"),
    "PRepBN from the norm, T = 30 %": (0.3, "norm"),
    "PRepBN from the norm, T = 50 %": (0.5, "norm"),
    "PRepBN from the norm, T = 80 %": (0.8, "norm"),
    "PRepBN from zero, T = 80 %": (0.8, "zero"),
    "PRepBN, eta 1, T = 30 %": (0.3, "vision"),
}


def healing(size: Size, seed: int, out: Path) -> dict[str, float]:
    """Return the test loss of a small decoder in nats: original, trained further, folded at once, by each schedule."""
    stack, samples, test = spoken(size, seed, out / "model")
    found = {"as it is": mean_loss(stack.model, test)}
    config = TrainConfig(steps=size.heal, lr=1e-3, schedule="constant", batch=16, seed=seed, save_every=size.heal)
    view = share(stack.model)
    own(view, lambda name: True)
    fit(view, samples, Task(response_loss), config, out=out / "control", trainable=lambda name: True)
    found["trained on with its norms"] = mean_loss(view.eval(), test)
    sites, _ = free_sites(stack)
    ids = torch.stack([each["input_ids"] for each in samples[:16]])
    _, divides = rms_statistics(stack, sites, ids)
    found["folded at once, no training"] = mean_loss(fold_norms(stack.model, sites, divides), test)
    moved = []
    for name, (share_of, init) in HEALED.items():
        schedule = GammaSchedule(share=share_of, init="norm" if init == "one" else init)  # type: ignore[arg-type]
        start = stack
        if init == "one":  # gains initialised independently of the norm
            plain = share(stack.model)
            for site in sites:
                norm = copy.deepcopy(plain.get_submodule(site.path))
                norm.weight.data.fill_(1.0)
                plain.set_submodule(site.path, norm)
            start = Stack(plain, name="gain 1")
        try:
            built, _, kept = without_norms(start, samples, sites, schedule, config, out / name)
            found[name] = mean_loss(built, test)
            moved.append(kept["moved"] / kept["scale"])
        except lamella.errors.TrainingError:
            found[name] = float("inf")
    return found | {"moved": max(moved)}


def on_characters(run: Run, size: Size) -> None:
    runs = [run.arm(f"decoder {seed}", healing, size, seed, run.work / f"decoder {seed}") for seed in range(size.seeds)]
    names = [name for name in runs[0] if name != "moved"]
    rows = [[name, fmean(each[name] for each in runs)] for name in names]
    run.table(f"Test loss of a small Llama in nats, means over {len(runs)} seeds", ["", "nats"], rows)
    moved = max(each["moved"] for each in runs)
    run.exact("loss folded and not", "logits equal to 1e-4 of the largest", moved, moved <= 1e-4)
    best = min(
        (name for name in names if name.startswith("PRepBN")), key=lambda name: fmean(each[name] for each in runs)
    )
    ours = [each[best] for each in runs]
    gap = Measured.over_seeds([a - each["trained on with its norms"] for a, each in zip(ours, runs, strict=True)])
    run.main("the best PRepBN, over the same training with norms", "at most 0.10 nats more", gap, gap.at_most(0.10))
    rival = Measured.over_seeds([a - each["batch norm, gain 1, at once"] for a, each in zip(ours, runs, strict=True)])
    run.main("the best PRepBN, over batch norms at once", "not worse by more than 0.02", rival, rival.at_most(0.02))
    fall = min(each["folded at once, no training"] - each["as it is"] for each in runs)
    run.further("all norms folded without training, on the seed where it costs least", "at least 1 nat more", fall,
                fall >= 1)  # fmt: skip


# SmolLM2


def choosing(run: Run, size: Size) -> dict[str, Any]:
    """Return the test loss with k norms folded: least varying over all or later tokens, the first, or random ones."""
    if run.quick:
        stack = Stack(nano("llama"))
        ids, test = (torch.randint(3, 100, (4, 32), generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    else:
        stack = lamella.open("smollm2")
        tokenizer = open_tokenizer("smollm2")
        ids, test = (
            windows(tokenizer, load_text("pydoc", part), size.windows, 256, 0) for part in ("calibration", "test")
        )
    held = blocks(test, loss_on="all")
    sites, _ = free_sites(stack)
    varies, divides = rms_statistics(stack, sites, ids)
    with torch.no_grad():
        rms = sizes(stack.model, sites, lambda: stack.model(input_ids=ids, use_cache=False))
    later = constancy({path: each.view(ids.shape)[:, 1:].flatten() for path, each in rms.items()})

    def loss(chosen: Sequence[Any]) -> float | str:
        found = mean_loss(fold_norms(stack.model, chosen, divides), held, batch=4)
        return found if math.isfinite(found) else "overflows"

    orders = [order_sites(sites, each, "constancy", 0) for each in (varies, later)] + [sites]
    chance = [order_sites(sites, varies, "random", seed) for seed in range(3)]
    return {
        "folded": [[count, *(loss(each[:count]) for each in (*orders, *chance))] for count in (0, *size.folds)],
        "varies": [[name, min(each.values()), median(each.values()), max(each.values())]
                   for name, each in (("of all tokens", varies), ("without first tokens", later))],
    }  # fmt: skip


def on_smollm2(run: Run, size: Size) -> None:
    found = run.arm("folding", choosing, run, size)
    names = ["most constant", "most constant, without first tokens", "first by depth"]
    run.table("Test loss in nats with some norms folded, without training",
              ["norms", *names, *(f"random, {seed}" for seed in range(3))], found["folded"])  # fmt: skip
    run.table("How much the RMS of tokens varies over its norms", ["RMS", "least", "median", "most"], found["varies"])
    rows = [[math.inf if each == "overflows" else each for each in row[1:]] for row in found["folded"]]
    for column, kind in ((1, run.main), (0, run.further)):
        better = all(row[column] <= min(row[2], fmean(row[3:])) for row in rows)
        kind(f"{names[column]}: beside chance and depth", "never dearer", better, better)


# Speed


def timed(work: Callable[[], Any], rounds: int) -> list[float]:
    found = []
    for _ in range(rounds):
        begin = time.perf_counter()
        work()
        found.append(time.perf_counter() - begin)
    return found


@torch.no_grad()
def speeds(run: Run) -> None:
    """Time merged against unmerged models, and linear attention against softmax over token counts, without claims."""
    torch.manual_seed(0)
    deit = VitConfig(size=32, patch=2, channels=3, width=192, depth=4 if run.quick else 12, heads=3)
    model = deit.build(10).eval()
    plain = copy.deepcopy(model)
    sites = sites_of(model)
    convert(model, sites, steps=0)
    refresh(model, [torch.randn(4, 3, 32, 32)], model)
    unmerged = copy.deepcopy(model)
    merge(model, sites)
    x = torch.randn(4, 3, 32, 32)
    ways = {"layer norm": plain, "RepBN, not merged": unmerged, "merged": model}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(3 if run.quick else 15):
        for name, each in ways.items():
            times[name] += timed(lambda each=each: each(x), 1)
    base = median(times["layer norm"])
    run.table(
        "A ViT of DeiT-T's width, 256 tokens, batch 4, interleaved rounds",
        ["norms", "milliseconds, median", "over layer norm"],
        [[name, 1e3 * median(each), median(each) / base] for name, each in times.items()],
    )
    rows = []
    for tokens in (64, 256) if run.quick else (64, 256, 1024, 4096):
        linear = LinearAttention(192, 3, tokens).eval()
        q, k, v = (torch.randn(1, 3, tokens, 64) for _ in range(3))
        h = torch.randn(1, tokens, 192)

        def softmax(q: Tensor = q, k: Tensor = k, v: Tensor = v, linear: Any = linear, h: Tensor = h) -> Any:
            linear.qkv(h)
            return linear.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

        pairs = [(timed(softmax, 1)[0], timed(lambda linear=linear, h=h: linear(h), 1)[0]) for _ in range(9)]
        soft, lin = (median(each) for each in zip(*pairs, strict=True))
        rows.append([tokens, 1e3 * soft, 1e3 * lin, soft / lin])
    run.table(
        "One attention of 3 heads of 64, as tokens grow",
        ["tokens", "softmax, ms", "linear, ms", "softmax over linear"],
        rows,
    )


def experiment(run: Run) -> None:
    size = QUICK if run.quick else FULL
    run.data = "scikit-learn's digits; characters of Python's documentation; SmolLM2 tokens of the same"
    exact(run)
    on_digits(run, size)
    on_characters(run, size)
    on_smollm2(run, size)
    speeds(run)


if __name__ == "__main__":
    raise SystemExit(main(experiment, quick="few steps, one seed, a nano model in SmolLM2's place"))
