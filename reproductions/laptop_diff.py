"""LAPTOP-Diff at small scale: UNets of 18 blocks that generate scikit-learn's digits.

The premise is that the terms of plain feature distillation are unequal: a few stages carry nearly all of its sum. Then
it is measured, over several trained networks, whether scores of single blocks are additive, and whether the blocks that
the knapsack chooses cost less than those that other criteria choose by the same solver, or than random sets, all with
as many parameters. Last, half of one network is removed, and healed for equal steps with each part of the distillation.
The weight of the features is chosen for either kind of them on validation digits, as a multiple of the output loss at
the start; losses are paired over seeds and test digits. The variance over eight networks, and over six seeds of
healing, gives the numbers of new ones that decide.
Further claims are on stages that dominate the features, whose sum then starts at the same multiple, and images are
compared with test digits by the bootstrap: a healed network must be better than the pruned one, and may be as good as
the original.

    python reproductions/laptop_diff.py            # about three hours on one core; an interrupted run resumes
    python reproductions/laptop_diff.py --quick    # one teacher of 40 steps, one seed, two steps of healing
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from statistics import fmean
from typing import Any

import numpy as np
import torch
from harness import Run, main
from harness.design import seeds_needed, tuned
from harness.digits import network as classifier
from harness.digits import split_digits
from harness.measured import LEVEL, Measured
from numpy.typing import NDArray
from scipy.special import comb
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lamella.data import CaptionedImages, InputContext
from lamella.files import Work
from lamella.methods.laptop_diff import (
    BlockScores,
    Denoiser,
    DistillationLoss,
    LossWeights,
    Tuples,
    additivity,
    covering,
    distil,
    encode_samples,
    error,
    generate_images,
    greedy,
    joint,
    magnitudes,
    match_stages,
    measure_blocks,
    predictions,
    random_sets,
    stages,
    targets,
    taylor,
)
from lamella.methods.laptop_diff.digits import DIGITS, pipeline
from lamella.methods.laptop_diff.recipe import with_features
from lamella.plan import ModelReference, Plan
from lamella.report.figures import Bars
from lamella.runtime import apply
from lamella.train import Task, TrainConfig, fit, own
from lamella.train.supervised import stacked

SHARES = (0.2, 0.35, 0.5)
WINDOW = 0.005  # of the parameters: sets of other criteria remove as many as the knapsack's within it
RANDOM, DRAWN = 20, 5  # random sets, and how many of them the sheet compares with
TASK, OUTPUT, VANILLA, NORMALIZED = "task", "task and output", "vanilla features", "normalized features"
FEATURES = {VANILLA: "vanilla", NORMALIZED: "normalized"}
MULTIPLES = (90.0, 810.0, 7290.0)  # of the output loss, at which the sum of the features starts
MOST = 8  # seeds of healing
NETWORKS, MOST_NETWORKS = 16, 24  # least and largest number of networks after the pilot
HALF = 0.5  # of the output loss of the set that magnitude chooses
TIMES = 30.0  # factor by which one stage is scaled up
CLASSIFIER = (((16, False), (32, True)), 32)
RESAMPLES = 1000  # of a bootstrap of images
BATCH = 64
EVERY = 5  # one image in five of those for healing is for validation


@dataclass(frozen=True)
class Size:
    """Scale of the experiment."""

    teacher: int = 2000
    teachers: int = 8  # of the pilot
    tuples: int = 256
    sets: int = 75
    steps: int = 600
    dominated: int = 400
    pilot: int = 6
    few: int = 3
    images: int = 500


FULL, QUICK = Size(), Size(teacher=40, teachers=1, tuples=32, sets=9, steps=2, dominated=1, pilot=1, few=1, images=40)


@dataclass(frozen=True)
class World:
    """A teacher and its data; the images for healing are divided into those for training and for validation."""

    teacher: Denoiser
    train: CaptionedImages
    tuples: Tuples
    validation: Tuples
    test: Tuples

    @property
    def parameters(self) -> int:
        return sum(each.numel() for each in self.teacher.network.parameters())

    def target(self, share: float) -> int:
        return int(np.ceil(share * self.parameters))

    def chosen(self, values: Mapping[str, float], share: float) -> list[str]:
        """Return the cheapest set at a fraction of the parameters."""
        sites, savings = self.teacher.blocks.sites, self.teacher.blocks.savings()
        found = covering([values[each] for each in sites], [savings[each] for each in sites], self.target(share))
        return [sites[each] for each in found.chosen]

    def pruned(self, sites: Sequence[str]) -> Any:
        """Return a view without some blocks, with tensors of its own."""
        plan = Plan(model=ModelReference.of(self.teacher.blocks), drop=list(sites))
        network = apply(self.teacher.blocks, plan)
        own(network, lambda name: True)
        return network.eval()


@cache
def world_of(size: Size, seed: int) -> World:
    teacher = Denoiser(pipeline(DIGITS, size.teacher, seed), DIGITS)
    images = CaptionedImages.open(DIGITS, InputContext(), count=10_000)
    held = tuple(images.items[EVERY - 1 :: EVERY])
    kept = tuple(each for number, each in enumerate(images.items) if number % EVERY != EVERY - 1)
    train, validation = replace(images, items=kept), replace(images, items=held)
    parts = enumerate((train, validation, images.part("test")))
    return World(teacher, train, *(Tuples.of(teacher, each, size.tuples, number) for number, each in parts))


@cache
def scores_of(size: Size, seed: int) -> BlockScores:
    world = world_of(size, seed)
    return measure_blocks(world.teacher, world.tuples, bins=4, batch=BATCH, work=Work())


def half_of(size: Size) -> list[str]:
    """Return the half of the first teacher that is removed before healing."""
    return world_of(size, 0).chosen(scores_of(size, 0).output, 0.5)


def relative(ours: Any, theirs: Any) -> Measured:
    """Return the ratio of two mean losses [seeds, items], paired over both."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    return Measured.over_seeds_and_items(1 + (ours - theirs) / theirs.mean(axis=1, keepdims=True))


