"""Minitron at small scale: a character-level Llama that is cut and retrained, SmolLM2-135M-Instruct for importance.

The main claim: after equal compute, a model of half the size that learns from its teacher is better than one that
learns from labels, if the text is a small part of the teacher's as in the paper (2 %); and with all of the text, both
are far better than a model from scratch. Learning rates are tuned for each way to train and each amount of text. The
premise is that so little text limits retraining by labels. Further checks are that the advantage shrinks as the text
grows, that the shape which brief training chooses is nearly the best of those of its size, that hidden states help
where half of the layers are gone, and that activations say which neurons matter. Width against depth, and one cut
against two, are recorded.

    python reproductions/minitron.py            # about an hour on one core; an interrupted run resumes
    python reproductions/minitron.py --quick    # too few steps to repeat the text, so a teacher gains less than claimed
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from statistics import fmean
from typing import Any

import numpy as np
import torch
from harness import Run, main
from harness.design import seeds_needed, tuned
from harness.measured import Measured
from harness.nano import TEXTS, nats, nats_by_sample, prose, scratch, taught, trained, whole
from scipy.stats import kendalltau
from torch import Tensor
from transformers import LlamaForCausalLM

import lamella
from lamella.measure import block_influence
from lamella.methods.minitron import (
    TRAINING,
    ModelShape,
    ShapeSpace,
    activation_importance,
    contest,
    minitron,
    rank,
    trim,
)
from lamella.plan import ModelReference, Plan, PlanSeries, Point, materialise
from lamella.report.figures import Bars
from lamella.results import Record
from lamella.stack import Stack
from lamella.stack.wiring import Sizes
from lamella.train import Sample, TrainConfig, distil, own
from lamella.zoo import open_tokenizer

SCARCE, ALL = 0.02, 1.0
FRACTIONS = (SCARCE, 0.1, ALL)  # of the teacher's text; the paper retrains on less than 3 %
WAYS = ("distilled", "labels")
RATES = [3e-4, 1e-3, 3e-3, 1e-2]  # the teacher's was 3e-3, and the authors advise a fifth of it or more
RATE = 1e-3  # of further parts, and of a quick run, which tunes none
PILOT = 100  # seed of the tuning, and the first of the pilot
HALF: dict[str, Any] = {"params": 0.5, "tolerance": 0.08}
LEAST = 0.03  # nats by which a teacher is to be ahead of labels


@dataclass(frozen=True)
class Scale:
    """The size of the experiment.

    Attributes:
        layers: number of layers of the teacher.
        hidden: hidden size of the teacher.
        pretraining: training steps of the teacher.
        steps: steps of distillation; the other ways have more, for equal compute.
        length: characters of a sample.
        items: number of test samples.
    """

    layers: int
    hidden: int
    pretraining: int
    steps: int
    length: int
    items: int
    batch: int = 8

    def teacher(self) -> Stack:
        """Return the teacher, from the cache if it was trained before."""
        train = prose("calibration", 16000, self.length, 0, TEXTS)
        sizes = {"layers": self.layers, "hidden": self.hidden, "steps": self.pretraining}
        return trained(train, **sizes, seed=0, name=f"minitron-{self.length}", heads=8, kv_heads=4)

    def calibration(self) -> Tensor:
        """Return token ids to measure importance on, and to compare shapes on."""
        return torch.stack([each["input_ids"] for each in prose("calibration", 128, self.length, 1, TEXTS)])

    def text(self, fraction: float, seed: int) -> list[Sample]:
        """Return samples from a part of the teacher's text that the seed determines, twice as many as a step count."""
        start = random.Random(seed).uniform(0, 1 - fraction)
        part = (start, start + fraction)
        return whole(prose("calibration", 2 * self.steps * self.batch, self.length, seed, TEXTS, part))

    def held_out(self, use: str) -> list[Sample]:
        """Return samples to choose rates by, or to test on, from two halves of the test texts."""
        part = (0.0, 0.5) if use == "validation" else (0.5, 1.0)
        return whole(prose("test", self.items, self.length, 2, TEXTS, part))

    def plan(self, shape: ModelShape) -> Plan:
        """Return the plan of a shape."""
        return plans_of(self.teacher(), self.calibration(), [shape])[0]

    def longer(self, shape: ModelShape) -> int:
        """Return the number of steps without a teacher that cost as much as :attr:`steps` with its forward pass."""
        space = ShapeSpace.of(self.teacher(), 64)
        student, teacher = space.parameters(shape), space.parameters(space.everything)
        return round(self.steps * (3 * student + teacher) / (3 * student))

    def config(self, rate: float, seed: int = 0, steps: int | None = None) -> TrainConfig:
        """Return the recipe of all ways to train."""
        steps = steps or self.steps
        return replace(TRAINING, steps=steps, lr=rate, batch=self.batch, seed=seed, save_every=steps)


