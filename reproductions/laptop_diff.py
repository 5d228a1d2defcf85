"""LAPTOP-Diff at small scale: a UNet of 18 blocks that generates scikit-learn's digits; and SmolLM2's layers.

Checks that dropping nothing is exact, that the knapsack finds the best of all sets, that scores of single blocks are
additive, that its choice costs less than that of other criteria at the same size, the contribution of each part of the
distillation at equal steps, which dominant stages do harm, and that generated images rank as expected.

    python reproductions/laptop_diff.py            # about 50 minutes on one core; an interrupted run resumes
    python reproductions/laptop_diff.py --quick    # a teacher of 300 steps, one seed
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from harness import Run, main
from harness.digits import network as classifier
from harness.digits import split_digits
from harness.measured import Measured
from scipy.linalg import sqrtm
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import lamella
from lamella.data import CaptionedImages, InputContext, load_text, windows
from lamella.files import Work
from lamella.methods.laptop_diff import (
    PROBES,
    BlockScores,
    Denoiser,
    DistillationLoss,
    LossWeights,
    Tuples,
    additivity,
    balance_loss,
    convert,
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
from lamella.methods.laptop_diff.cut import add_class
from lamella.methods.laptop_diff.digits import DIGITS, STEPS, pipeline
from lamella.plan import ModelReference, Plan
from lamella.results import Record
from lamella.runtime import apply
from lamella.stack import Stack
from lamella.train import Task, TrainConfig, fit, own
from lamella.train.supervised import stacked
from lamella.zoo import nano, open_tokenizer

SHARES = (0.2, 0.35, 0.5)
ARMS = {  # arms of the distillation; the last is the paper's
    "task": LossWeights(features="none", output_weight=0.0),
    "task and output": LossWeights(features="none"),
    "vanilla features": LossWeights(features="vanilla"),
    "normalized features": LossWeights(),
}
TIMES = 30.0  # factor by which one stage is scaled up
CLASSIFIER = (((16, False), (32, True)), 32)


@dataclass(frozen=True)
class Size:
    """Scale of the experiment."""

    teacher: int = STEPS
    tuples: int = 256
    sets: int = 75
    steps: int = 600
    dominated: int = 400
    seeds: int = 3
    pictures: int = 500


FULL, QUICK = Size(), Size(teacher=300, tuples=48, sets=18, steps=12, dominated=6, seeds=1, pictures=40)
BATCH = 64


@dataclass(frozen=True)
class World:
    """The teacher and the data on which it is evaluated."""

    teacher: Denoiser
    pictures: CaptionedImages
    tuples: Tuples
    test: Tuples
    size: Size

    @classmethod
    def of(cls, run: Run) -> World:
        size = QUICK if run.quick else FULL
        teacher = Denoiser(pipeline(DIGITS, size.teacher), DIGITS)
        pictures = CaptionedImages.open(DIGITS, InputContext(), count=10_000)
        test = Tuples.of(teacher, pictures.part("test"), size.tuples, run.seed + 1)
        return cls(teacher, pictures, Tuples.of(teacher, pictures, size.tuples, run.seed), test, size)

    def scores(self) -> BlockScores:
        return measure_blocks(self.teacher, self.tuples, bins=4, batch=BATCH, work=Work())

    def target(self, share: float) -> int:
        return int(np.ceil(share * sum(each.numel() for each in self.teacher.network.parameters())))

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


# Exactness


def exact(run: Record, world: World, scores: BlockScores) -> None:
    teacher, tuples = world.teacher, world.tuples
    original = predictions(teacher, teacher.network, tuples, BATCH)
    same = torch.equal(predictions(teacher, teacher.blocks.without([]), tuples, BATCH), original)
    run.exact("nothing dropped", "the original's output, bitwise", same, same)
    sites, savings = teacher.blocks.sites, teacher.blocks.savings()
    dropped = world.chosen(scores.output, 0.5)
    apart = []
    for form in ("native", "portable"):
        with TemporaryDirectory() as folder:
            network = convert(teacher.blocks, teacher.blocks.without(dropped), dropped, form)
            teacher.with_network(network).pipeline.save_pretrained(folder)
            if form == "native":
                add_class(Path(folder), teacher.part, "UNet2DModel")
            again = predictions(teacher, Denoiser.open(folder).network, tuples, BATCH)
        without = predictions(teacher, teacher.blocks.without(dropped), tuples, BATCH)
        apart.append(float((again - without).abs().max()))
    run.exact("written and read back", "within 1e-6 of bypassed blocks, both forms", max(apart), max(apart) <= 1e-6)
    v, p = np.array([scores.output[each] for each in sites[:16]]), np.array([savings[each] for each in sites[:16]])
    every = (np.arange(2**16)[:, None] >> np.arange(16)) & 1
    costs, removed = every @ v, every @ p
    worst, least = 0.0, []
    for share in SHARES:
        target = int(np.ceil(share * p.sum()))
        found = covering(v.tolist(), p.tolist(), target)
        worst = max(worst, abs(found.cost / costs[removed >= target].min() - 1))
        least.append(found.size >= target)
        least.append(covering((1e3 * v).tolist(), p.tolist(), target).chosen == found.chosen)
    run.exact("knapsack against all 65,536 sets of 16 blocks", "the same cost", worst, worst < 1e-12)
    run.exact("sets reach their target, and scores in other units choose the same", "always", all(least), all(least))
    low = min(scores.output.values())
    run.exact("scores", "none below 0", low, low >= 0)


# Additivity of scores


def adding(run: Run, world: World, scores: BlockScores) -> None:
    teacher, tuples = world.teacher, world.tuples
    sets = random_sets(teacher.blocks.sites, world.size.sets, run.seed)
    found = additivity(teacher, tuples, scores.output, sets, BATCH)
    losses = [joint(teacher, tuples, each, BATCH)[1] - scores.whole for each in sets]
    tasks = [sum(scores.task[site] for site in each) for each in sets]
    weights = magnitudes(teacher)
    sizes = [sum(weights[site] for site in each) for each in sets]
    changed = [point[1] for point in found["points"]]
    rows = [
        ["output loss", found["spearman"], found["pearson"], found["ratio"]],
        ["denoising loss", float(spearmanr(tasks, losses).statistic), float(np.corrcoef(tasks, losses)[0, 1]), ""],
        ["magnitude", float(spearmanr(sizes, changed).statistic), float(np.corrcoef(sizes, changed)[0, 1]), ""],
    ]
    run.table(
        f"Sums of single scores against {len(sets)} sets of 2, 4 and 6 blocks, dropped at once",
        ["criterion", "Spearman", "Pearson", "measured / sum, median"],
        rows,
    )
    worst = found["worst"]
    run.table(
        "The pair with the largest deviation from its sum",
        ["blocks", "sum", "measured"],
        [[" and ".join(worst["sites"]), worst["sum"], worst["measured"]]],
    )
    run.main("additivity of the output loss", "Spearman at least 0.85", found["spearman"], found["spearman"] >= 0.85)
    fits = 0.6 <= found["ratio"] <= 2
    run.main("measured / predicted, median", "0.6 to 2", found["ratio"], fits)


# Choices of the criteria


def smallest(values: Mapping[str, float], savings: Mapping[str, int], target: int) -> list[str]:
    """Return the blocks to remove by a criterion that ignores sizes: the smallest scores, up to the budget."""
    chosen: list[str] = []
    for site in sorted(values, key=lambda site: values[site]):
        if sum(savings[each] for each in chosen) < target:
            chosen.append(site)
    return chosen


def by_chance(world: World, share: float, seed: int) -> list[str]:
    drawn_ = np.random.default_rng(seed).random(len(world.teacher.blocks))
    values = dict(zip(world.teacher.blocks.sites, drawn_.tolist(), strict=True))
    return smallest(values, world.teacher.blocks.savings(), world.target(share))


def choosing(run: Run, world: World, scores: BlockScores) -> None:
    teacher, test = world.teacher, world.test
    sites, savings = teacher.blocks.sites, teacher.blocks.savings()
    weights, first_order = magnitudes(teacher), taylor(teacher, world.tuples, BATCH)
    every = sum(each.numel() for each in teacher.network.parameters())
    loss = float(error(predictions(teacher, teacher.network, test, BATCH), targets(teacher, test)).mean())
    rows: list[list[Any]] = [["", "nothing dropped", 0.0, 0.0, loss]]
    for share in SHARES:
        target = world.target(share)
        v, p = [scores.output[each] for each in sites], [savings[each] for each in sites]
        near = [sites[each] for each in greedy(v, p, target).chosen]
        sets = {
            "knapsack": world.chosen(scores.output, share),
            "greedy by score for each parameter": near,
            "knapsack, denoising loss": world.chosen(scores.task, share),
            "magnitude": smallest(weights, savings, target),
            "first-order Taylor": smallest(first_order, savings, target),
            **{f"random {seed}": by_chance(world, share, seed) for seed in range(5)},
        }
        found = {name: joint(teacher, test, each, BATCH) for name, each in sets.items()}
        for name, (changed, loss) in found.items():
            gone = sum(savings[site] for site in sets[name]) / every
            rows.append([f"{share:.0%}", name, 100 * gone, changed, loss])
        best = found["knapsack"][0]
        chance = min(found[f"random {seed}"][0] for seed in range(5))
        run.main(
            f"output loss at {share:.0%} of the parameters, against magnitude",
            "at most half",
            best / found["magnitude"][0],
            best <= 0.5 * found["magnitude"][0],
        )
        run.main(
            f"output loss at {share:.0%}, against the best of five random sets",
            "at most 0.3 of it",
            best / chance,
            best <= 0.3 * chance,
        )
    by_hand = [site for site in sites if site.endswith(("resnets.1", "attentions.1"))]
    share = sum(savings[site] for site in by_hand) / every
    for name, each in (("second layer of every stage", by_hand), ("knapsack", world.chosen(scores.output, share))):
        changed, loss = joint(teacher, test, each, BATCH)
        rows.append([f"{share:.0%}", name, 100 * sum(savings[site] for site in each) / every, changed, loss])
    run.table(
        "On test digits, without healing",
        ["asked", "criterion", "parameters removed, %", "output loss", "denoising loss"],
        rows,
    )


# Distillation


class Dominated(DistillationLoss):
    """Scale one stage up and its consumers down by the same factor, which leaves the function unchanged."""

    def __init__(self, whole: DistillationLoss, stage: str, times: float) -> None:
        super().__init__(whole.denoiser, whole.pairs, whole.weights)
        self.place, self.times = [path for path, _ in whole.pairs].index(stage), times

    def parts(self, student: Any, rows: Tuples) -> tuple[dict[str, Tensor], list[Tensor]]:
        parts, features = super().parts(student, rows)
        if self.weights.features == "vanilla":  # the normalized term is the same, whatever the scale
            features[self.place] = features[self.place] * self.times**2
        return parts, features


def healed(world: World, sites: Sequence[str], arm: str, seed: int, out: Path) -> dict[str, Any]:
    """Train for equal steps; return the losses on test digits, and the relative error of each stage."""
    student = world.pruned(sites)
    config = TrainConfig(
        steps=world.size.steps, lr=5e-4, batch=BATCH, schedule="constant", warmup=0, seed=seed, save_every=10_000
    )
    distil(world.teacher, student, world.pictures, weights=ARMS[arm], config=config, out=out)
    return judged(world, student.eval())


@torch.no_grad()
def judged(world: World, student: Any) -> dict[str, Any]:
    teacher, test = world.teacher, world.test
    said, original = (predictions(teacher, each, test, BATCH) for each in (student, teacher.network))
    pairs = match_stages(teacher.network, student)
    _, features = DistillationLoss(teacher, pairs, LossWeights()).parts(student, test)
    return {
        "output": float(error(said, original).mean()),
        "task": float(error(said, targets(teacher, test)).mean()),
        "stages": {path: float(each) for (path, _), each in zip(pairs, features, strict=True)},
    }


def terms(world: World, sites: Sequence[str]) -> dict[str, Any]:
    """Return the feature terms before training, vanilla and normalized, also with one stage scaled up."""
    student, pairs = world.pruned(sites), match_stages(world.teacher.network, world.pruned(sites))
    found: dict[str, Any] = {}
    for kind in ("vanilla", "normalized"):
        loss, initial = balance_loss(world.teacher, student, world.test, pairs, LossWeights(features=kind))  # type: ignore[arg-type]
        found[kind] = initial["stages"]
        with torch.no_grad():
            larger = Dominated(loss, "mid_block", TIMES).parts(student, world.test)[1]
        found[f"{kind}, mid larger"] = dict(zip(initial["stages"], map(float, larger), strict=True))
    with torch.no_grad():
        parts = DistillationLoss(world.teacher, pairs, LossWeights()).parts(world.teacher.network, world.test)
    found["of itself"] = float(sum(parts[1]))
    return found


def dominated(world: World, sites: Sequence[str], stage: str, kind: str, seed: int, out: Path) -> float:
    """Return the output loss after training with one stage scaled up."""
    student = world.pruned(sites)
    pairs = match_stages(world.teacher.network, student)
    probes = Tuples.of(world.teacher, world.pictures, PROBES, seed)
    loss, _ = balance_loss(world.teacher, student, probes, pairs, LossWeights(features=kind))  # type: ignore[arg-type]
    task = Task(Dominated(loss, stage, TIMES), collate=stacked, weight=lambda batch: len(batch["clean"]))
    config = TrainConfig(
        steps=world.size.dominated, lr=5e-4, batch=BATCH, schedule="constant", warmup=0, seed=seed, save_every=10_000
    )
    fit(student, encode_samples(world.teacher, world.pictures), task, config, out=out, trainable=lambda name: True)
    found: float = judged(world, student.eval())["output"]
    return found


def distilling(run: Run, world: World, sites: list[str]) -> None:
    seeds = range(world.size.seeds)
    stood = run.arm("terms", terms, world, sites)
    found = {
        arm: [run.arm(f"{arm} {s}", healed, world, sites, arm, s, run.work / f"{arm} {s}") for s in seeds]
        for arm in ARMS
    }
    paths = list(stood["vanilla"])
    run.table(
        "Terms of the features' sum before training, percent",
        ["", *paths],
        [[kind, *(100 * each / sum(stood[kind].values()) for each in stood[kind].values())]
         for kind in ("vanilla", "normalized", "vanilla, mid larger", "normalized, mid larger")],
    )  # fmt: skip
    start = judged(world, world.pruned(sites))
    rows = [["not healed", start["output"], start["task"], *(start["stages"][path] for path in paths)]]
    for arm, each in found.items():
        means = [float(np.mean([one["stages"][path] for one in each])) for path in paths]
        output, task = (float(np.mean([one[name] for one in each])) for name in ("output", "task"))
        rows.append([arm, output, task, *means])
    run.table(
        f"On test digits after {world.size.steps} steps, means over {len(seeds)} seeds; and relative errors of stages",
        ["", "output loss", "denoising loss", *paths],
        rows,
    )
    vanilla, normalized = stood["vanilla"], stood["normalized"]
    there = [each for each in vanilla.values() if each > 0]  # stages before the first removed block have no error
    spread = max(there) / min(there)
    run.further("vanilla terms, largest over smallest", "at least 5", spread, spread >= 5)
    most = max(normalized.values()) / sum(normalized.values())
    run.further("largest fraction of a normalized term", "at most 60 %", f"{most:.0%}", most <= 0.6)
    grown = stood["vanilla, mid larger"]["mid_block"] / vanilla["mid_block"]
    run.exact("a stage scaled by 30, vanilla", "its term 900 times", grown, abs(grown / 900 - 1) < 1e-4)
    kept = stood["normalized, mid larger"]["mid_block"] / normalized["mid_block"]
    run.exact("the same, normalized", "as before, to 1e-4", kept, abs(kept - 1) < 1e-4)
    run.exact("features of the teacher beside itself", "0", stood["of itself"], stood["of itself"] == 0)

    def ratio(one: str, other: str) -> Measured:
        return Measured.over_seeds([a["output"] / b["output"] for a, b in zip(found[one], found[other], strict=True)])

    said = ratio("task and output", "task")
    run.further("output loss with the output term, relative to the task alone", "at most 0.8", said, said.at_most(0.8))
    said = ratio("vanilla features", "task and output")
    run.further("with vanilla features, over task and output", "at most 0.95", said, said.at_most(0.95))
    said = ratio("normalized features", "task and output")
    run.main("with normalized features, over task and output", "at most 0.95", said, said.at_most(0.95))
    said = ratio("normalized features", "vanilla features")
    run.main("normalized over vanilla", "at most 1.05", said, said.at_most(1.05))
    norms = run.arm("norms", squares, world)
    least = min(norms, key=lambda path: norms[path])
    said = Measured.over_seeds(
        [
            a["stages"][least] / b["stages"][least]
            for a, b in zip(found["normalized features"], found["vanilla features"], strict=True)
        ]
    )
    run.main(
        f"relative error of {least}, whose features are smallest, over vanilla", "below 1", said, said.at_most(1.0)
    )
    dominating(run, world, sites, paths)


@torch.no_grad()
def squares(world: World) -> dict[str, float]:
    """Return E || f_T ||^2 after every stage."""
    network, rows = world.teacher.network, world.test
    loss = DistillationLoss(world.teacher, [(path, path) for path in stages(network)], LossWeights(features="vanilla"))
    silent = copy.deepcopy(network)
    found = {}
    for path in stages(network):
        hook = silent.get_submodule(path).register_forward_hook(
            lambda module, args, out: (0 * out[0], out[1]) if isinstance(out, tuple) else 0 * out
        )
        features = loss.parts(silent, rows)[1]
        found[path] = float(features[[p for p, _ in loss.pairs].index(path)])
        hook.remove()
    return found


def dominating(run: Run, world: World, sites: list[str], paths: Sequence[str]) -> None:
    seeds = range(world.size.seeds)

    def of(stage: str, kind: str, seed: int) -> float:
        name = f"{kind}, {stage} larger {seed}"
        found: float = run.arm(name, dominated, world, sites, stage, kind, seed, run.work / name)
        return found

    calm = [of("mid_block", "normalized", seed) for seed in seeds]
    mid = [of("mid_block", "vanilla", seed) for seed in seeds]
    rows = [["normalized, whichever is larger", float(np.mean(calm)), 1.0]]
    for path in paths:
        each = mid if path == "mid_block" else [of(path, "vanilla", 0)]
        rows.append(
            [f"vanilla, {path} larger", float(np.mean(each)), float(np.mean(each)) / float(np.mean(calm[: len(each)]))]
        )
    run.table(
        f"Output loss after {world.size.dominated} steps when one stage is scaled by 30",
        ["", "output loss", "over normalized"],
        rows,
    )
    said = Measured.over_seeds([a / b for a, b in zip(mid, calm, strict=True)])
    run.further("vanilla features dominated by the middle, over normalized", "at least 1.3", said, said.at_least(1.3))


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


@torch.no_grad()
def frechet(model: nn.Module, one: Tensor, other: Tensor) -> float:
    """Return the Frechet distance between the inputs of the classifier's last layer on two sets of images."""
    (m1, c1), (m2, c2) = (
        (each.mean(dim=0).numpy(), np.cov(each.double().numpy().T)) for each in (model[:-1](one), model[:-1](other))
    )
    root = sqrtm(c1 @ c2).real
    return float(((m1 - m2) ** 2).sum() + np.trace(c1 + c2 - 2 * root))