# Additivity of scores


def added(size: Size, seed: int) -> dict[str, list[float]]:
    """Return rank and linear correlations of sums of scores with measured sets, and median ratios, by criterion."""
    world, scores = world_of(size, seed), scores_of(size, seed)
    teacher, tuples = world.teacher, world.tuples
    sets = random_sets(teacher.blocks.sites, size.sets, seed)
    found = additivity(teacher, tuples, scores.output, sets, BATCH)
    losses = [joint(teacher, tuples, each, BATCH)[1] - scores.whole for each in sets]
    tasks = [sum(scores.task[site] for site in each) for each in sets]
    weights = magnitudes(teacher)
    sizes = [sum(weights[site] for site in each) for each in sets]
    changed = [point[1] for point in found["points"]]
    return {
        "output loss": [found["spearman"], found["pearson"], found["ratio"]],
        "denoising loss": [_rank(tasks, losses), _line(tasks, losses), float(np.median(np.array(losses) / tasks))],
        "magnitude, for the output loss": [_rank(sizes, changed), _line(sizes, changed)],
    }


def _rank(one: Sequence[float], other: Sequence[float]) -> float:
    return float(spearmanr(one, other).statistic)


def _line(one: Sequence[float], other: Sequence[float]) -> float:
    return float(np.corrcoef(one, other)[0, 1])


def adding(run: Run, size: Size, networks: Sequence[int]) -> None:
    found = [run.arm(f"additivity, teacher {seed}", added, size, seed) for seed in networks]
    rows = [[name, *map(fmean, zip(*(each[name] for each in found), strict=True))] for name in found[0]]
    rows = [[*row, *[""] * (4 - len(row))] for row in rows]
    run.table(
        f"Sums of single scores against {size.sets} sets of 2, 4 and 6 blocks, dropped at once; mean of "
        f"{len(found)} teachers",
        ["criterion", "Spearman", "Pearson", "measured / sum, median"],
        rows,
    )
    rank = Measured.over_seeds([each["output loss"][0] for each in found])
    run.main("additivity of the output loss", "Spearman at least 0.85", rank, rank.at_least(0.85))
    ratio = Measured.over_seeds([each["output loss"][2] for each in found])
    run.main("measured / predicted, median", "0.6 to 2", ratio, ratio.within(0.6, 2))


# Choices of the criteria


