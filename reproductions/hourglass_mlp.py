"""Hourglass MLP at small scale: digits, rendered scenes, frozen lifts, and feed-forward sublayers of trained models.

The main claim: on scikit-learn's digits, mapped to prototypes of their classes, an Hourglass of 19 thousand parameters
is at least 1.5 dB better than conventional networks of equal size, with and without their two square matrices. The
premise is that parameters limit the quality at this size: a conventional network of twice the size is at least 0.5 dB
better. Ablations have a skip connection as narrow as the input or narrower, a frozen lift, and no skip connections. All
three tasks are reported, including those on which the shape loses.

Every shape has its own learning rate, chosen on held-out rows with other seeds; the conventional shapes are chosen
there, too, and all shapes share seeds, data order and test rows. On scenes of 16 x 16 pixels all families have a Pareto
frontier, and frozen lifts of three widths are compared with trained ones. Then the most important feed-forward
sublayers of a nano Llama are replaced by sub-blocks of half the size, fitted and healed, with the same for narrow
networks and for nothing; and one of SmolLM2's by four sub-blocks of the same total size, or by nothing.

    python reproductions/hourglass_mlp.py            # about 80 minutes on one core; an interrupted run resumes
    python reproductions/hourglass_mlp.py --quick    # digits, one task and one seed
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from harness import Run, main
from harness.design import Rate, tuned
from harness.measured import Measured
from harness.nano import TEXTS, nats_by_sample, prose, trained, whole

import lamella
from lamella.data import windows
from lamella.evaluate import FidelityTest
from lamella.files import Work
from lamella.methods.hourglass_mlp import HourglassMLP, Vectors, heal, hourglass_mlp, sensitivity
from lamella.methods.hourglass_mlp.baselines import PlainMLP
from lamella.methods.hourglass_mlp.frontier import TRAINING, train_and_measure
from lamella.methods.hourglass_mlp.method import FITTING
from lamella.plan import ModelReference, Plan
from lamella.report.figures import Scatter
from lamella.runtime import apply
from lamella.stack import Stack
from lamella.train import TrainConfig, blocks
from lamella.zoo import open_tokenizer

RATES = (1.25e-3, 2.5e-3, 5e-3)
CHOOSES = (100, 101)  # seeds with which rates are chosen
LIMITS, GAIN = 0.5, 1.5  # dB: of twice the parameters, and of the shape


@dataclass(frozen=True)
class Shape:
    """A network: its sizes, and which of its linear layers and skips it has."""

    d_x: int
    d_y: int
    d_z: int
    d_h: int
    count: int
    lift: Any = "trained"
    readout: bool = True
    skips: bool = True

    def make(self, seed: int) -> Any:
        torch.manual_seed(seed)
        kind = HourglassMLP if self.skips else PlainMLP
        hidden = (self.d_h,) * self.count
        return kind(self.d_x, self.d_y, self.d_z, hidden, lift=self.lift, readout=self.readout, seed=seed)


def lean(d_h: int, count: int, width: int = 64) -> Shape:
    return Shape(width, width, width, d_h, count, "none", False)


@dataclass(frozen=True)
class Recipe:
    """A task and how networks are trained on it."""

    name: str
    epochs: int
    batch: int = 64
    rows: int = 0  # of scenes

    @property
    def task(self) -> Vectors:
        return Vectors.open(self.name, rows=self.rows) if self.rows else Vectors.open(self.name)


DIGITS = {task: Recipe(f"digits:{task}", 40) for task in ("prototype", "denoise", "upscale")}
MAIN = DIGITS["prototype"]
SCENES = {task: Recipe(f"scenes:{task}", 6, 128, 10_000) for task in ("denoise", "upscale")}


def reached(recipe: Recipe, shape: Shape, seed: int, rate: float) -> list[float]:
    """Return the PSNR on held-out and on test rows, in dB."""
    task = recipe.task
    steps = recipe.epochs * len(task.train) // recipe.batch
    config = replace(
        TRAINING, steps=steps, lr=rate, seed=seed, batch=recipe.batch, eval_every=max(1, steps // 20), log_every=steps
    )
    with tempfile.TemporaryDirectory() as work:
        return train_and_measure(task, shape.make(seed), config, Path(work))


def loss_of(recipe: Recipe, shape: Shape, seeds: Sequence[int], rate: float) -> float:
    """Return minus the PSNR on held-out rows, the mean over seeds."""
    return -fmean(reached(recipe, shape, seed, rate)[0] for seed in seeds)


def chosen(run: Run, recipe: Recipe, shapes: Mapping[str, Shape], seeds: Sequence[int] = CHOOSES) -> dict[str, Rate]:
    """Return the learning rate of each shape, chosen on held-out rows; a fixed one in a quick run."""
    if run.quick:
        return {name: Rate(RATES[1], {RATES[1]: 0.0}) for name in shapes}
    found = tuned(
        run, {f"{recipe.name}, {name}": partial(loss_of, recipe, shape, seeds) for name, shape in shapes.items()}, RATES
    )
    return dict(zip(shapes, found.values(), strict=True))


def compared(
    run: Run, recipe: Recipe, shapes: Mapping[str, Shape], rates: Mapping[str, Rate], seeds: Sequence[int]
) -> dict[str, list[float]]:
    """Return the test PSNR of every seed, by shape."""
    scores, table = {}, []
    for name, shape in shapes.items():
        rate, size = rates[name].value, shape.make(0).size
        scores[name] = found = [
            run.arm(f"{recipe.name}, {name}, seed {seed}", reached, recipe, shape, seed, rate)[1] for seed in seeds
        ]
        table.append([name, size.total, size.trainable, rate, fmean(found), min(found), max(found)])
    run.table(
        f"{recipe.name}: {recipe.epochs} epochs, {len(seeds)} seeds",
        ["", "parameters", "trainable", "rate", "test PSNR, dB", "lowest", "highest"],
        table,
    )
    return scores


def apart(ours: Sequence[float], theirs: Sequence[float]) -> Measured:
    return Measured.over_seeds([a - b for a, b in zip(ours, theirs, strict=True)])


# Digits

OURS = "Hourglass 66 x 10 x 8"
SQUARE = {  # d_x = d_y = 64, around 19 thousand parameters
    OURS: Shape(64, 64, 66, 10, 8),
    "lean 64 x 148 x 1": lean(148, 1),
    "lean 64 x 74 x 2": lean(74, 2),
    "conventional 64 x 84 x 1": Shape(64, 64, 64, 84, 1),
}
CONTROLS = {
    "as narrow as the input, 64 x 10 x 8": Shape(64, 64, 64, 10, 8),
    "narrower, 48 x 16 x 8": Shape(64, 64, 48, 16, 8),
    "narrower, 32 x 28 x 8": Shape(64, 64, 32, 28, 8),
    "narrower, 24 x 40 x 8": Shape(64, 64, 24, 40, 8),
    "frozen lift, 128 x 10 x 4": Shape(64, 64, 128, 10, 4, "frozen"),
    "conventional, frozen lift, 64 x 84 x 1": Shape(64, 64, 64, 84, 1, "frozen"),
    "no skips, 66 x 10 x 8": Shape(64, 64, 66, 10, 8, skips=False),
}
UPSCALED = {
    "Hourglass 66 x 16 x 8": Shape(16, 64, 66, 16, 8),
    "Hourglass 128 x 16 x 4": Shape(16, 64, 128, 16, 4),
    "conventional 16 x 512 x 1": Shape(16, 64, 16, 512, 1),
    "conventional 16 x 256 x 2": Shape(16, 64, 16, 256, 2),
}


def premise(run: Run) -> None:
    """Check that parameters limit the quality on the main task."""
    seeds = CHOOSES[:1] if run.quick else CHOOSES
    small, large = (
        fmean(run.arm(f"premise, {d_h}, {seed}", reached, MAIN, lean(d_h, 2), seed, RATES[1])[0] for seed in seeds)
        for d_h in (74, 148)
    )
    run.premise("digits to prototypes: gain of a lean network of twice the size", f"at least {LIMITS} dB",
                large - small, large - small >= LIMITS)  # fmt: skip


def digits(run: Run, seeds: Sequence[int]) -> None:
    recipe, shapes = (replace(MAIN, epochs=10), SQUARE) if run.quick else (MAIN, SQUARE | CONTROLS)
    rates = chosen(run, recipe, shapes)
    run.freeze("mean over seeds of paired differences of the test PSNR", seeds, epochs=recipe.epochs,
               rates={name: rate.value for name, rate in rates.items()})  # fmt: skip
    scores = compared(run, recipe, shapes, rates, seeds)
    sizes = [shape.make(0).size.total for shape in SQUARE.values()]
    ratio = max(sizes) / min(sizes) - 1
    run.exact("parameters of the networks that are compared", "within 10 %", f"{100 * ratio:.1f} %", ratio <= 0.1)

    def loss(name: str) -> float:
        return min(rates[name].scores.values())

    for family in ("lean", "conventional"):
        best = min((name for name in SQUARE if name.startswith(family)), key=loss)
        gain = apart(scores[OURS], scores[best])
        run.main(f"digits to prototypes: Hourglass over {best}", f"at least {GAIN} dB", gain, gain.at_least(GAIN))
    for name in scores:
        if "narrow" in name:
            gain = apart(scores[OURS], scores[name])
            run.further(f"digits to prototypes: Hourglass over {name}", "above 0 dB", gain, gain.at_least(0.0))


def other_tasks(run: Run, seeds: Sequence[int]) -> None:
    """Report the two tasks on which the shape is not expected to win."""
    for task, shapes in (("denoise", SQUARE | CONTROLS), ("upscale", UPSCALED)):
        compared(run, DIGITS[task], shapes, chosen(run, DIGITS[task], shapes, CHOOSES[:1]), seeds)


# Scenes


def scenes(run: Run, seeds: Sequence[int]) -> None:
    """Report the frontiers at d_x = 256."""
    shapes = {
        "Hourglass": ((258, 40, 4), (384, 40, 4), (384, 90, 4)),
        "frozen": ((258, 40, 4), (384, 90, 4), (512, 90, 4)),
        "conventional": ((0, 270, 1), (0, 540, 1), (0, 540, 2)),
        "lean": ((0, 272, 1), (0, 545, 1), (0, 545, 2)),
    }
    for name, recipe in SCENES.items():
        d_x, made = recipe.task.d_in, {}
        for family, sizes in shapes.items():
            if family == "lean" and d_x != 256:
                continue
            for d_z, d_h, count in sizes:
                width, lift = d_z or d_x, "frozen" if family == "frozen" else "trained"
                shape = lean(d_h, count, 256) if family == "lean" else Shape(d_x, 256, width, d_h, count, lift)
                made[f"{family} {width} x {d_h} x {count}"] = shape
        scores = compared(run, recipe, made, chosen(run, recipe, made, CHOOSES[:1]), seeds)
        if name == "denoise":
            lines: dict[str, list[tuple[float, float]]] = {}
            for each, found in scores.items():
                lines.setdefault(each.split()[0], []).append((made[each].make(0).size.total / 1000, fmean(found)))
            run.figure(
                "hourglass-frontier", Scatter("parameters, thousands", "PSNR on test rows, dB", lines, joined=True)
            )


def lifts(run: Run, seeds: Sequence[int]) -> None:
    """Compare frozen lifts with trained ones, by their width."""
    widths = (256, 384, 768)
    made = {f"{lift} lift, d_z = {d_z}": Shape(256, 256, d_z, 40, 4, lift)
            for lift in ("trained", "frozen") for d_z in widths}  # fmt: skip
    recipe = SCENES["denoise"]
    scores = compared(run, recipe, made, chosen(run, recipe, made, CHOOSES[:1]), seeds)
    frozen = [scores[f"frozen lift, d_z = {d_z}"] for d_z in widths]
    gaps = [[a - b for a, b in zip(scores[f"trained lift, d_z = {d_z}"], cold, strict=True)]
            for d_z, cold in zip(widths, frozen, strict=True)]  # fmt: skip
    grows, shrinks = apart(frozen[-1], frozen[0]), apart(gaps[0], gaps[-1])
    run.further("frozen lift: three times as wide over as wide as the input", "above 0 dB", grows, grows.at_least(0))
    run.further("gap to a trained lift: as wide as the input over three times", "above 0 dB", shrinks,
                shrinks.at_least(0))  # fmt: skip


# A nano Llama

LAYERS, HIDDEN, TIME = 4, 96, 96  # and characters per sample
REPLACED = 2  # feed-forward sublayers, those that matter most
MATTERS = 0.05  # nats that their removal must cost after healing, for the ways to differ
OURS_IN_PLACE = "4 sub-blocks"
FITTED = {OURS_IN_PLACE: 4, "2 sub-blocks": 2, "one narrow network, fitted": 1}  # and how many sub-blocks
WAYS = (*FITTED, "one narrow network, cut", "nothing")


def operated(way: str, seed: int) -> dict[str, list[float]]:
    """Return the loss of each test passage in nats per character: original, before healing and after."""
    texts = whole(prose("calibration", 2000, TIME, 0, TEXTS))
    test = whole(prose("test", 200, TIME, 1, TEXTS))
    stack = trained(texts, layers=LAYERS, hidden=HIDDEN, steps=800, seed=seed, name="hourglass", batch=8)
    with tempfile.TemporaryDirectory() as work:
        tokens = torch.stack([each["input_ids"] for each in texts[:530]])  # 51 thousand tokens
        plan = rewritten(stack, way, tokens, seed, Path(work) / "fitted")
        config = TrainConfig(steps=150, lr=5e-4, batch=8, seed=seed, save_every=150)
        done = heal(stack, plan, texts, config=config, work=Work(Path(work) / "healed"))  # type: ignore[arg-type]
        views = {"original": stack.model, "before": apply(stack, plan), "after": apply(done.stack, done.plan)}
        return {name: nats_by_sample(view, test) for name, view in views.items()}


def surgery(run: Run, seeds: Sequence[int]) -> None:
    """Replace the most important feed-forward sublayers at half of the parameters, and heal all variants alike."""
    found = {way: [run.arm(f"nano, {way}, seed {seed}", operated, way, seed) for seed in seeds] for way in WAYS}
    losses = {way: {name: np.array([one[name] for one in each]) for name in each[0]} for way, each in found.items()}
    run.table(
        f"The {REPLACED} most important of {LAYERS} feed-forward sublayers at half their parameters, 150 steps of "
        f"healing: nats per character over {len(seeds)} seeds",
        ["in their place", "original", "before healing", "after healing"],
        [[way, *(each.mean() for each in losses[way].values())] for way in WAYS],
    )
    lost = Measured.over_seeds_and_items(losses["nothing"]["after"] - losses["nothing"]["original"])
    run.further("cost of their removal after healing", f"at least {MATTERS} nats", lost, lost.at_least(MATTERS))
    if not lost.at_least(MATTERS):  # then the ways cannot be told apart
        return
    for other in WAYS[2:]:
        gain = Measured.over_seeds_and_items(losses[other]["after"] - losses[OURS_IN_PLACE]["after"])
        run.further(f"after healing: {other} less 4 sub-blocks", "above 0 nats", gain, gain.at_least(0))


def rewritten(stack: Stack, way: str, tokens: Any, seed: int, work: Path) -> Plan:
    """Return the plan of one variant, at the most important sublayers."""
    missed = sensitivity(stack, tokens[:16])
    layers = tuple(sorted(each.layer for each in sorted(missed, key=missed.__getitem__)[-REPLACED:]))
    if way == "nothing":
        return Plan(model=ModelReference.of(stack), drop=[f"layers.{layer}.mlp" for layer in layers])
    if way == "one narrow network, cut":
        width = {f"layers.{layer}.mlp.channels": largest(stack, layer, 0.5) for layer in layers}
        return Plan(model=ModelReference.of(stack), width=width)
    config = replace(FITTING, steps=1000, seed=seed, eval_every=250, save_every=1000)
    made = hourglass_mlp(stack, tokens, layers=layers, blocks=FITTED[way], share=0.5, config=config, work=Work(work))
    return made.plan


def largest(stack: Stack, layer: int, share: float) -> list[int]:
    """Return the channels of a feed-forward network whose weights have the largest product of norms."""
    mlp = stack.layers[layer].mlp
    size = mlp.down_proj.weight.norm(dim=0) * mlp.up_proj.weight.norm(dim=1) * mlp.gate_proj.weight.norm(dim=1)
    return sorted(size.topk(round(share * len(size))).indices.tolist())


# SmolLM2


def smollm2(run: Run) -> None:
    """Replace one sublayer of 2.65 million parameters by four sub-blocks of equal total size, fitted to 200k tokens."""
    stack, tokenizer = lamella.open("smollm2"), open_tokenizer("smollm2")
    site, work = "layers.15.mlp", run.work / "smollm2"
    tokens = windows(tokenizer, lamella.load_text("general", "calibration"), 782, 256, run.seed)
    config = TrainConfig(steps=40, lr=1e-4, warmup=0.1, batch=2, seed=run.seed, save_every=20)

    def found(way: str) -> dict[str, Any]:
        judged = FidelityTest(stack, windows(tokenizer, lamella.load_text("pydoc", "test"), 8, 256, run.seed))
        plan, sublayer = Plan(model=ModelReference.of(stack), drop=[site]), None
        if way == "4 sub-blocks":
            fitting = replace(FITTING, seed=run.seed)
            done = hourglass_mlp(stack, tokens, layers=(15,), blocks=4, config=fitting, work=Work(work / "fitted"))
            plan, sublayer = done.plan, done.findings["sublayers"][0]
        before = judged.of(apply(stack, plan)).as_dict()
        samples: Any = blocks(tokens, loss_on="all")
        healed = heal(stack, plan, samples, config=config, work=Work(work / way.replace(" ", "-")))
        return {"sublayer": sublayer, "fitted": before, "healed": judged.of(apply(healed.stack, healed.plan)).as_dict()}

    each = {way: run.arm(f"SmolLM2, {way}", found, way) for way in ("4 sub-blocks", "nothing")}
    sublayer = each["4 sub-blocks"]["sublayer"]
    before = each["nothing"]["fitted"]["base_perplexity"]["mean"]
    lines: list[list[Any]] = [["the original", sublayer["before"], before, 0.0, None, None]]
    for way, parameters in (("4 sub-blocks", sublayer["parameters"]), ("nothing", 0)):
        figures = [each[way][when][what]["mean"] for when in ("fitted", "healed") for what in ("perplexity", "kl")]
        lines.append([way, parameters, *figures])
    run.table(
        f"SmolLM2-135M, the feed-forward sublayer of layer 15 by {len(sublayer['inner'])} sub-blocks of inner width "
        f"{sublayer['inner'][0]}; {config.steps} steps of healing",
        ["in its place", "parameters", "perplexity, fitted", "KL, fitted", "perplexity, healed", "KL, healed"],
        lines,
    )
    explained = sublayer["explained"]["held_out"]
    run.further("R^2 of the sub-blocks on held-out tokens", "above 0", f"{explained:.3f}", explained > 0)
    ours, theirs = (each[way]["healed"]["kl"]["mean"] for way in ("4 sub-blocks", "nothing"))
    run.further("after healing: KL of 4 sub-blocks", f"below {theirs:.3f}, of nothing", f"{ours:.3f}", ours < theirs)


def experiment(run: Run) -> None:
    run.data = "scikit-learn's digits, 1100 to train, 200 to choose on, 497 to judge" + (
        "" if run.quick else "; 10 thousand rendered scenes of 16 x 16; pydoc and stdlib; general and pydoc for SmolLM2"
    )
    premise(run)
    seeds = range(run.seed, run.seed + (1 if run.quick else 10))
    digits(run, seeds)
    if not run.quick:
        other_tasks(run, seeds[:3])
        scenes(run, seeds[:3])
        lifts(run, seeds[:3])
        surgery(run, seeds[:5])
        smollm2(run)


if __name__ == "__main__":
    raise SystemExit(main(experiment, quick="digits to prototypes alone, one seed"))