def plans_of(stack: Stack, calibration: Tensor, shapes: Sequence[ModelShape]) -> list[Plan]:
    whole_sizes = sizes_of(stack)
    importance, depth = activation_importance(stack, calibration), block_influence(stack, calibration).values
    ranking = rank(importance, depth, whole_sizes.kv_heads)
    points = [trim(ranking, shape, whole_sizes) for shape in shapes]
    return list(PlanSeries(model=ModelReference.of(stack), points=points))


def sizes_of(stack: Stack) -> Sizes:
    found = ModelReference.of(stack).sizes
    assert found is not None
    return found


def cut_to(stack: Stack, calibration: Tensor, **options: Any) -> PlanSeries:
    with warnings.catch_warnings():  # the method warns from a half on
        warnings.simplefilter("ignore")
        return minitron(stack, calibration, **options)


# 1. A teacher, labels, or training from scratch, at equal compute.


def half_of(scale: Scale) -> dict[str, Any]:
    """Return the shape that the method chooses for half of the parameters, and its contest."""
    found = cut_to(scale.teacher(), scale.calibration(), **HALF).provenance
    return {"shape": found["shapes"][-1], "contest": found["contest"]}


def retrained(
    scale: Scale, shape: ModelShape, fraction: float, way: str, seed: int, use: str, rate: float
) -> list[float]:
    """Return the nats per character of each held-out sample after retraining."""
    teacher, plan, rows = scale.teacher(), scale.plan(shape), scale.text(fraction, seed)
    if way == "distilled":
        config = scale.config(rate, seed)
        with torch.enable_grad():
            model = distil(teacher, plan, rows, config=config, intermediate=False, out=scratch("minitron")).stack.model
    else:
        model = materialise(teacher, plan).model
        own(model)
        if way == "from scratch":
            torch.manual_seed(seed)
            model = LlamaForCausalLM(model.config)
        config = scale.config(rate, seed, scale.longer(shape))
        taught(model, rows, config, trainable=lambda name: True)
    return nats_by_sample(model.eval(), scale.held_out(use))


def validated(scale: Scale, shape: ModelShape, fraction: float, way: str, rate: float) -> float:
    return fmean(retrained(scale, shape, fraction, way, PILOT, "validation", rate))


def rates_of(run: Run, scale: Scale, shape: ModelShape, fraction: float) -> dict[str, tuple[float, float]]:
    """Return for every way to train on a fraction of the text the rate with the lowest loss, and that loss."""
    ways = (*WAYS, "from scratch") if fraction == ALL else WAYS
    scores = {f"{way}, {fraction:.0%} of the text": partial(validated, scale, shape, fraction, way) for way in ways}
    if run.quick:
        return {
            way: (RATE, run.arm(name, score, RATE)) for way, (name, score) in zip(ways, scores.items(), strict=True)
        }
    chosen = tuned(run, scores, RATES)
    return {way: (each.value, each.scores[each.value]) for way, each in zip(ways, chosen.values(), strict=True)}