def near(world: World, removed: int) -> NDArray[np.bool_]:
    """Return all sets of blocks [sets, blocks] that remove as many parameters as given, within the window."""
    sizes = np.array([world.teacher.blocks.savings()[site] for site in world.teacher.blocks.sites])
    every = (np.arange(2 ** len(sizes))[:, None] >> np.arange(len(sizes))) & 1
    return every[np.abs(every @ sizes - removed) <= WINDOW * world.parameters].astype(bool)


def criteria(size: Size, seed: int) -> dict[str, dict[str, Any]]:
    """Return, by fraction and criterion, the removed parameters and both losses on test digits."""
    world, scores = world_of(size, seed), scores_of(size, seed)
    sites, savings = world.teacher.blocks.sites, world.teacher.blocks.savings()
    others = {
        "knapsack, denoising loss": scores.task,
        "magnitude": magnitudes(world.teacher),
        "first-order Taylor": taylor(world.teacher, world.tuples, BATCH),
    }
    original = predictions(world.teacher, world.teacher.network, world.test, BATCH)
    wanted = targets(world.teacher, world.test)

    def measured(dropped: Sequence[str]) -> dict[str, Any]:
        output = predictions(world.teacher, world.teacher.blocks.without(dropped), world.test, BATCH)
        gone = sum(savings[site] for site in dropped) / world.parameters
        task = float(error(output, wanted).mean())
        return {"removed": gone, "output": error(output, original).tolist(), "task": task}

    def chosen(row: NDArray[np.bool_]) -> list[str]:
        return [site for site, drops in zip(sites, row, strict=True) if drops]

    found: dict[str, dict[str, Any]] = {}
    for share in SHARES:
        best = world.chosen(scores.output, share)
        sets = near(world, sum(savings[site] for site in best))
        values = {name: sets @ np.array([each[site] for site in sites]) for name, each in others.items()}
        drawn = np.random.default_rng(seed).choice(len(sets), RANDOM, replace=False)
        v, p = ([each[site] for site in sites] for each in (scores.output, savings))
        cheapest = greedy(v, p, world.target(share)).chosen
        found[f"{share:.0%}"] = {
            "knapsack": measured(best),
            "greedy by score for each parameter": measured([sites[each] for each in cheapest]),
            **{name: measured(chosen(sets[each.argmin()])) for name, each in values.items()},
            **{f"random {number}": measured(chosen(sets[each])) for number, each in enumerate(drawn)},
        }
    by_hand = [site for site in sites if site.endswith(("resnets.1", "attentions.1"))]
    hand = measured(by_hand)
    found["by hand"] = {
        "knapsack": measured(world.chosen(scores.output, hand["removed"])),
        "second layer of every stage": hand,
    }
    return found


def best_of_few(losses: Sequence[float]) -> float:
    """Return the expected lowest loss of five sets that are drawn from all."""
    ordered, count = np.sort(losses), len(losses)
    return float(ordered @ comb(count - 1 - np.arange(count), DRAWN - 1) / comb(count, DRAWN))


def sets_of(run: Run, size: Size, seed: int) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = run.arm(f"criteria, teacher {seed}", criteria, size, seed)
    return found


def choosing(run: Run, size: Size, networks: Sequence[int]) -> None:
    found = [sets_of(run, size, seed) for seed in networks]
    rows = []
    for share, sets in found[0].items():
        for name in sets:
            each = [one[share][name] for one in found]
            columns = [100 * fmean(one["removed"] for one in each), fmean(fmean(one["output"]) for one in each)]
            rows.append([share, name, *columns, fmean(one["task"] for one in each)])
    run.table(
        f"On test digits, without healing, mean of {len(found)} teachers; the other sets remove as many parameters as "
        f"the knapsack's, within {WINDOW:.1%} of all",
        ["asked", "criterion", "parameters removed, %", "output loss", "denoising loss"],
        rows,
    )
    shares, names = [f"{each:.0%}" for each in SHARES], ("knapsack", "first-order Taylor", "magnitude")
    bars = {name: [fmean(fmean(one[share][name]["output"]) for one in found) for share in shares] for name in names}
    chances = {  # [networks, sets]
        share: [[fmean(one[share][f"random {number}"]["output"]) for number in range(RANDOM)] for one in found]
        for share in shares
    }
    bars["random sets"] = [float(np.mean(chances[share])) for share in shares]
    run.figure("laptop-diff-criteria", Bars("parameters removed", "output loss", bars, tuple(shares), log_y=True))
    for share in shares:
        ours, theirs = ([one[share][name]["output"] for one in found] for name in ("knapsack", "magnitude"))
        ratio = relative(ours, theirs)
        name = f"output loss at {share} of the parameters"
        run.main(f"{name}, against magnitude", "at most half", ratio, ratio.at_most(HALF))
        chance = chances[share]
        logs = [np.log(fmean(each) / best_of_few(every)) for each, every in zip(ours, chance, strict=True)]
        ratio = Measured.over_seeds(logs).exp()
        run.main(f"{name}, against the best of {DRAWN} random sets", "at most 0.3 of it", ratio, ratio.at_most(0.3))
        fewer = sum(loss < fmean(each) for each, every in zip(ours, chance, strict=True) for loss in every)
        all_sets = RANDOM * len(found)
        run.further(f"{name}, random sets that lose less", f"0 of {all_sets}", fewer, fewer == 0)


