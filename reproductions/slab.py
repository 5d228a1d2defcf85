"""SLAB at small scale: ViTs on digits, deep ones that collapse, a character-level Llama, and the norms of SmolLM2.

The premise comes first: batch norms that replace the norms of a trained Llama at once cost at least 0.10 nats after
healing. The main claims: a Llama that is healed with PRepBN ends within 0.10 nats of one that keeps its norms, and not
above one with batch norms at once; on digits PRepBN ends within a point of the best norm; and linear attention needs
its local term. Networks of 24 layers at ten times the usual rate test whether batch norms at once collapse, by 10
points against layer norms; only if they do, PRepBN has something to prevent, and that it does is a main claim, too.

Every arm has its own learning rate, chosen on held-out data, and keeps its state with the lowest held-out loss; the
schedule of PRepBN and the best of the other norms are chosen there, too. Arms of one seed share initial weights and
data order, and all share test items. Further checks: evaluation half-way through the transition, norms folded without
training, and the norms of SmolLM2 whose scale varies little over tokens, which is an extension of Lamella.

    python reproductions/slab.py            # about 85 minutes on one core; an interrupted run resumes
    python reproductions/slab.py --quick    # few steps, one seed, a nano model instead of SmolLM2
"""

from __future__ import annotations

import copy
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from harness import Run, main
from harness.design import Rate, tuned
from harness.measured import Measured
from harness.nano import LETTERS, TEXTS, nats_by_sample, prose, trained, whole
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import lamella
from lamella.data import InputContext, LabelledImages, load_text, windows
from lamella.errors import TrainingError
from lamella.methods.slab import (
    GammaSchedule,
    LinearAttention,
    VisionConfig,
    constancy,
    convert,
    free_sites,
    merge,
    prepbn_modules,
    refresh,
    sites_of,
)
from lamella.methods.slab.method import fold_norms, order_sites, rms_statistics
from lamella.methods.slab.recipe import split_samples, without_norms
from lamella.methods.slab.transition import BestCheckpoint, Transition, sizes
from lamella.methods.slab.vision import Splits, accuracy, logits, refresh_and_merge, rows, train_network
from lamella.report.figures import Bars
from lamella.stack import Stack, share
from lamella.train import Task, TrainConfig, blocks, class_cross_entropy, fit, mean_loss, own, supervised
from lamella.train.losses import response_loss
from lamella.zoo import nano, open_tokenizer

VIT = VisionConfig(size=8, patch=2, channels=1, width=48, depth=(6,), heads=4)
DEEP, FAST = replace(VIT, depth=(24,)), 1e-2  # the network and the rate of the collapse
LOCAL = replace(VIT, attention="linear", kernel=3)
SEE = TrainConfig(schedule="cosine", warmup=0.1, batch=64, weight_decay=0.05, clip=5.0)
SEEING = {  # network, kind of norm, and T as a fraction of the steps
    "layer norm": (VIT, "layer", 0.0),
    "batch norm at once": (VIT, "batch", 0.0),
    "RepBN at once": (VIT, "rep", 0.0),
    "PRepBN, half of the steps": (VIT, "progressive", 0.5),
    "PRepBN, four fifths": (VIT, "progressive", 0.8),
    "linear attention, no local term": (replace(LOCAL, kernel=0), "layer", 0.0),
    "linear attention with its local term": (LOCAL, "layer", 0.0),
}
OURS = ("PRepBN, half of the steps", "PRepBN, four fifths")
OTHERS = ("layer norm", "batch norm at once", "RepBN at once")
LAYER, ABRUPT, PREPBN, NO_LOCAL, WITH_LOCAL = (list(SEEING)[each] for each in (0, 1, 4, 5, 6))
RATES = (5e-4, 1e-3, 2e-3)
COLLAPSE, MATTERS = 10.0, 0.10  # points and nats that batch norms at once must cost, or there is nothing to prevent
CHOOSES = 100  # the seed by which rates and schedules are chosen


@dataclass(frozen=True)
class Size:
    """Scale of the experiment."""

    see: int = 360  # sixteen epochs
    deep: int = 100
    passes: int = 10  # over which statistics are refreshed
    speak: int = 500
    heal: int = 200
    rows: int = 3000
    tests: int = 256
    seeds: int = 8
    windows: int = 16
    folds: tuple[int, ...] = (1, 2, 4, 8, 16, 32)


FULL = Size()
QUICK = Size(see=10, deep=2, passes=1, speak=20, heal=5, rows=64, tests=16, seeds=1, windows=2, folds=(1, 3))


# Digits


