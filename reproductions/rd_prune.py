"""RD-Prune at small scale: a convolutional network on scikit-learn's digits, and SmolLM2-135M.

Checks that the solver is exact, that distortions of layers are additive, that its allocation changes the output less
than uniform, ERK, global magnitude and LAMP, the behaviour where curves saturate, that noise can replace data, that
rounds of pruning and training reach 95 %, that a large instance is solved in seconds, and that pruning 30 % of
SmolLM2's weights gives a lower perplexity than the same fraction of every layer. Needs scikit-learn, for the digits.

    python reproductions/rd_prune.py             # about 25 minutes on 2 cores; an interrupted run resumes
    python reproductions/rd_prune.py --digits    # without SmolLM2, about 5 minutes
    python reproductions/rd_prune.py --quick     # digits with one seed and coarser curves
"""

from __future__ import annotations

import copy
import time
import warnings
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
import torch
from harness import Run, main
from harness.digits import Set, network, split_digits
from harness.measured import Measured
from scipy.stats import pearsonr, spearmanr
from torch import Tensor, nn

import lamella
from lamella.evaluate import FidelityTest
from lamella.methods.rd_prune import (
    Amounts,
    Curves,
    MaskHook,
    allocate_by_curves,
    allocate_by_rule,
    joint_distortion,
    masks_for,
    prune_in_rounds,
    rate_distortion,
)
from lamella.methods.rd_prune.knapsack import allocate
from lamella.plan import Masks, apply_masks
from lamella.results import Record
from lamella.zoo import open_tokenizer

TEST = 600  # number of test images
STEPS = 60  # training steps after pruning; the network itself has 300
RATE = 1e-3  # AdamW, batches of 100
CONVOLUTIONS = ((16, False), (32, True), (64, False), (64, True))  # and 2 linear layers: 94 096 weights
RULES = ("lamp", "erk", "global", "uniform")


@dataclass(frozen=True)
class Digits:
    """Training and test images; the first training images are the calibration data."""

    train: Set
    test: Set
    calibration: Set

    @classmethod
    def load(cls, seed: int, count: int) -> Digits:
        (images, labels), test = split_digits(seed, TEST)
        return cls((images, labels), test, (images[:count], labels[:count]))


def train(model: nn.Module, data: Digits, steps: int, seed: int, masks: Masks | None = None) -> None:
    """Train in place with fixed masks, at one learning rate before and after pruning, as the authors do."""
    images, labels = data.train
    hold = MaskHook(model, masks or {}).apply
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    with torch.enable_grad():
        for _ in range(steps):
            batch = torch.randint(len(images), (100,), generator=generator)
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            hold()
    model.eval()


def accuracy(model: nn.Module, data: Digits) -> float:
    """Return the accuracy in percent on test images."""
    images, labels = data.test
    return 100 * float((model(images).argmax(1) == labels).double().mean())


def after_training(model: nn.Module, masks: Masks, data: Digits, seed: int, steps: int = STEPS) -> float:
    tuned = copy.deepcopy(apply_masks(model, masks))
    train(tuned, data, steps, seed, masks)
    return accuracy(tuned, data)