def drawing(world: World, sites: list[str], seed: int, out: Path) -> dict[str, Any]:
    """Compare samples of three networks with test digits in the classifier's features, and report its confidence."""
    student = world.pruned(sites)
    config = TrainConfig(
        steps=2 * world.size.steps, lr=5e-4, batch=BATCH, schedule="constant", warmup=0, seed=seed, save_every=10_000
    )
    distil(world.teacher, student, world.pictures, weights=LossWeights(), config=config, out=out)
    knows = judge_of_digits(seed)
    real = torch.stack([torch.from_numpy(each.image[..., 0]) for each in world.pictures.part("test").items])
    real = real[:, None] / 255
    asked = world.pictures.part("test")
    found = {}
    for name, network in (
        ("teacher", world.teacher.network),
        ("pruned", world.pruned(sites)),
        ("pruned and healed", student.eval()),
    ):
        made = generate_images(world.teacher, network, asked, world.size.pictures, seed)
        pixels = torch.from_numpy(made[..., 0])[:, None] / 255
        with torch.no_grad():
            sure = float(knows(pixels).softmax(dim=1).max(dim=1).values.mean())
        found[name] = {"distance": frechet(knows, pixels, real), "sure": sure}
    return found


# The planner on other models


@torch.no_grad()
def of_layers(stack: Stack, inputs: Mapping[str, Tensor]) -> list[float]:
    """Return the output loss of dropping each layer of a stack."""

    def says(model: Any) -> Tensor:
        told: Tensor = model(**inputs).logits
        return told.double()

    original = says(stack.model)
    reference = ModelReference.of(stack)
    found = []
    for layer in range(len(stack)):
        view = apply(stack, Plan(model=reference, drop=[f"layers.{layer}"]))
        found.append(float((says(view) - original).square().mean()))
    return found


