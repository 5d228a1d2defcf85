"""RD-Prune at small scale: a convolutional network on scikit-learn's digits, and SmolLM2-135M.

Checks that distortions of layers are additive, that its allocation changes the output less than uniform, ERK, global
magnitude and LAMP, the behaviour where curves saturate, that noise can replace data, that rounds of pruning and
training reach 95 %, and beat those of LAMP at 97 and 99 %, that a large instance is solved in seconds, and that pruning
30 % of SmolLM2's weights gives a lower perplexity than the same fraction of every layer. The main claim compares
allocations on twenty networks, paired. Needs scikit-learn, for the digits.

    python reproductions/rd_prune.py             # about an hour; an interrupted run resumes
    python reproductions/rd_prune.py --digits    # without SmolLM2
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
from lamella.report.figures import Scatter
from lamella.results import Record
from lamella.zoo import open_tokenizer

TEST = 600  # number of test images
STEPS = 60  # training steps after pruning; the network itself has 300
RATE = 1e-3  # AdamW, batches of 100
CONVOLUTIONS = ((16, False), (32, True), (64, False), (64, True))  # and 2 linear layers: 94 096 weights
ROUNDS = 5
LEFT = 0.5  # least density of a layer in rounds, as a fraction of the whole density: at 97 %, at most 98.5 % may go
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
    sparsity: float


def outcome(model: nn.Module, amounts: Amounts, data: Digits, seed: int | None) -> Outcome:
    """Return the results of an allocation; without a seed, it is not trained afterwards."""
    masks = masks_for(model, amounts)
    joint, calibrated = (joint_distortion(model, masks, images[0]).mean for images in (data.test, data.calibration))
    before = accuracy(apply_masks(model, masks), data)
    after = float("nan") if seed is None else after_training(model, masks, data, seed)
    return Outcome(joint, calibrated, before, after, amounts.predicted, amounts.sparsity)


@dataclass(frozen=True)
class Network:
    """A trained network, its images, and its curves of images and of noise."""

    model: nn.Module
    data: Digits
    curves: Curves
    noise: Curves
    untouched: bool

    @classmethod
    def of(cls, seed: int, images: int, grid: int) -> Network:
        data, model = Digits.load(seed, images), network(seed, CONVOLUTIONS, 128, bias=False)
        train(model, data, 300, seed)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        drawn = torch.randn(images, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
        curves, noise = (rate_distortion(model, given, grid=grid) for given in (data.calibration[0], drawn))
        untouched = all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
        return cls(model, data, curves, noise, untouched)


def one_shot(seed: int, images: int, grid: int, tuned: bool) -> list[list[Any]]:
    """Return the results of every allocation on one network, in rows of sparsity, allocation and outcome."""
    each = Network.of(seed, images, grid)
    rows = []
    for sparsity in (0.5, 0.7, 0.85):
        amounts = {
            "rd, mean curve": allocate_by_curves(each.curves, sparsity, reduce="mean"),
            "rd, worst case": allocate_by_curves(each.curves, sparsity, reduce="worst"),
        } | {rule: allocate_by_rule(each.model, sparsity, rule) for rule in RULES}
        for name, chosen in amounts.items():
            rows.append([sparsity, name, vars(outcome(each.model, chosen, each.data, seed if tuned else None))])
    return rows


def quality(run: Run, seeds: range, images: int, grid: int, tuned: bool) -> None:
    """Check point 3: one-shot pruning at equal sparsity, paired over networks."""
    run.freeze(
        "mean over networks of the difference and of the ratio of joint distortions on test images",
        seeds,
        images=images,
        grid=grid,
        steps=STEPS,
        rate=RATE,
    )
    results: dict[tuple[float, str], list[Outcome]] = {}
    for seed in seeds:
        for sparsity, name, found in run.arm(f"one shot, network {seed}", one_shot, seed, images, grid, tuned):
            results.setdefault((sparsity, name), []).append(Outcome(**found))
    rows = []
    for (sparsity, name), found in results.items():
        reaches = fmean([each.sparsity for each in found])
        shown = [fmean([getattr(each, key) for each in found]) for key in ("calibrated", "joint", "before", "after")]
        curve = fmean([each.predicted or 0.0 for each in found]) if name == "rd, mean curve" else ""
        rows.append([f"{sparsity:.0%}", name, reaches, curve, *shown[: 4 if tuned else 3]])
    run.table(
        f"One shot, mean of {len(seeds)} networks: distortion of test logits, accuracy before and after {STEPS} steps",
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

    lines: dict[str, list[tuple[float, float]]] = {}
    for (sparsity, name), found in results.items():
        lines.setdefault(name, []).append((100 * sparsity, fmean([each.before for each in found])))
    run.figure("rd-prune-accuracy", Scatter("sparsity, %", "accuracy without training, %", lines, joined=True))

    def joint(sparsity: float, name: str) -> list[float]:
        return [each.joint for each in results[sparsity, name]]

    for sparsity in (0.5, 0.7):
        rd = joint(sparsity, "rd, mean curve")
        others = {name: joint(sparsity, name) for name in RULES}
        lowest = min(others, key=lambda name: fmean(others[name]))
        above = Measured.over_seeds([ours - theirs for ours, theirs in zip(rd, others[lowest], strict=True)])
        told = f"{fmean(rd):.3g}, {lowest} {fmean(others[lowest]):.3g}; apart {above}"
        run.main(f"joint distortion at {sparsity:.0%}", "RD the lowest", told, above.at_most(0))
        for name, rule, most in (("LAMP", "lamp", 0.95), ("uniform", "uniform", 0.5)):
            ratio = Measured.over_seeds([ours / theirs for ours, theirs in zip(rd, others[rule], strict=True)])
            run.main(f"RD / {name} at {sparsity:.0%}", f"<= {most}", ratio, ratio.at_most(most))
    ours, lamp = ([each.before for each in results[0.85, name]] for name in ("rd, mean curve", "lamp"))
    more = Measured.over_seeds([a - b for a, b in zip(ours, lamp, strict=True)])
    told = f"{fmean(ours):.1f} / {fmean(lamp):.1f}; apart {more}"
    run.further("accuracy at 85 % before training", "RD >= LAMP + 10 points", told, more.at_least(10))


def saturation(record: Record, networks: list[Network]) -> None:
    """Check point 3, the failure case: 95 % in one shot on a plain chain, where all curves are flat."""
    rows, warned, emptied, recovered = [], 0, 0, []
    for seed, each in enumerate(networks):
        model, curves, digits = each.model, each.curves, each.data
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            free = allocate_by_curves(curves, 0.95, reduce="mean")
            warned += any("sparsity of 0.95" in str(warning.message) for warning in told)
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
        f"warned of in {len(networks)} of {len(networks)}",
        f"{warned}, {emptied} emptied a layer",
        warned == len(networks),
    )
    worst = min(recovered)
    record.further("95 % with max_amount 0.96 after training", "recovers, >= 90 % in every seed", worst, worst >= 90)


def zero_data(record: Record, networks: list[Network]) -> None:
    """Check point 4: curves of Gaussian noise."""
    rows, ranks, gaps = [], [], []
    for seed, each in enumerate(networks):
        plans = [allocate_by_curves(curves, 0.85, reduce="mean") for curves in (each.curves, each.noise)]
        found = [outcome(each.model, amounts, each.data, seed) for amounts in plans]
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


def lamp_in_rounds(model: nn.Module, data: Digits, heal: Any, sparsity: float, rounds: int) -> nn.Module:
    """Prune by LAMP as ``prune_in_rounds`` does by curves: the same sparsity in every round, the same training."""
    current = copy.deepcopy(model)
    for number in range(1, rounds + 1):
        masks = masks_for(current, allocate_by_rule(current, 1 - (1 - sparsity) ** (number / rounds), "lamp"))
        current = apply_masks(current, masks)
        heal(current, masks)
    return current


def rounds_of(seed: int, images: int, grid: int, sparsity: float) -> dict[str, Any]:
    """Return accuracies after five rounds by curves and by LAMP, and of LAMP in one shot.

    Beyond 95 % the curves saturate, so that a layer may be emptied; then no layer may lose more than is given here.
    """
    most = 1 - LEFT * (1 - sparsity)
    each = Network.of(seed, images, grid)

    def healed() -> Any:
        turn = iter(range(1000))
        return lambda view, masks: train(view, each.data, STEPS, 100 * seed + next(turn), masks)

    def by_curves(most: float) -> Any:
        options: dict[str, Any] = {"rounds": ROUNDS, "grid": grid, "reduce": "mean", "max_amount": most}
        return prune_in_rounds(each.model, each.data.calibration[0], healed(), sparsity=sparsity, **options)

    (pruned, history), (limited, limited_history) = by_curves(1.0), by_curves(most)
    masks = masks_for(each.model, allocate_by_rule(each.model, sparsity, "lamp"))
    return {
        "dense": accuracy(each.model, each.data),
        "achieved": history[-1].amounts.sparsity,
        "rising": all(
            bool((np.diff([each.amounts.fractions for each in rounds], axis=0) >= 0).all())
            for rounds in (history, limited_history)
        ),
        "rounds": accuracy(pruned, each.data),
        "rounds, max_amount": accuracy(limited, each.data),
        "LAMP in rounds": accuracy(lamp_in_rounds(each.model, each.data, healed(), sparsity, ROUNDS), each.data),
        "LAMP, one shot": after_training(each.model, masks, each.data, seed),
        "LAMP, one shot, all steps": after_training(each.model, masks, each.data, seed, ROUNDS * STEPS),
    }


def in_rounds(run: Run, seeds: range, images: int, grid: int) -> None:
    """Check point 5: five rounds to 95 %, and to 97 and 99 % beside LAMP in as many rounds with as many steps."""
    columns = [
        "dense",
        "achieved",
        "rounds",
        "rounds, max_amount",
        "LAMP in rounds",
        "LAMP, one shot",
        "LAMP, one shot, all steps",
    ]
    rows, rising = [], True
    for sparsity in (0.95,) if run.quick else (0.95, 0.97, 0.99):
        found = [run.arm(f"rounds to {sparsity}, network {seed}", rounds_of, seed, images, grid, sparsity)
                 for seed in seeds]  # fmt: skip
        rising &= all(each["rising"] for each in found)
        rows.append([f"{sparsity:.0%}", *(fmean(each[name] for each in found) for name in columns)])

        def apart(higher: str, lower: str, found: list[dict[str, Any]] = found) -> Measured:
            return Measured.over_seeds([each[higher] - each[lower] for each in found])

        if sparsity == 0.95:
            more, lost = apart("rounds", "LAMP, one shot"), apart("dense", "rounds")
            run.further("five rounds - LAMP in one shot, points", "at least 0", more, more.at_least(0))
            run.further("dense - five rounds, points", "at most 1", lost, lost.at_most(1))
        else:
            more = apart("rounds, max_amount", "LAMP in rounds")
            name = f"five rounds to {sparsity:.0%} with max_amount - LAMP in five rounds, points"
            run.further(name, "at least 0", more, more.at_least(0))
    run.table(f"Accuracy in % after five rounds of {STEPS} steps, mean of {len(seeds)} networks", ["", *columns], rows)
    run.exact("sparsity of each layer over rounds", "never falls", str(rising), rising)


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
    seeds, grid, images = (1, 50, 128) if quick else (20, 100, 256)
    warnings.simplefilter("ignore")  # saturation() checks them
    run.part("speed", speed)
    networks = [Network.of(seed + k, images, grid) for k in range(1 if quick else 3)]
    untouched = sum(each.untouched for each in networks)
    run.exact(
        "weights after measuring curves", "bitwise equal", f"{untouched} of {len(networks)}", untouched == len(networks)
    )
    for k, each in enumerate(networks[:2]):
        images_k, count = each.data.calibration[0], 30 if quick else 60
        run.part(f"additivity, seed {seed + k}", additivity, each.model, each.curves, images_k, count, seed + k)
    quality(run, range(seed, seed + seeds), images, grid, not quick)
    run.part("saturation", saturation, networks)
    run.part("zero data", zero_data, networks)
    in_rounds(run, range(seed, seed + (1 if quick else 8)), images, 200)
    if not run.variant:
        run.data += "; pydoc for SmolLM2"
        run.part("SmolLM2", language_model)


if __name__ == "__main__":
    quick = "digits with one seed and coarser curves, under a minute"
    raise SystemExit(main(experiment, quick=quick, digits="without SmolLM2"))