def pilot_of(scale: Scale, shape: ModelShape, rates: dict[str, float], seed: int) -> float:
    """Return by how much the mean validation loss is higher with labels than with a teacher, with little text."""
    losses = {way: retrained(scale, shape, SCARCE, way, seed, "validation", rates[way]) for way in WAYS}
    return fmean(losses["labels"]) - fmean(losses["distilled"])


def teaching(run: Run, scale: Scale, shape: ModelShape) -> None:
    rates, best = {}, {}
    for fraction in (SCARCE, ALL):
        for way, (rate, loss) in rates_of(run, scale, shape, fraction).items():
            rates[fraction, way], best[fraction, way] = rate, loss
    lack = best[SCARCE, "labels"] - best[ALL, "labels"]
    name = f"validation loss with labels, {SCARCE:.0%} of the text against all of it"
    run.premise(name, "at least 0.03 nats more: the text is scarce", lack, lack >= 0.03)
    if not run.quick:
        rates |= {(0.1, way): rate for way, (rate, _) in rates_of(run, scale, shape, 0.1).items()}

    seeds = range(run.seed, run.seed + 1)
    if not run.quick:
        scarce = {way: rates[SCARCE, way] for way in WAYS}
        pilot = [
            run.arm(f"pilot, seed {seed}", pilot_of, scale, shape, scarce, seed) for seed in range(PILOT, PILOT + 3)
        ]
        count = max(5, seeds_needed(pilot, margin=abs(fmean(pilot) - LEAST), most=8))
        seeds = range(run.seed, run.seed + count)
    named = {f"{way}, {fraction:.0%}": rate for (fraction, way), rate in rates.items()}
    statistic = f"mean over seeds and test samples of labels - distilled, {SCARCE:.0%} of the text, equal compute"
    run.freeze(statistic, seeds, scale=asdict(scale), shape=asdict(shape), longer=scale.longer(shape), rates=named)
    losses = {
        (fraction, way): np.array([
            run.arm(f"{way}, {fraction:.0%} of the text, seed {seed}", retrained, scale, shape, fraction, way, seed,
                    "test", rate) for seed in seeds
        ])
        for (fraction, way), rate in rates.items()
    }  # fmt: skip

    def ahead(worse: str, better: str, fraction: float) -> Measured:
        return Measured.over_seeds_and_items(losses[fraction, worse] - losses[fraction, better])

    test, teacher = scale.held_out("test"), scale.teacher()
    space = ShapeSpace.of(teacher, 64)
    base, untrained = nats(teacher.model, test), nats(lamella.apply(teacher, scale.plan(shape)), test)
    rows = []
    for fraction in sorted({fraction for fraction, _ in losses}):
        means = [float(losses[fraction, way].mean()) for way in WAYS]
        alone = float(losses[ALL, "from scratch"].mean()) if fraction == ALL else ""
        rows.append([f"{fraction:.0%}", *means, alone, str(ahead("labels", "distilled", fraction))])
    run.table(
        f"Half of the parameters left ({space.parameters(shape)} of {space.parameters(space.everything)}), nats per "
        f"character after equal compute: {scale.steps} steps with a teacher, {scale.longer(shape)} without, "
        f"{len(seeds)} seeds (teacher {base:.3f}, pruned and untrained {untrained:.3f})",
        ["of the teacher's text", *WAYS, "from scratch", "labels - distilled"], rows,
    )  # fmt: skip
    ways = [*WAYS, "from scratch"]
    bars = {way: [row[place] or None for row in rows] for place, way in enumerate(ways, start=1)}
    shares = [row[0] for row in rows]
    run.figure("minitron-text", Bars("of the teacher's text", "held-out nats per character", bars, shares))
    gain = ahead("labels", "distilled", SCARCE)
    run.main(f"labels - distilled, {SCARCE:.0%} of the text", f"at least {LEAST} nats", gain, gain.at_least(LEAST))
    for way in WAYS:
        gain = ahead("from scratch", way, ALL)
        run.main(f"from scratch - {way}, all of the text", "at least 0.15 nats", gain, gain.at_least(0.15))
    scarce, plenty = (losses[fraction, "labels"] - losses[fraction, "distilled"] for fraction in (SCARCE, ALL))
    falls = Measured.over_seeds_and_items(scarce - plenty)
    name = f"labels - distilled, {SCARCE:.0%} of the text against all of it"
    run.further(name, "a larger advantage with less text", falls, falls.at_least(0))