def digits() -> Splits:
    """Return the digits, prepared in advance, since all networks take images of one size."""
    found = Splits.of(LabelledImages.open("digits", InputContext(), count=10_000), VIT)
    return Splits(*((torch.stack(list(x)), y) for x, y in vars(found).values()))


def seen(
    network: VisionConfig, kind: Any, share: float, steps: int, passes: int, seed: int, rate: float
) -> dict[str, Any]:
    """Train and fold a network; return its held-out loss, its accuracies, and which test images are named correctly.

    A training that does not stay finite counts as guessing.
    """
    images, schedule = digits(), GammaSchedule(share=share, init="vision", passes=passes)
    config = replace(SEE, steps=steps, lr=rate, seed=seed, save_every=steps)
    (chosen_on, labels), (x, y) = images.held_out, images.test
    try:
        with tempfile.TemporaryDirectory() as work:
            model, _, _ = train_network(network, 10, images, schedule, kind, config, Path(work))
    except TrainingError:
        return {"nats": math.log(10), "right": [0.1] * len(y), "trained": 0.1}
    found = refresh_and_merge(model, images, schedule, kind, config)
    nats = float(cross_entropy(logits(model, chosen_on), labels))
    return found | {"nats": nats, "right": (logits(model, x).argmax(1) == y).double().tolist()}


def held_out_nats(name: str, size: Size, rate: float) -> float:
    return float(seen(*SEEING[name], size.see, size.passes, CHOOSES, rate)["nats"])


def halfway(name: str, steps: int, seed: int, rate: float) -> dict[str, float]:
    """Return the accuracies of RepBN alone and of the mixture half-way through the transition, and gamma."""
    network, _, fraction = SEEING[name]
    images, (x, y) = digits(), digits().test
    torch.manual_seed(seed)
    model = network.build(10)
    convert(model, sites_of(model), steps=round(fraction * steps), init="vision")
    middle = max(1, round(fraction * steps / 2))
    config = replace(SEE, steps=middle, lr=rate, schedule="constant", seed=seed, save_every=steps)
    with tempfile.TemporaryDirectory() as work:
        fit(model, rows(*images.train), supervised(class_cross_entropy), config, out=work, hooks=[Transition()])
    model.eval()
    alone, gamma = accuracy(model, x, y), prepbn_modules(model)[0].gamma
    for each in prepbn_modules(model):
        each.mixed = True
    return {"alone": alone, "mixed": accuracy(model, x, y), "gamma": gamma}