def elsewhere(run: Run) -> dict[str, list[float]]:
    """Apply the same measurement to a ViT and to a language model, whose layers have one size."""
    vit = Stack(nano("vit"))
    size = vit.model.config.image_size
    pixels = torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(run.seed))
    if run.quick:
        text, ids = Stack(nano("llama")), torch.arange(3, 67)[None]
    else:
        text = lamella.open("smollm2")
        ids = windows(open_tokenizer("smollm2"), load_text("pydoc", "calibration"), 4, 64, run.seed)
    return {"ViT": of_layers(vit, {"pixel_values": pixels}), text.name: of_layers(text, {"input_ids": ids})}


def experiment(run: Run) -> None:
    world = World.of(run)
    test = len(world.pictures.part("test"))
    run.data = f"scikit-learn's digits, {len(world.pictures)} for measuring and healing, {test} for testing"
    scores = world.scores()
    sites, savings = world.teacher.blocks.sites, world.teacher.blocks.savings()
    run.table(
        "Scores of single blocks",
        ["block", "parameters", "output loss", *(f"time {n} of 4" for n in range(1, 5)), "denoising loss, rise"],
        [[site, savings[site], scores.output[site], *scores.by_time[site], scores.task[site]] for site in sites],
    )
    exact(run, world, scores)
    run.part("additivity", adding, world, scores)
    run.part("criteria", choosing, world, scores)
    half = world.chosen(scores.output, 0.5)
    distilling(run, world, half)
    found = run.arm("drawing", drawing, world, half, run.seed, run.work / "drawing")
    run.table(
        f"{world.size.pictures} images from the same noise, compared with test digits",
        ["", "Frechet distance", "confidence of a classifier"],
        [[name, each["distance"], each["sure"]] for name, each in found.items()],
    )
    teacher, pruned, back = (found[name]["distance"] for name in ("teacher", "pruned", "pruned and healed"))
    ranks = teacher <= back < pruned
    run.main("images", "teacher at least as near as healed, healed nearer than pruned", ranks, ranks)
    layers = run.arm("elsewhere", elsewhere, run)
    for name, values in layers.items():
        count = len(values) // 3
        chosen = covering(values, [64] * len(values), 64 * count).chosen
        same = chosen == tuple(sorted(np.argsort(values)[:count].tolist()))
        run.exact(f"a third of the layers of {name}, all of one size", "those of the smallest scores", same, same)


if __name__ == "__main__":
    raise SystemExit(
        main(experiment, quick="a teacher of 300 steps, one seed, a dozen steps of healing, a nano language model")
    )