# 2. Choice of the shape, width and depth, hidden states, and one cut or two.


def raced(scale: Scale, plans: Sequence[Plan]) -> list[dict[int, float]]:
    """Return the held-out divergence from the teacher of each plan during its distillation on all of the text."""
    config = replace(scale.config(RATE), eval_every=max(scale.steps // 12, 1))
    held_out = scale.held_out("validation")[:32]
    return contest(scale.teacher(), plans, scale.text(ALL, PILOT), held_out, config=config, intermediate=False,
                   out=scratch("minitron"))  # fmt: skip


def described(shape: ModelShape) -> str:
    return f"{shape.layers} layers, {shape.hidden} wide, MLP {shape.mlp}, {shape.heads} heads"


def which_shape(record: Record, scale: Scale, chosen: ModelShape, count: int) -> None:
    """Check practice 9: candidates are ranked after brief training, and the choice is nearly the best in the end."""
    stack, space = scale.teacher(), ShapeSpace.of(scale.teacher(), 64)
    even = space.shortlist(space.near(0.5, {}, HALF["tolerance"]), 2 * count)
    shallow = space.shortlist(space.near(0.5, {"layers": len(stack) - 1}, HALF["tolerance"]), count)
    shapes = list(dict.fromkeys([even[0], chosen, *even[:count], *shallow]))
    curves = raced(scale, plans_of(stack, scale.calibration(), shapes))
    steps = sorted(curves[0])
    final = [curve[steps[-1]] for curve in curves]
    taus = [float(kendalltau([curve[step] for curve in curves], final).statistic) for step in steps]
    shown = [step for step in steps if step in (*steps[:3], *steps[4::4])]
    notes = {even[0]: ": the most even", chosen: ": chosen by the method"}
    rows: list[list[Any]] = [
        [described(shape) + notes.get(shape, ""), space.parameters(shape), *(curve[step] for step in shown)]
        for shape, curve in zip(shapes, curves, strict=True)
    ]
    rows.append([f"Kendall's tau with step {steps[-1]}", "", *(taus[steps.index(step)] for step in shown)])
    columns = ["shape", "parameters", *(f"step {step}" for step in shown)]
    record.table("Shapes of about half of the parameters, held-out divergence in nats", columns, rows)
    kept = final[shapes.index(chosen)]
    lost = kept - min(kl for shape, kl in zip(shapes, final, strict=True) if shape.layers == chosen.layers)
    record.further("the chosen shape against the best of as many layers", "at most 0.01 nats worse", lost, lost <= 0.01)
    if chosen != even[0]:
        apart = final[0] - kept
        record.further("the most even shape against the chosen one", "worse", apart, apart > 0)
    brief = taus[2]
    record.further(f"rank after {steps[2]} steps against rank before training", "agrees better with the final rank",
                   f"{brief:.2f} against {taus[0]:.2f}", brief > taus[0])  # fmt: skip


def without_layers(stack: Stack, calibration: Tensor) -> Plan:
    """Return the plan of half of the layers."""
    sizes = sizes_of(stack)
    return cut_to(stack, calibration, layers=len(stack) // 2, hidden=sizes.hidden, mlp=sizes.channels)[-1]


def width_and_depth(record: Record, scale: Scale) -> None:
    """Report practice 4, with the step at which the curves cross."""
    stack, calibration = scale.teacher(), scale.calibration()
    depth = without_layers(stack, calibration)
    target = lamella.cost(stack, depth).parameters / lamella.cost(stack).parameters
    width = cut_to(stack, calibration, params=target, tolerance=0.05)[-1]
    curves = raced(scale, [width, depth])
    steps = sorted(curves[0])
    ahead = [step for step in steps if curves[0][step] < curves[1][step]]
    rows = [[step, *(curve[step] for curve in curves)] for step in steps]
    parameters = [lamella.cost(stack, plan).parameters for plan in (width, depth)]
    crossing = f"width ahead from step {ahead[0]}" if ahead else "width is never ahead"
    record.table(f"Width against depth, held-out divergence in nats: {crossing}",
                 ["steps", f"width ({parameters[0]})", f"depth ({parameters[1]})"], rows)  # fmt: skip


def student_of(scale: Scale, stack: Stack, plan: Plan, steps: int, **options: Any) -> Stack:
    """Return a student that was distilled from the original teacher on all of the text."""
    with torch.enable_grad():
        healed = distil(stack, plan, scale.text(ALL, PILOT), config=scale.config(RATE, steps=steps),
                        out=scratch("minitron"), **options)  # fmt: skip
    healed.stack.model.eval()
    return healed.stack


def states_inside(record: Record, scale: Scale) -> None:
    """Check practice 6."""
    stack, test = scale.teacher(), scale.held_out("validation")
    plan = without_layers(stack, scale.calibration())
    rows, apart = [], []
    for steps in (scale.steps // 4, scale.steps):
        losses = [nats(student_of(scale, stack, plan, steps, intermediate=inside).model, test)
                  for inside in (False, True)]  # fmt: skip
        apart.append(losses[1] - losses[0])
        rows.append([steps, *losses])
    record.table(f"{len(stack) // 2} of {len(stack)} layers left, nats per character",
                 ["steps", "logits", "logits and hidden states"], rows)  # fmt: skip
    name = f"hidden states too, {rows[0][0]} steps"
    record.further(name, "at most 0.01 nats worse", apart[0], apart[0] <= 0.01)


def twice(record: Record, scale: Scale) -> None:
    """Record one cut to 28 % against one to 55 % and a further one, of the same size and with as many steps."""
    stack, calibration, test = scale.teacher(), scale.calibration(), scale.held_out("validation")
    at_once = cut_to(stack, calibration, params=0.28, tolerance=0.1)[-1]
    one = student_of(scale, stack, at_once, 2 * scale.steps)
    middle = student_of(scale, stack, cut_to(stack, calibration, params=0.55)[-1], scale.steps)
    share = lamella.cost(stack, at_once).parameters / lamella.cost(middle).parameters
    second = student_of(scale, middle, cut_to(middle, calibration, params=share, tolerance=0.1)[-1], scale.steps)
    rows = [
        [name, lamella.cost(each).parameters, nats(each.model, test)]
        for name, each in (("100 % to 28 %", one), ("100 % to 55 % to 28 %", second))
    ]
    title = f"One pruning step or two, {2 * scale.steps} steps of distillation each"
    record.table(title, ["cut", "parameters", "nats per character"], rows)


# 3. Importance, on the real model without training.


def importance(record: Record, quick: bool, seed: int) -> None:
    stack, tokenizer = lamella.open("smollm2"), open_tokenizer("smollm2")
    calibration = lamella.windows(tokenizer, lamella.load_text("pydoc", "calibration"), 2 if quick else 12, 128, seed)
    text = lamella.windows(tokenizer, lamella.load_text("pydoc", "test"), 3, 64 if quick else 256, seed)
    whole_sizes, keep = sizes_of(stack), 1152
    shape = ModelShape(len(stack), whole_sizes.hidden, keep, whole_sizes.heads, whole_sizes.kv_heads)
    dense = perplexity(stack.model, text)
    rows: list[list[Any]] = [["none: the whole model", dense, 1.0]]
    found = {}
    for batch_agg, seq_agg in [("l2", "mean")] if quick else product(("l2", "mean"), ("mean", "l2")):
        scores = activation_importance(stack, calibration, batch_agg=batch_agg, seq_agg=seq_agg)
        ranking = rank(scores, np.ones(len(stack)), whole_sizes.kv_heads)
        found[f"activations, batch {batch_agg}, tokens {seq_agg}"] = cut(stack, trim(ranking, shape, whole_sizes), text)
    chance = {}
    for draw in range(1 if quick else 2):
        generator = torch.Generator().manual_seed(draw)
        orders = [torch.randperm(whole_sizes.channels, generator=generator)[:keep].tolist() for _ in range(len(stack))]
        chance[f"random, seed {draw}"] = cut(stack, neurons(orders), text)
    norms = [layer.mlp.down_proj.weight.norm(dim=0).argsort(descending=True)[:keep].tolist() for layer in stack.layers]
    weights = {"norm of the output weights": cut(stack, neurons(norms), text)}
    rows += [[name, value, value / dense] for name, value in (found | chance | weights).items()]
    record.table(f"SmolLM2-135M-Instruct, MLP {whole_sizes.channels} to {keep} in all layers, no training",
                 ["neurons chosen by", "perplexity", "ratio to the whole model"], rows)  # fmt: skip
    ratio = max(found.values()) / min(chance.values())
    record.further("activations against random neurons", "at most 0.2 times the perplexity", ratio, ratio <= 0.2)
    ratio = max(found.values()) / dense
    record.further("activations against the whole model", "at most 1.6 times the perplexity", ratio, ratio <= 1.6)
    if not quick:
        heads(record, stack, calibration, text, dense)


def heads(record: Record, stack: Stack, calibration: Tensor, text: Tensor, dense: float) -> None:
    """Report head pruning; with three query heads per group there is no claim before retraining."""
    whole_sizes = sizes_of(stack)
    shape = ModelShape(len(stack), whole_sizes.hidden, whole_sizes.channels, 6, 3)
    scores = activation_importance(stack, calibration)
    rows = [["none: the whole model", dense]]
    rows.append(["activations", cut(stack, trim(rank(scores, np.ones(30), 3), shape, whole_sizes), text)])
    for draw in range(2):
        values = np.random.default_rng(draw).random(scores.heads.values.shape)
        drawn = replace(scores, heads=replace(scores.heads, values=values))
        rows.append([f"random, seed {draw}", cut(stack, trim(rank(drawn, np.ones(30), 3), shape, whole_sizes), text)])
    record.table(
        "SmolLM2-135M-Instruct, 9 query heads to 6 in all layers, no training", ["heads chosen by", "perplexity"], rows
    )


def neurons(orders: list[list[int]]) -> Point:
    return Point(width={f"layers.{layer}.mlp.channels": kept for layer, kept in enumerate(orders)})


def cut(stack: Stack, point: Point, text: Tensor) -> float:
    return perplexity(lamella.apply(stack, PlanSeries(model=ModelReference.of(stack), points=[point])[0]), text)


def perplexity(model: Any, text: Tensor) -> float:
    losses = [float(model(row[None], labels=row[None]).loss) for row in text]
    return float(np.exp(np.mean(losses)))


@torch.no_grad()
def experiment(run: Run) -> None:
    quick = run.quick
    run.data = "characters of Python's documentation and library; SmolLM2 tokens of the former"
    scale = Scale(4, 64, 300, 50, 64, 64) if quick else Scale(6, 96, 1500, 300, 128, 256)
    half = run.arm("shape", half_of, scale)
    shape = ModelShape(**half["shape"])
    compared = [[described(ModelShape(**{name: each[name] for name in half["shape"]})), each["kl"]]
                for each in half["contest"]]  # fmt: skip
    run.table("Shapes that the method compared", ["shape", "divergence after its brief training, nats"], compared)
    teaching(run, scale, shape)
    run.part("which shape", which_shape, scale, shape, 2 if quick else 4)
    run.part("importance", importance, quick, run.seed)
    if not quick:
        run.part("states inside", states_inside, scale)
        run.part("width and depth", width_and_depth, scale)
        run.part("twice", twice, scale)


if __name__ == "__main__":
    raise SystemExit(
        main(experiment, quick="a smaller model, one rate, and too few steps to repeat the text; under a minute")
    )