def points(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> Measured:
    """Return the difference of two arms' accuracies in points, paired over seeds and test images."""
    return Measured.over_seeds_and_items(
        100 * (np.array([each["right"] for each in ours]) - np.array([each["right"] for each in theirs]))
    )


def accuracies(run: Run, title: str, found: dict[str, list[dict[str, Any]]]) -> None:
    stages = ("trained", "refreshed", "merged")
    table = [[name, len(each), *(_mean(each, stage) for stage in stages)] for name, each in found.items()]
    run.table(f"Digits, {title}: accuracy on test images, percent", ["network", "seeds", *stages], table)


def collapse(run: Run, size: Size, seeds: Sequence[int]) -> None:
    """Test in deep networks at a high rate whether batch norms at once collapse and, if so, whether PRepBN does."""

    def trained_deep(name: str, seed: int) -> dict[str, Any]:
        _, kind, fraction = SEEING[name]
        made: dict[str, Any] = run.arm(
            f"deep, {name}, {seed}", seen, DEEP, kind, fraction, size.deep, size.passes, seed, FAST
        )
        return made

    title = f"{DEEP.depth[0]} layers at {FAST:g}"
    first = {
        name: [trained_deep(name, CHOOSES + each) for each in range(min(2, size.seeds))] for name in (LAYER, ABRUPT)
    }
    lost = points(first[LAYER], first[ABRUPT])
    run.further(f"{title}: layer norms over batch norms at once, points", f"at least {COLLAPSE:g}: they collapse", lost,
                lost.at_least(COLLAPSE))  # fmt: skip
    if not lost.at_least(COLLAPSE):  # nothing is to be prevented
        accuracies(run, title, first)
        return
    found = {name: [trained_deep(name, seed) for seed in seeds] for name in (LAYER, ABRUPT, PREPBN)}
    accuracies(run, title, found)
    gain = points(found[PREPBN], found[ABRUPT])
    run.main(f"{title}: PRepBN over batch norms at once, points", f"at least {COLLAPSE:g}", gain,
             gain.at_least(COLLAPSE))  # fmt: skip
    gap = points(found[PREPBN], found[LAYER])
    run.further(f"{title}: PRepBN over layer norms, points", "at least -1", gap, gap.at_least(-1.0))


def on_digits(run: Run, size: Size, rates: dict[str, Rate], seeds: Sequence[int]) -> None:
    found = {
        name: [run.arm(f"{name}, {s}", seen, *SEEING[name], size.see, size.passes, s, rate.value) for s in seeds]
        for name, rate in rates.items()
    }
    accuracies(run, f"{VIT.depth[0]} layers", found)
    means = {"accuracy": [_mean(each, "trained") for each in found.values()]}
    run.figure("slab-digits", Bars("network", "test images correct, %", means, tuple(found), horizontal=True))

    def best(names: Sequence[str]) -> str:
        return min(names, key=lambda name: min(rates[name].scores.values()))

    ours, others = best(OURS), best(OTHERS)
    gap = points(found[ours], found[others])
    run.main(f"{ours} over {others}, points", "at least -1", gap, gap.at_least(-1.0))
    gain = points(found[WITH_LOCAL], found[NO_LOCAL])
    run.main("linear attention with its local term over none, points", "at least 3", gain, gain.at_least(3.0))
    early = [run.arm(f"half-way, {s}", halfway, ours, size.see, s, rates[ours].value) for s in seeds[:3]]
    run.table(
        f"In the middle of a transition (gamma {early[0]['gamma']:.2f}), means over {len(early)} seeds",
        ["evaluated", "accuracy on test images, percent"],
        [["RepBN only, as in evaluation", _mean(early, "alone")], ["the mixture that trains", _mean(early, "mixed")]],
    )
    fall = Measured.over_seeds(
        [100 * (end["merged"] - middle["alone"]) for end, middle in zip(found[ours], early, strict=False)]
    )
    run.further("the end over evaluation half-way, points", "at least 20", fall, fall.at_least(20.0))


def _mean(found: Sequence[dict[str, Any]], stage: str) -> Any:
    values = [100 * one[stage] for one in found if stage in one]
    return fmean(values) if values else ""


# A small decoder

CONTROL, AT_ONCE = "trained on with its norms", "batch norms at once, gain 1"
HEALED = {  # T as a fraction of the healing, initialisation of batch norms
    AT_ONCE: (0.0, "norm"),  # of a model whose norms have gains of 1
    "PRepBN from the norm, T = 30 %": (0.3, "norm"),
    "PRepBN from the norm, T = 80 %": (0.8, "norm"),
    "PRepBN, eta 1, T = 30 %": (0.3, "vision"),
}


def passages(split: str, count: int, part: tuple[float, float] = (0.0, 1.0)) -> Any:
    return whole(prose(split, count, 128, 0, TEXTS, part))


def speaker(size: Size, seed: int) -> Stack:
    """Return a Llama of four layers trained on documentation, from the cache if there is one."""
    return trained(passages("calibration", size.rows), layers=4, hidden=64, steps=size.speak, seed=seed, name="slab",
                   lr=2e-3, channels=176, tied=False)  # fmt: skip


def healed(way: str, size: Size, seed: int, rate: float) -> Any:
    """Return a decoder healed in one way; None if its training does not stay finite."""
    stack, samples = speaker(size, seed), passages("calibration", size.rows)
    config = TrainConfig(steps=size.heal, lr=rate, batch=16, seed=seed, save_every=max(1, size.heal // 8))
    with tempfile.TemporaryDirectory() as work:
        if way == CONTROL:
            view, (training, held_out) = share(stack.model), split_samples(samples)
            own(view, lambda name: True)
            fit(view, training, Task(response_loss), config, out=work, trainable=lambda name: True, held_out=held_out,
                hooks=[BestCheckpoint()])  # fmt: skip
            return view.eval()
        sites, _ = free_sites(stack)
        if way == AT_ONCE:
            for site in sites:
                nn.init.ones_(stack.model.get_submodule(site.path).weight)
        share_of, init = HEALED[way]
        schedule = GammaSchedule(share=share_of, init=init, passes=size.passes)  # type: ignore[arg-type]
        try:
            return without_norms(stack, samples, sites, schedule, config, Path(work))[0]
        except TrainingError:
            return None


def spoken(way: str, size: Size, seed: int, rate: float, choose: bool = False) -> list[float]:
    """Return the loss of each validation or test passage in nats per character; that of guessing if not finite."""
    test = passages("test", size.tests, (0.0, 0.5) if choose else (0.5, 1.0))
    model = healed(way, size, seed, rate)
    return [math.log(len(LETTERS))] * len(test) if model is None else nats_by_sample(model, test)


def chosen_nats(way: str, size: Size, rate: float) -> float:
    return fmean(spoken(way, size, CHOOSES, rate, choose=True))


def unhealed(size: Size, seed: int) -> dict[str, list[float]]:
    """Return the loss of each test passage, of the decoder and with all norms folded without training."""
    stack, test = speaker(size, seed), passages("test", size.tests, (0.5, 1.0))
    sites, _ = free_sites(stack)
    ids = torch.stack([each["input_ids"] for each in passages("calibration", 16)])
    folded = fold_norms(stack.model, sites, rms_statistics(stack, sites, ids)[1])
    return {"as it is": nats_by_sample(stack.model, test), "folded": nats_by_sample(folded, test)}


def on_characters(run: Run, size: Size, rates: dict[str, Rate], seeds: Sequence[int]) -> None:
    losses = {
        way: np.array([run.arm(f"{way}, {seed}", spoken, way, size, seed, rate.value) for seed in seeds])
        for way, rate in rates.items()
    }
    before = [run.arm(f"not healed, {seed}", unhealed, size, seed) for seed in seeds]
    original, folded = (np.array([each[name] for each in before]) for name in ("as it is", "folded"))
    table = [["as it is", "", original.mean()], ["all norms folded, no training", "", folded.mean()]]
    table += [[way, rates[way].value, each.mean()] for way, each in losses.items()]
    run.table(f"Test loss of a small Llama in nats per character, means over {len(seeds)} seeds",
              ["", "rate", "nats"], table)  # fmt: skip
    ours = min((way for way in rates if way.startswith("PRepBN")), key=lambda way: min(rates[way].scores.values()))
    gap = Measured.over_seeds_and_items(losses[ours] - losses[CONTROL])
    run.main(f"{ours}, over the same training with norms", f"at most {MATTERS} nats", gap, gap.at_most(MATTERS))
    rival = Measured.over_seeds_and_items(losses[ours] - losses[AT_ONCE])
    run.main(f"{ours}, over batch norms at once", "at most 0.02 nats", rival, rival.at_most(0.02))
    fall = Measured.over_seeds_and_items(folded - original)
    run.further("all norms folded without training, over as it is", "at least 1 nat", fall, fall.at_least(1.0))


def premise(run: Run, size: Size) -> None:
    """Check that batch norms at once do harm to a trained decoder."""
    apart = [run.arm(f"premise, {way}", spoken, way, size, CHOOSES, RATES[1], True) for way in (AT_ONCE, CONTROL)]
    more = Measured.over_seeds_and_items([np.subtract(*apart)])
    if not run.quick:  # too short a healing to show it
        run.premise("a trained Llama: nats that batch norms at once cost, after healing", f"at least {MATTERS}", more,
                    more.figure >= MATTERS)  # fmt: skip


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
    for column in (1, 0):
        better = all(row[column] <= min(row[2], fmean(row[3:])) for row in rows)
        run.further(f"{names[column]}: over random order and depth", "never a higher loss", better, better)


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
    deit = VisionConfig(size=32, patch=2, channels=3, width=192, depth=(4 if run.quick else 12,), heads=3)
    model = deit.build(10).eval()
    plain = copy.deepcopy(model)
    sites = sites_of(model)
    convert(model, sites, steps=0)
    refresh(model, [[torch.randn(4, 3, 32, 32)]], model, iter([1.0, 0.0]).__next__)
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
    run.data = "scikit-learn's digits; characters of pydoc and stdlib; SmolLM2 tokens of pydoc"
    premise(run, size)
    ways = (CONTROL, *HEALED)
    if run.quick:
        seeing, healing = ({name: Rate(RATES[1], {RATES[1]: 0.0}) for name in names} for names in (SEEING, ways))
    else:
        seeing = tuned(run, {name: partial(held_out_nats, name, size) for name in SEEING}, RATES)
        healing = tuned(run, {way: partial(chosen_nats, way, size) for way in ways}, RATES)
    seeds = range(run.seed, run.seed + size.seeds)
    rates = {name: rate.value for name, rate in (seeing | healing).items()}
    run.freeze("mean over seeds and test items of paired differences", seeds, steps=vars(size), rates=rates, deep=FAST)
    collapse(run, size, seeds)
    on_digits(run, size, seeing, seeds)
    on_characters(run, size, healing, seeds)
    on_smollm2(run, size)
    speeds(run)


if __name__ == "__main__":
    raise SystemExit(main(experiment, quick="few steps, one seed, a nano model in SmolLM2's place"))