# Distillation


class Scaled(DistillationLoss):
    """The loss with one stage scaled up and its consumers down by the same factor, which leaves the function the same.

    Args:
        denoiser: the teacher.
        pairs: pairs of paths whose features are compared.
        weights: weights of the parts.
        stage: the stage; "" for none.
    """

    def __init__(self, denoiser: Denoiser, pairs: Any, weights: LossWeights, stage: str) -> None:
        super().__init__(denoiser, pairs, weights)
        self.stage = stage

    def parts(self, student: Any, rows: Tuples) -> tuple[dict[str, Tensor], list[Tensor]]:
        parts, features = super().parts(student, rows)
        if self.weights.features == "vanilla":  # the normalized term is the same, whatever the scale
            paths = [path for path, _ in self.pairs]
            features = [
                each * TIMES**2 if path == self.stage else each for path, each in zip(paths, features, strict=True)
            ]
        return parts, features


@torch.no_grad()
def balanced(world: World, student: Any, kind: str, multiple: float, stage: str = "") -> Scaled:
    """Return the loss whose features start at a multiple of the output loss."""
    weights = LossWeights(features=FEATURES[kind], feature_weight=1.0)  # type: ignore[arg-type]
    loss = Scaled(world.teacher, match_stages(world.teacher.network, student), weights, stage)
    parts, features = loss.parts(student, world.tuples)
    loss.weights = replace(weights, feature_weight=multiple * float(parts["output"]) / float(sum(features)))
    return loss


def configuration(steps: int, seed: int) -> TrainConfig:
    return TrainConfig(steps=steps, lr=5e-4, batch=BATCH, schedule="constant", warmup=0, seed=seed, save_every=10_000)


def healed(size: Size, arm: str, multiple: float, seed: int) -> Any:
    """Train for equal steps, and return the student."""
    world = world_of(size, 0)
    student = world.pruned(half_of(size))
    weights = LossWeights(features="none", output_weight=float(arm != TASK))
    if arm in FEATURES:
        weights = balanced(world, student, arm, multiple).weights
    config = configuration(size.steps, seed)
    distil(world.teacher, student, world.train, weights=weights, config=config, out=Work().directory("run"))
    return student.eval()


@torch.no_grad()
def judged(world: World, student: Any, rows: Tuples) -> dict[str, Any]:
    """Return the output loss of each row, the denoising loss, and the relative error of each stage."""
    teacher = world.teacher
    ours, original = (predictions(teacher, each, rows, BATCH) for each in (student, teacher.network))
    pairs = match_stages(teacher.network, student)
    _, features = DistillationLoss(teacher, pairs, LossWeights()).parts(student, rows)
    return {
        "output": error(ours, original).tolist(),
        "task": float(error(ours, targets(teacher, rows)).mean()),
        "stages": {path: float(each) for (path, _), each in zip(pairs, features, strict=True)},
    }


def validated(size: Size, arm: str, multiple: float, seed: int = 0) -> float:
    world = world_of(size, 0)
    return fmean(judged(world, healed(size, arm, multiple, seed), world.validation)["output"])


def tested(size: Size, arm: str, multiple: float, seed: int) -> dict[str, Any]:
    world = world_of(size, 0)
    return judged(world, healed(size, arm, multiple, seed), world.test)