def exactness(record: Record, model: nn.Module, curves: Curves, data: Digits, instances: int) -> None:
    """Check point 1."""
    draw = np.random.default_rng(0)
    same, within, scaled, permuted, zero_first = 0, 0, 0, 0, 0
    for _ in range(instances):
        sizes = draw.integers(3, 60, 4)
        d = [np.concatenate([[0.0], draw.random(10)]) for _ in range(4)]
        c = [size - size * np.arange(11) // 10 for size in sizes]
        budget = int(draw.random() * sizes.sum())
        loss, cost = np.zeros(1), np.zeros(1, np.int64)
        for a, b in zip(d, c, strict=True):  # all 11^4 allocations
            loss, cost = np.add.outer(loss, a).ravel(), np.add.outer(cost, b).ravel()
        best = loss[cost <= budget].min()
        found = allocate(d, c, budget, unit=1)
        same += abs(found.distortion - best) <= 1e-12
        within += found.cost <= budget and all(allocate(d, c, budget, unit=unit).cost <= budget for unit in (1, 2, 3))
        scaled += allocate([10 * each for each in d], c, budget, unit=1).choice == found.choice
        order = draw.permutation(4)
        moved = allocate([d[k] for k in order], [c[k] for k in order], budget, unit=1)
        permuted += abs(moved.distortion - best) <= 1e-12
        first = allocate([np.zeros(11), *d[1:]], c, int(sizes[1:].sum()), unit=1)
        zero_first += first.choice == (10, 0, 0, 0)
    for name, count in {
        "cost equal to brute force over 11^4 allocations": same,
        "survivors within the budget, units of 1, 2 and 3": within,
        "the same plan when all curves are scaled by 10": scaled,
        "the same cost when layers are permuted": permuted,
        "a layer with an all-zero curve is removed first": zero_first,
    }.items():
        record.exact(name, f"{instances} of {instances} random instances", count, count == instances)

    nothing = allocate_by_curves(curves, 0.0)
    identical = torch.equal(apply_masks(model, masks_for(model, nothing))(data.test[0]), model(data.test[0]))
    record.exact(
        "sparsity 0",
        "nothing pruned, output bitwise equal",
        str(identical),
        identical and not any(nothing.pruned.values()),
    )


def additivity(record: Record, model: nn.Module, curves: Curves, images: Tensor, count: int, seed: int) -> None:
    """Check point 2: random allocations, every amount between 0 and 0.9."""
    draw = np.random.default_rng(seed)
    names, rows = list(curves.layers), range(len(curves.layers))
    sums, joints = [], []
    for _ in range(count):
        choice = draw.integers(0, int(0.9 * curves.grid) + 1, len(names))
        pruned = {name: int(curves.pruned[i, choice[i]]) for i, name in enumerate(names)}
        amounts = Amounts(pruned, dict(zip(names, curves.sizes.tolist(), strict=True)))
        sums.append(sum(float(curves.distortion("mean")[i, choice[i]]) for i in rows))
        joints.append(joint_distortion(model, masks_for(model, amounts), images).mean)
    rank = float(spearmanr(sums, joints).statistic)
    line = float(pearsonr(np.log(sums), np.log(joints)).statistic)
    ratio = float(np.median(np.array(joints) / np.array(sums)))
    record.table(
        f"Joint distortion against the sum of the curves, {count} random allocations, seed {seed}",
        ["Spearman", "Pearson of logarithms", "median joint / sum"],
        [[rank, line, ratio]],
    )
    record.main(f"Spearman of sum and joint, seed {seed}", ">= 0.9", rank, rank >= 0.9)
    record.further(f"median joint / sum, seed {seed}", "0.6 to 1.6", ratio, 0.6 <= ratio <= 1.6)


@dataclass(frozen=True)
class Outcome:
    joint: float  # on test images
    calibrated: float  # on the calibration images of the curves
    before: float
    after: float
    predicted: float | None
    amounts: Amounts


def outcome(model: nn.Module, amounts: Amounts, data: Digits, seed: int | None) -> Outcome:
    """Return the results of an allocation; without a seed, it is not trained afterwards."""
    masks = masks_for(model, amounts)
    joint, calibrated = (joint_distortion(model, masks, images[0]).mean for images in (data.test, data.calibration))
    before = accuracy(apply_masks(model, masks), data)
    after = float("nan") if seed is None else after_training(model, masks, data, seed)
    return Outcome(joint, calibrated, before, after, amounts.predicted, amounts)


def quality(record: Record, models: list[nn.Module], measured: list[Curves], data: list[Digits], tuned: bool) -> None:
    """Check point 3: one-shot pruning at equal sparsity."""
    results: dict[tuple[float, str], list[Outcome]] = {}
    for seed, (model, curves, digits) in enumerate(zip(models, measured, data, strict=True)):
        for sparsity in (0.5, 0.7, 0.85):
            amounts = {
                "rd, mean curve": allocate_by_curves(curves, sparsity, reduce="mean"),
                "rd, worst case": allocate_by_curves(curves, sparsity, reduce="worst"),
            } | {rule: allocate_by_rule(model, sparsity, rule) for rule in RULES}
            for name, each in amounts.items():
                results.setdefault((sparsity, name), []).append(outcome(model, each, digits, seed if tuned else None))
    rows = []
    for (sparsity, name), found in results.items():
        reaches = fmean([each.amounts.sparsity for each in found])
        shown = [fmean([getattr(each, key) for each in found]) for key in ("calibrated", "joint", "before", "after")]
        curve = fmean([each.predicted or 0.0 for each in found]) if name == "rd, mean curve" else ""
        rows.append([f"{sparsity:.0%}", name, reaches, curve, *shown[: 4 if tuned else 3]])
    record.table(
        f"One shot, mean of {len(models)} seeds: distortion of test logits, accuracy before and after {STEPS} steps",
        [
            "sparsity",
            "allocation",
            "achieved",
            "predicted",
            "joint, calibration",
            "joint, test",
            "before %",
            *(["after %"] if tuned else []),
        ],
        rows,
    )

    def joint(sparsity: float, name: str) -> list[float]:
        return [each.joint for each in results[sparsity, name]]

    for sparsity in (0.5, 0.7):
        rd = joint(sparsity, "rd, mean curve")
        others = {name: joint(sparsity, name) for name in RULES}
        lowest = min(others, key=lambda name: fmean(others[name]))
        above = Measured.over_seeds([ours - theirs for ours, theirs in zip(rd, others[lowest], strict=True)])
        told = f"{fmean(rd):.3g}, {lowest} {fmean(others[lowest]):.3g}; apart {above}"
        record.main(f"joint distortion at {sparsity:.0%}", "RD the lowest", told, above.at_most(0))
        for name, rule, most in (("LAMP", "lamp", 0.95), ("uniform", "uniform", 0.5)):
            ratio = Measured.over_seeds([ours / theirs for ours, theirs in zip(rd, others[rule], strict=True)])
            record.main(f"RD / {name} at {sparsity:.0%}", f"<= {most}", ratio, ratio.at_most(most))
    ours, lamp = ([each.before for each in results[0.85, name]] for name in ("rd, mean curve", "lamp"))
    more = Measured.over_seeds([a - b for a, b in zip(ours, lamp, strict=True)])
    told = f"{fmean(ours):.1f} / {fmean(lamp):.1f}; apart {more}"
    record.further("accuracy at 85 % before training", "RD >= LAMP + 10 points", told, more.at_least(10))


def saturation(record: Record, models: list[nn.Module], measured: list[Curves], data: list[Digits]) -> None:
    """Check point 3, the failure case: 95 % in one shot on a plain chain, where all curves are flat."""
    rows, warned, emptied, recovered = [], 0, 0, []
    for seed, (model, curves, digits) in enumerate(zip(models, measured, data, strict=True)):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            free = allocate_by_curves(curves, 0.95, reduce="mean")
            warned += any("sparsity of 0.95" in str(each.message) for each in told)
            capped = allocate_by_curves(curves, 0.95, reduce="mean", max_amount=0.96)
        emptied += free.fractions.max() == 1
        for name, amounts in {"rd": free, "rd, max_amount 0.96": capped,
                              "lamp": allocate_by_rule(model, 0.95, "lamp"),
                              "uniform": allocate_by_rule(model, 0.95, "uniform")}.items():  # fmt: skip
            found = outcome(model, amounts, digits, seed)
            rows.append([seed, name, found.predicted or "", found.joint, curves.silent.mean, found.before, found.after])
            if name == "rd, max_amount 0.96":
                recovered.append(found.after)
    columns = ["seed", "allocation", "predicted", "joint, test", "output of zeros", "before %", "after %"]
    record.table(f"95 % in one shot, {STEPS} steps of training", columns, rows)
    record.further(
        "saturation",
        f"warned of in {len(models)} of {len(models)}",
        f"{warned}, {emptied} emptied a layer",
        warned == len(models),
    )
    worst = min(recovered)
    record.further("95 % with max_amount 0.96 after training", "recovers, >= 90 % in every seed", worst, worst >= 90)


def zero_data(
    record: Record, models: list[nn.Module], measured: list[Curves], noise: list[Curves], data: list[Digits]
) -> None:
    """Check point 4: curves of Gaussian noise."""
    rows, ranks, gaps = [], [], []
    for seed, (model, real, drawn, digits) in enumerate(zip(models, measured, noise, data, strict=True)):
        plans = [allocate_by_curves(curves, 0.85, reduce="mean") for curves in (real, drawn)]
        found = [outcome(model, amounts, digits, seed) for amounts in plans]
        ranks.append(float(spearmanr(plans[0].fractions, plans[1].fractions).statistic))
        gaps.append(found[0].after - found[1].after)
        rows.append([seed, ranks[-1], found[0].before, found[1].before, found[0].after, found[1].after])
    columns = [
        "seed",
        "Spearman of amounts",
        "images, before %",
        "noise, before %",
        "images, after %",
        "noise, after %",
    ]
    record.table("85 %, curves of images against curves of noise", columns, rows)
    rank, gap = Measured.over_seeds(ranks), Measured.over_seeds(gaps)
    record.further("amounts from noise", "Spearman >= 0.7, mean of seeds", rank, rank.at_least(0.7))
    record.further("accuracy from noise at 85 %, trained", "within 3 points", gap, gap.within(-3, 3))


def in_rounds(record: Record, models: list[nn.Module], data: list[Digits], grid: int) -> None:
    """Check point 5: five rounds to 95 %."""
    rows, rising, last, lamps, dense = [], True, [], [], []
    for seed, (model, digits) in enumerate(zip(models, data, strict=True)):
        turn = iter(range(1000))

        def heal(view: nn.Module, masks: Masks, digits: Digits = digits, turn: Any = turn, seed: int = seed) -> None:
            train(view, digits, STEPS, 100 * seed + next(turn), masks)

        pruned, history = prune_in_rounds(
            model, digits.calibration[0], heal, sparsity=0.95, rounds=5, grid=grid, reduce="mean"
        )
        shares = np.array([each.amounts.fractions for each in history])
        rising &= bool((np.diff(shares, axis=0) >= 0).all())
        last.append(accuracy(pruned, digits))
        dense.append(accuracy(model, digits))
        masks = masks_for(model, allocate_by_rule(model, 0.95, "lamp"))
        lamps.append(after_training(model, masks, digits, seed))
        longer = after_training(model, masks, digits, seed, 5 * STEPS)
        rows.append([seed, dense[-1], history[-1].amounts.sparsity, last[-1], lamps[-1], longer])
    columns = ["seed", "dense %", "achieved", "5 rounds %", f"LAMP, {STEPS} steps %", f"LAMP, {5 * STEPS} steps %"]
    record.table("95 % in five rounds, and LAMP in one shot", columns, rows)
    record.exact("sparsity of each layer over rounds", "never falls", str(rising), rising)
    more, lost = (
        Measured.over_seeds([a - b for a, b in zip(higher, lower, strict=True)])
        for higher, lower in ((last, lamps), (dense, last))
    )
    told = f"{fmean(last):.1f} / {fmean(lamps):.1f}; apart {more}"
    record.further("five rounds / LAMP in one shot", ">=", told, more.at_least(0))
    record.further("dense - five rounds", "at most 1 point", lost, lost.at_most(1))


def speed(record: Record) -> None:
    """Check point 7."""
    draw = np.random.default_rng(0)
    sizes = draw.integers(100_000, 900_000, 210)
    curves = [np.sort(draw.random(101)) for _ in sizes]
    costs = [size - size * np.arange(101) // 100 for size in sizes]
    begin = time.process_time()  # CPU time of one thread, so that other load does not count
    allocate(curves, costs, int(0.7 * sizes.sum()), unit=int(0.7 * sizes.sum()) // 20_000)
    seconds = time.process_time() - begin
    record.further("210 layers, 100 amounts, 20 000 units, seconds of one core", "< 5", seconds, seconds < 5)


def language_model(run: Run) -> None:
    """Check point 6: 30 % of SmolLM2 without training."""
    seed, kept = run.seed, run.work / "smollm2.jsonl"
    stack = lamella.open("smollm2")
    tokenizer = open_tokenizer("smollm2")
    tokens = lamella.windows(tokenizer, lamella.load_text("pydoc", "calibration"), 1, 128, seed)
    test = FidelityTest(stack, lamella.windows(tokenizer, lamella.load_text("pydoc", "test"), 8, 256, seed), prompt=1)
    rows, perplexity = [], {}
    for allocation in ("rd", "uniform", "erk", "global", "lamp"):
        options: dict[str, Any] = {"curves": kept} if allocation == "rd" else {}
        series = lamella.make_plan("rd-prune", stack, tokens, sparsity=0.3, allocation=allocation, **options)
        found = test.of(lamella.apply(stack, series[-1]))
        scores = series.points[-1].scores
        perplexity[allocation] = found.perplexity.mean
        rows.append([allocation, scores["sparsity"], scores.get("predicted distortion", ""), scores["distortion"],
                     str(found.perplexity), str(found.kl)])  # fmt: skip
    rows.append(["(whole model)", 0.0, "", 0.0, str(found.base_perplexity), ""])
    columns = ["allocation", "achieved", "predicted", "joint", "perplexity", "KL (nats)"]
    run.table("SmolLM2-135M, 210 matrices, 30 % masked, no training; 128 calibration tokens", columns, rows)
    ratio = perplexity["rd"] / perplexity["uniform"]
    run.further("perplexity at 30 %, RD / uniform", "<= 0.9", ratio, ratio <= 0.9)


@torch.no_grad()
def experiment(run: Run) -> None:
    quick, seed = run.quick, run.seed
    run.data = "scikit-learn digits, 1197 to train and calibrate on, 600 to test"
    seeds, grid, images = (1, 50, 128) if quick else (3, 100, 256)
    warnings.simplefilter("ignore")  # saturation() checks them
    run.part("speed", speed)
    data = [Digits.load(seed + k, images) for k in range(seeds)]
    models = [network(seed + k, CONVOLUTIONS, 128, bias=False) for k in range(seeds)]
    measured, noise, untouched = [], [], 0
    for k, (model, digits) in enumerate(zip(models, data, strict=True)):
        train(model, digits, 300, seed + k)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        drawn = torch.randn(images, 1, 8, 8, generator=torch.Generator().manual_seed(seed + k))
        for curves, given, name in ((measured, digits.calibration[0], "images"), (noise, drawn, "noise")):
            curves.append(rate_distortion(model, given, grid=grid, path=run.work / f"{name}-{k}.jsonl"))
        untouched += all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    run.exact("weights after measuring curves", "bitwise equal", f"{untouched} of {seeds}", untouched == seeds)
    run.part("exactness", exactness, models[0], measured[0], data[0], 50 if quick else 200)
    for k in range(min(2, seeds)):
        images_k, count = data[k].calibration[0], 30 if quick else 60
        run.part(f"additivity, seed {seed + k}", additivity, models[k], measured[k], images_k, count, seed + k)
    run.part("one shot", quality, models, measured, data, not quick)
    run.part("saturation", saturation, models, measured, data)
    run.part("zero data", zero_data, models, measured, noise, data)
    run.part("rounds", in_rounds, models, data, grid // 2 if quick else grid)
    if not run.variant:
        run.data += "; pydoc for SmolLM2"
        run.part("SmolLM2", language_model)


if __name__ == "__main__":
    quick = "digits with one seed and coarser curves, under a minute"
    raise SystemExit(main(experiment, quick=quick, digits="without SmolLM2"))
