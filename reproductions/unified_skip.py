"""Unified layer skipping at small scale: SmolLM2-135M-Instruct training-free, a character-level Llama for its tuning.

The main claim: after fine-tuning, evenly spaced layers, by our rule and by that of the authors' code, lose no more than
contiguous ones at a layer ratio of 2, and at least 0.03 nats less at 4 and 6, over five models with rates tuned for
each way. Further checks are that evenly spaced layers beat the two ends when few layers are skipped without training,
that a full-depth prompt matters, and that the speed agrees with the cost model, with little variation.

    python reproductions/unified_skip.py            # about two hours on one core; an interrupted run resumes
    python reproductions/unified_skip.py --quick    # less of all; its model does not meet the premise
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product
from statistics import fmean, pstdev

import torch
from harness import Run, main
from harness.design import tuned
from harness.measured import Measured
from harness.nano import nats, prose, scratch, trained

import lamella
from lamella.evaluate import Fidelity, FidelityTest, Ratio, Timing, bench, measure_step
from lamella.files import Work
from lamella.methods.unified_skip import RULES, tune
from lamella.plan import ModelReference, PhasedPath, Plan
from lamella.report.figures import Bars
from lamella.results import Record
from lamella.results.record import together
from lamella.stack import Stack
from lamella.train import Sample, TrainConfig
from lamella.zoo import open_tokenizer

GENERAL = ("general",)
RATE = 1e-3  # of a quick run, which tunes none
PILOT = 100  # seed of the model by which rates are chosen
WAYS = ("even", "release", "first n", "first, and last n - 1")


def phased(stack: Stack, kept: list[int]) -> Plan:
    """Return a plan that runs prompts at full depth and generated tokens through the kept layers."""
    path = PhasedPath(prefill=list(range(len(stack))), decode=kept)
    return Plan(model=ModelReference.of(stack), path={"text": path})


def curve(record: Record, stack: Stack, test: FidelityTest, counts: list[int]) -> None:
    """Check point 2: the loss on the continuation, by the choice of n layers."""
    layers = len(stack)

    def middle(n: int) -> list[int]:
        begin = (layers - (layers - n)) // 2
        return [layer for layer in range(layers) if not begin <= layer < begin + layers - n]

    ways = {
        "even": lambda n: RULES["even"](layers, n),
        "release": lambda n: RULES["release"](layers, n),
        "first n": lambda n: list(range(n)),
        "first, and last n - 1": lambda n: [0, *range(layers - n + 1, layers)],
        "middle run removed": middle,
    }
    results: dict[tuple[str, int], Fidelity] = {}
    for n in counts:
        for name, way in ways.items():
            results[name, n] = test.of(lamella.apply(stack, phased(stack, way(n))))

    def loss(name: str, n: int) -> float:
        return float(torch.tensor(results[name, n].perplexity.mean).log())

    base = float(torch.tensor(next(iter(results.values())).base_perplexity.mean).log())
    rows = [[n, *(loss(name, n) for name in ways)] for n in counts]
    record.table(
        f"Nats per continuation token, decoding n of {layers} layers (full depth {base:.3f})", ["n", *ways], rows
    )
    for n in (n for n in counts if n in (27, 24)):
        for other in ("first n", "first, and last n - 1", "release"):
            name = f"even against '{other}' at n = {n}"
            record.further(
                name, "lower loss", f"{loss('even', n):.3f} / {loss(other, n):.3f}", loss("even", n) < loss(other, n)
            )
    print("No claim: training-free, leaving out a run in the middle can do better, and nothing is usable at n = 15.")

    for n in (n for n in counts if n in (27, 24)):
        kept = RULES["even"](layers, n)
        path = PhasedPath(prefill=kept, decode=kept)
        pruned = test.of(lamella.apply(stack, Plan(model=ModelReference.of(stack), path={"text": path})))
        lower = float(torch.tensor(pruned.perplexity.mean).log())
        name = f"full-depth prompt against pruning it too, n = {n}"
        record.further(name, "lower loss", f"{loss('even', n):.3f} / {lower:.3f}", loss("even", n) < lower)


@dataclass(frozen=True)
class Size:
    """The scale of the fine-tuning: the model, and the length of its samples."""

    layers: int
    hidden: int
    steps: int
    length: int
    tuning: int

    def samples(self, use: str) -> list[Sample]:
        """Return samples to train on, to choose rates by, or to test on; the last two are halves of the test texts."""
        if use == "train":
            return prose("calibration", 12 * self.steps, self.length, 0, GENERAL)
        part = (0.0, 0.5) if use == "validation" else (0.5, 1.0)
        return prose("test", 96, self.length, 1, GENERAL, part)

    def base(self, seed: int) -> Stack:
        """Return the model that is trained with a seed, from the cache if it was trained before."""
        sizes = {"layers": self.layers, "hidden": self.hidden, "steps": self.steps}
        return trained(self.samples("train"), **sizes, seed=seed, name=f"general{self.length}")

    def kept(self, way: str, n: int) -> list[int]:
        """Return the layers that a way keeps."""
        if way in RULES:
            return RULES[way](self.layers, n)
        return list(range(n)) if way == "first n" else [0, *range(self.layers - n + 1, self.layers)]


def fine_tuned(size: Size, way: str, n: int, seed: int, use: str, rate: float) -> dict[str, float]:
    """Return the loss of the whole model, and with n layers before and after fine-tuning, nats per answer token."""
    stack, test = size.base(seed), size.samples(use)
    plan = phased(stack, size.kept(way, n))
    config = TrainConfig(steps=size.tuning, lr=rate, batch=16, seed=seed, save_every=size.tuning)
    with torch.enable_grad():
        healed = tune(stack, plan, size.samples("train"), config=config, work=Work(scratch("unified")))
    views = {"whole": stack.model, "before": lamella.apply(stack, plan), "after": lamella.apply(healed.stack, plan)}
    return {name: nats(view, test) for name, view in views.items()}


def validated(size: Size, way: str, n: int, rate: float) -> float:
    return fine_tuned(size, way, n, PILOT, "validation", rate)["after"]


def rates_for(run: Run, size: Size, n: int) -> dict[str, float]:
    """Return the rate of each way to keep n layers, chosen by validation; a quick run tunes none."""
    if run.quick:
        return dict.fromkeys(WAYS, RATE)
    scores = {f"{way}, n = {n}": partial(validated, size, way, n) for way in WAYS}
    chosen = tuned(run, scores, [3e-4, 1e-3, 3e-3])
    return {way: each.value for way, each in zip(WAYS, chosen.values(), strict=True)}


def tuning(run: Run) -> None:
    """Check point 3: fine-tuning under four ways to keep n layers, each with its own rate, over models."""
    size = Size(6, 64, 150, 96, 40) if run.quick else Size(12, 96, 2000, 128, 200)
    counts = [3, 2] if run.quick else [6, 3, 2]
    rates = {n: rates_for(run, size, n) for n in counts}
    pilot = run.arm("pilot", fine_tuned, size, "first n", counts[1], PILOT, "validation",
                    rates[counts[1]]["first n"])  # fmt: skip
    left = pilot["after"] - pilot["whole"]
    name = f"loss that tuning does not recover, first n = {counts[1]}"
    run.premise(name, "at least 0.1 nats", left, left >= 0.1)
    seeds = range(run.seed, run.seed + (1 if run.quick else 5))
    run.freeze("mean over models of the difference of losses after fine-tuning", seeds, size=vars(size), rates=rates)

    rows, after = [], {}
    for n in counts:
        for way in WAYS:
            rate = rates[n][way]
            found = [run.arm(f"{way}, n = {n}, seed {seed}", fine_tuned, size, way, n, seed, "test", rate)
                     for seed in seeds]  # fmt: skip
            after[way, n] = [each["after"] for each in found]
            recovered = fmean((each["before"] - each["after"]) / (each["before"] - each["whole"]) for each in found)
            means = [fmean(each[key] for each in found) for key in ("whole", "before", "after")]
            rows.append([n, way, str(size.kept(way, n)), rate, *means, f"{recovered:.0%}"])
    columns = ["n", "way", "layers", "rate", "whole model", "before", "after", "recovered"]
    title = f"Nats per answer token, {size.tuning} steps of fine-tuning, mean of {len(seeds)} models"
    run.table(title, columns, rows)
    bars = {way: [row[6] for row in rows if row[1] == way] for way in WAYS}
    bars["whole model"] = [rows[0][4]] * len(counts)
    names = [f"{n} of {size.layers} layers" for n in counts]
    run.figure("unified-skip-layers", Bars("decoded with", "nats per answer token after fine-tuning", bars, names))
    for n, rule, other in product(counts, RULES, WAYS[2:]):
        if size.kept(rule, n) == size.kept(other, n):
            continue  # two layers that are evenly spaced are the two ends
        apart = Measured.over_seeds(
            [ours - theirs for ours, theirs in zip(after[rule, n], after[other, n], strict=True)]
        )
        most = 0.0 if n == counts[0] else -0.03
        name = f"{rule} minus '{other}', n = {n} of {size.layers}, fine-tuned"
        run.main(name, f"at most {most:g} nats", apart, apart.at_most(most))


def speed(record: Record, stack: Stack, counts: list[int], quick: bool) -> None:
    """Check point 5: decode speed against the cost model, at batch 1 and 8."""
    views = {f"n = {n}": lamella.apply(stack, phased(stack, RULES["even"](30, n))) for n in counts}
    models = {"whole": stack.model, "whole again": lamella.apply(stack, phased(stack, list(range(30))))} | views
    rows = []
    for batch in (1,) if quick else (1, 8):
        times = measure_step(stack, batch=batch)
        timings = bench(models, [batch], prompt=64, tokens=16 if quick else 64, rounds=3 if quick else 5)
        whole = timings["whole"][0]
        machine = spread(whole, timings["whole again"][0])
        rows.append([batch, 30, 1.0, 1.0, *map(str, speedups(timings["whole again"][0])), f"{machine:.1%}"])
        speeds = []
        for n, (name, view) in zip(counts, views.items(), strict=True):
            timing = timings[name][0]
            predicted = times.speedup(view.lamella_plan)
            speeds.append(Measured.over_rounds(timing.decode_speedup))
            varies = spread(whole, timing)
            rows.append([batch, n, 30 / n, predicted, *map(str, speedups(timing)), f"{varies:.1%}"])
            label = f"batch {batch}, n = {n}"
            share = Measured.over_rounds(timing.decode_speedup, predicted)
            record.further(f"decode speed-up / cost model, {label}", "within 15 %", share, share.within(0.85, 1.15))
            steady = True if varies < 0.05 else None if machine >= 0.05 else False
            measured = f"{varies:.1%} (the whole model against itself: {machine:.1%})"
            record.further(f"variation of the decode speed-up, {label}", "below 5 %", measured, steady)
        rising = together([fewer.at_least(more.figure) for more, fewer in pairwise(speeds)])
        measured = " ".join(f"{each.figure:.2f}" for each in speeds)
        record.further(f"decode speed-up at batch {batch}", "grows as n falls", measured, rising)
    columns = ["batch", "n", "layer ratio", "cost model", "decode speed-up", "prefill speed-up", "variation"]
    record.table("Speed, interleaved runs of equal length", columns, rows)


def speedups(timing: Timing) -> tuple[Ratio, Ratio]:
    return timing.decode_speedup, timing.prefill_speedup


def spread(whole: Timing, timing: Timing) -> float:
    """Return the coefficient of variation of a decode speed-up over rounds; common slow-downs cancel."""
    ratios = [theirs / ours for theirs, ours in zip(whole.decode, timing.decode, strict=True)]
    return pstdev(ratios) / fmean(ratios)


@torch.no_grad()
def experiment(run: Run) -> None:
    quick, seed = run.quick, run.seed
    stack = lamella.open("smollm2")
    text = lamella.load_text("pydoc", "test")
    tokens = lamella.windows(open_tokenizer("smollm2"), text, 4 if quick else 8, 128 if quick else 256, seed)
    run.data = f"{text.provenance(tokens)}, a quarter of each sequence is prompt"
    test = FidelityTest(stack, tokens[:2, :96] if quick else tokens)
    run.part("curve", curve, stack, test, [24] if quick else [27, 24, 20, 15, 10])
    tuning(run)
    run.part("speed", speed, stack, [24, 15] if quick else [27, 24, 20, 15, 10, 6], quick)


if __name__ == "__main__":
    raise SystemExit(main(experiment, quick="fewer sequences and cuts, and a model that does not meet the premise"))