def terms(size: Size) -> dict[str, dict[str, float]]:
    """Return the features' terms before training, the mean squares of the teacher's features, and the losses."""
    world = world_of(size, 0)
    student, network, rows = world.pruned(half_of(size)), world.teacher.network, world.tuples
    found: dict[str, Any] = {"not healed": judged(world, student, world.test)}
    for kind, name in FEATURES.items():
        pairs = match_stages(network, student)
        with torch.no_grad():
            _, features = DistillationLoss(world.teacher, pairs, LossWeights(features=name)).parts(student, rows)  # type: ignore[arg-type]
        found[kind] = {path: float(each) for (path, _), each in zip(pairs, features, strict=True)}
    noisy, paths = world.teacher.noising.add_noise(rows.clean, rows.noise, rows.timesteps), stages(network)
    with torch.no_grad():
        _, features = with_features(
            network, paths, lambda: world.teacher.predict(network, noisy, rows.timesteps, rows.conditions)
        )
    return found | {"squares": {path: float(x.square().mean()) for path, x in zip(paths, features, strict=True)}}


def dominated(size: Size, kind: str, stage: str, multiple: float, seed: int) -> list[float]:
    """Return the output loss on test digits after training with one stage scaled up."""
    world = world_of(size, 0)
    student = world.pruned(half_of(size))
    loss = balanced(world, student, kind, multiple, stage)
    task = Task(loss, collate=stacked, weight=lambda batch: len(batch["clean"]))
    samples, config = encode_samples(world.teacher, world.train), configuration(size.dominated, seed)
    fit(student, samples, task, config, out=Work().directory("run"), trainable=lambda name: True)
    found: list[float] = judged(world, student.eval(), world.test)["output"]
    return found


def designed(run: Run, size: Size) -> tuple[list[int], dict[str, float], list[int]]:
    """Choose the networks, the multiple for each way of healing and the seeds of healing by pilots, and freeze them."""
    few = [
        fmean(each["knapsack"]["output"]) / fmean(each["magnitude"]["output"])
        for each in (sets_of(run, size, seed)[f"{SHARES[-1]:.0%}"] for seed in range(size.teachers))
    ]
    more = 1 if run.quick else max(NETWORKS, seeds_needed(few, abs(fmean(few) - HALF), MOST_NETWORKS))
    networks = list(range(size.teachers, size.teachers + more))
    multiples = dict.fromkeys((*FEATURES, TASK, OUTPUT), MULTIPLES[-1])  # without features it has no effect
    if not run.quick:
        sweep = {arm: partial(validated, size, arm) for arm in FEATURES}
        what = "Sums of the features at the start, over the output loss; chosen by the output loss on validation digits"
        multiples |= {arm: each.value for arm, each in tuned(run, sweep, MULTIPLES, what).items()}
    pilot = [
        np.log(run.arm(f"pilot, {NORMALIZED}, {seed}", validated, size, NORMALIZED, multiples[NORMALIZED], seed)
               / run.arm(f"pilot, {VANILLA}, {seed}", validated, size, VANILLA, multiples[VANILLA], seed))
        for seed in range(1, 1 + size.pilot)
    ]  # fmt: skip
    count = 1 if run.quick else seeds_needed(pilot, abs(np.mean(pilot) - np.log(1.05)), MOST)
    seeds = list(range(1 + size.pilot, 1 + size.pilot + count))
    run.freeze(
        "ratio of mean output losses on test digits, paired over networks or seeds and digits", seeds,
        networks=networks, steps=size.steps, lr=5e-4, batch=BATCH, multiples=multiples,
    )  # fmt: skip
    return networks, multiples, seeds


def distilling(
    run: Run, size: Size, start: dict[str, Any], multiples: Mapping[str, float], seeds: Sequence[int]
) -> None:
    """Compare the parts of the distillation."""
    found = {arm: [run.arm(f"{arm}, {seed}", tested, size, arm, multiples[arm], seed) for seed in seeds]
             for arm in multiples}  # fmt: skip
    paths = list(start["squares"])
    rows = []
    for arm, each in {"not healed": [start["not healed"]], **found}.items():
        means = [fmean(one["stages"][path] for one in each) for path in paths]
        output, task = fmean(fmean(one["output"]) for one in each), fmean(one["task"] for one in each)
        rows.append([arm, output, task, *means])
    run.table(
        f"On test digits after {size.steps} steps, means over {len(seeds)} seeds; and relative errors of stages",
        ["", "output loss", "denoising loss", *paths],
        rows,
    )

    def over(one: str, other: str) -> Measured:
        return relative(*([each["output"] for each in found[arm]] for arm in (one, other)))

    ratio = over(OUTPUT, TASK)
    run.further("output loss with the output term, over the task alone", "at most 0.8", ratio, ratio.at_most(0.8))
    ratio = over(VANILLA, OUTPUT)
    run.further("with vanilla features, over task and output", "at most 0.95", ratio, ratio.at_most(0.95))
    ratio = over(NORMALIZED, OUTPUT)
    run.main("with normalized features, over task and output", "at most 0.95", ratio, ratio.at_most(0.95))
    ratio = over(NORMALIZED, VANILLA)
    run.main("normalized over vanilla", "at most 1.05", ratio, ratio.at_most(1.05))
    least = min(start["squares"], key=start["squares"].__getitem__)
    both = zip(found[NORMALIZED], found[VANILLA], strict=True)
    ratio = Measured.over_seeds([np.log(a["stages"][least] / b["stages"][least]) for a, b in both]).exp()
    run.main(f"error of {least}, whose features are smallest, over vanilla", "at most 1", ratio, ratio.at_most(1))
    dominating(run, size, multiples[NORMALIZED], multiples[VANILLA], paths)


def dominating(run: Run, size: Size, normalized: float, vanilla: float, paths: Sequence[str]) -> None:
    seeds = range(size.few)

    def of(kind: str, stage: str, multiple: float, seed: int) -> Any:
        return run.arm(f"{kind}, {stage} larger, {seed}", dominated, size, kind, stage, multiple, seed)

    calm = [of(NORMALIZED, "no stage", normalized, seed) for seed in seeds]
    middle = [of(VANILLA, "mid_block", vanilla, seed) for seed in seeds]
    rows = [["normalized, whichever is larger", len(calm), float(np.mean(calm)), 1.0]]
    for path in paths:
        each = middle if path == "mid_block" else [of(VANILLA, path, vanilla, 0)]
        rows.append([f"vanilla, {path} larger", len(each), float(np.mean(each)),
                     float(np.mean(each) / np.mean(calm[: len(each)]))])  # fmt: skip
    run.table(
        f"Output loss after {size.dominated} steps when one stage is scaled by {TIMES:g}",
        ["", "seeds", "output loss", "over normalized"],
        rows,
    )
    ratio = relative(middle, calm)
    run.further("vanilla features dominated by the middle, over normalized", "at least 1.3", ratio, ratio.at_least(1.3))


# Generated images


def judge_of_digits(seed: int) -> nn.Module:
    """Train a convolutional classifier of digits."""
    (images, labels), _ = split_digits(seed, 450)
    model = classifier(seed, *CLASSIFIER)
    steps = torch.optim.Adam(model.parameters(), 1e-3)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(12):
        for chosen in torch.randperm(len(images), generator=generator).split(64):
            if len(chosen) > 1:
                steps.zero_grad()
                cross_entropy(model(images[chosen]), labels[chosen]).backward()
                steps.step()
    return model.eval()


def frechet(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Return the Frechet distance between two sets of features [images, width]."""
    (m1, c1), (m2, c2) = ((each.mean(axis=0), np.cov(each.T)) for each in (one, other))
    root = np.sqrt(np.linalg.eigvals(c1 @ c2).astype(complex)).sum().real
    return float(((m1 - m2) ** 2).sum() + np.trace(c1 + c2) - 2 * root)


def drawing(size: Size, multiple: float, seed: int) -> dict[str, Any]:
    """Return the distances of three networks' images from test digits in a classifier's features, and differences.

    The networks draw from the same noise, so that the bootstrap resamples the same images of all, and the digits.
    """
    world = world_of(size, 0)
    student = world.pruned(half_of(size))
    weights, config = balanced(world, student, NORMALIZED, multiple).weights, configuration(2 * size.steps, seed)
    distil(world.teacher, student, world.train, weights=weights, config=config, out=Work().directory("run"))
    digits, knows = world.train.part("test"), judge_of_digits(seed)
    networks = {"teacher": world.teacher.network, "pruned": world.pruned(half_of(size)), "healed": student.eval()}
    sets = {name: generate_images(world.teacher, each, digits, size.images, seed) for name, each in networks.items()}
    sets["digits"] = np.stack([each.image for each in digits.items])
    features, sure = {}, {}
    with torch.no_grad():
        for name, images in sets.items():
            hidden = knows[:-1](torch.from_numpy(images[..., 0])[:, None] / 255)
            features[name] = hidden.double().numpy()
            sure[name] = float(knows[-1](hidden).softmax(dim=1).max(dim=1).values.mean())
    truth = features.pop("digits")
    random = np.random.default_rng(seed)
    drawn = []
    for _ in range(RESAMPLES):
        rows, others = (random.integers(0, len(each), len(each)) for each in (features["teacher"], truth))
        drawn.append([frechet(each[rows], truth[others]) for each in features.values()])
    distances = [frechet(each, truth) for each in features.values()]
    return {"names": list(features), "distances": distances, "sure": sure, "drawn": drawn}


def bootstrapped(figure: float, drawn: NDArray[np.float64]) -> Measured:
    """Return a figure with the interval of its bootstrap, moved by the bias of the resamples."""
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) + figure - drawn.mean()
    return Measured(figure, float(low), float(high))


def images(run: Run, size: Size, multiple: float) -> None:
    found = run.arm("images", drawing, size, multiple, run.seed)
    distances, drawn = np.array(found["distances"]), np.array(found["drawn"])
    run.table(
        f"{size.images} images from the same noise, compared with test digits; intervals of {RESAMPLES} resamples",
        ["", "Frechet distance", "confidence of a classifier"],
        [[name, str(bootstrapped(distance, column)), found["sure"][name]]
         for name, distance, column in zip(found["names"], distances, drawn.T, strict=True)]
        + [["test digits", "", found["sure"]["digits"]]],
    )  # fmt: skip
    teacher, pruned, back = (found["names"].index(name) for name in ("teacher", "pruned", "healed"))
    nearer = bootstrapped(distances[pruned] - distances[back], drawn[:, pruned] - drawn[:, back])
    run.main("distance of images: pruned less healed", "above 0", nearer, nearer.at_least(0))
    behind = bootstrapped(distances[back] - distances[teacher], drawn[:, back] - drawn[:, teacher])
    run.further("distance of images: healed less the teacher's", "at least 0", behind, behind.at_least(0))


def experiment(run: Run) -> None:
    size = QUICK if run.quick else FULL
    world, scores = world_of(size, 0), scores_of(size, 0)
    test = len(world.train.part("test"))
    run.data = f"scikit-learn's digits, {len(world.train)} for measuring and healing, {test} for testing"
    sites, savings = world.teacher.blocks.sites, world.teacher.blocks.savings()
    run.table(
        "Scores of single blocks of the first teacher",
        ["block", "parameters", "output loss", *(f"time {n} of 4" for n in range(1, 5)), "denoising loss, rise"],
        [[site, savings[site], scores.output[site], *scores.by_time[site], scores.task[site]] for site in sites],
    )
    start = run.arm("terms", terms, size)
    there = [each for each in start[VANILLA].values() if each > 0]  # stages before the first removed block have none
    spread = max(there) / min(there)
    run.premise("vanilla terms, largest over smallest", "at least 5", spread, spread >= 5)
    paths = list(start["squares"])
    run.table(
        "Terms of the features' sum before training, percent; and the mean squares of the teacher's features",
        ["", *paths],
        [[kind, *(100 * each / sum(start[kind].values()) for each in start[kind].values())] for kind in FEATURES]
        + [["mean square", *start["squares"].values()]],
    )
    most = max(start[NORMALIZED].values()) / sum(start[NORMALIZED].values())
    run.further("largest fraction of a normalized term", "at most 60 %", f"{most:.0%}", most <= 0.6)
    networks, multiples, seeds = designed(run, size)
    adding(run, size, networks)
    choosing(run, size, networks)
    distilling(run, size, start, multiples, seeds)
    images(run, size, multiples[NORMALIZED])


if __name__ == "__main__":
    raise SystemExit(main(experiment, quick="one teacher of 40 steps, one seed, two steps of healing"))
