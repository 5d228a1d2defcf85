"""Minitron at small scale: a character-level Llama that is cut and retrained, SmolLM2-135M-Instruct for importance.

Checks that cutting is exact, that activations say which neurons matter, that a pruned model learns more from its
teacher than from labels and both more than from scratch, whether states inside help where half of the depth is gone,
and that a short training ranks shapes better than none. Width against depth, and one cut against two, are recorded.

    python reproductions/minitron.py            # about an hour on 2 cores; an interrupted run resumes
    python reproductions/minitron.py --quick    # the same claims on a smaller model
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from types import MethodType
from typing import Any

import numpy as np
import torch
from harness import Run, main
from harness.measured import Measured
from harness.nano import TEXTS, nats, prose, taught, trained, whole
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
from lamella.plan import HeadWidth, HiddenWidth, ModelReference, Plan, PlanSeries, Point, materialise
from lamella.results import Record
from lamella.stack import Stack
from lamella.stack.wiring import Sizes
from lamella.train import Sample, TrainConfig, collate, distil, distillation_loss, own
from lamella.zoo import open_tokenizer

RATES = (1e-3, 3e-3)  # learning rates of students: the teacher's was 3e-3, and the authors advise a fifth of it or more
RATE = RATES[0]  # the rate without a search


@dataclass(frozen=True)
class Job:
    """The models, data and settings that all parts share.

    Attributes:
        validation: held-out part of the training text, on which learning rates are chosen.
        steps: training steps of a student.
        ranks: steps after which candidates are compared; the last is the reference.
        seeds: random seeds of the comparison with labels.
    """

    teacher: Stack
    calibration: Tensor
    train: list[Sample]
    validation: list[Sample]
    test: list[Sample]
    steps: int
    ranks: tuple[int, ...]
    seeds: range
    batch: int


# 1. Exactness.


def exactness(record: Record, job: Job) -> None:
    """Check point 1. Cuts are compared in float64, since logits around 20 leave only about 1e-5 of float32 rounding."""
    stack, ids = job.teacher, job.calibration[:2, :48]
    whole_sizes = sizes_of(stack)
    drawn = torch.Generator().manual_seed(0)

    def shuffled(count: int) -> list[int]:
        return torch.randperm(count, generator=drawn).tolist()

    group = whole_sizes.heads // whole_sizes.kv_heads
    order = {"hidden.channels": HiddenWidth(keep=shuffled(whole_sizes.hidden))}
    for layer in range(len(stack)):
        heads = shuffled(whole_sizes.heads)
        order[f"layers.{layer}.attn.heads"] = HeadWidth(keep=heads, kv_of=[head // group for head in heads])
        order[f"layers.{layer}.mlp.channels"] = shuffled(whole_sizes.channels)
    exact = Stack(in_float64(stack.model))
    apart = difference(exact, Plan(model=ModelReference.of(exact), width=order), ids)
    record.exact("every axis reordered", "logits within 1e-6", apart, apart <= 1e-6)

    count = int(0.3 * whole_sizes.channels)
    neurons, heads_gone = shuffled(whole_sizes.channels)[:count], [group * g for g in range(whole_sizes.kv_heads)]
    channels = shuffled(whole_sizes.hidden)[: whole_sizes.hidden // 5]
    silent = copy.deepcopy(exact.model)
    for layer in silent.model.layers:
        layer.mlp.up_proj.weight[neurons] = 0
    keep = left(whole_sizes.channels, neurons)
    apart = difference(Stack(silent), of_layers(Stack(silent), "mlp.channels", keep), ids)
    record.exact("30 % of the neurons silent, then removed", "logits within 1e-5", apart, apart <= 1e-5)
    silent = copy.deepcopy(exact.model)
    for layer in silent.model.layers:
        for head in heads_gone:
            layer.self_attn.o_proj.weight[:, head * whole_sizes.head_dim : (head + 1) * whole_sizes.head_dim] = 0
    kept_heads = left(whole_sizes.heads, heads_gone)
    kept = HeadWidth(keep=kept_heads, kv_of=[head // group for head in kept_heads])
    apart = difference(Stack(silent), of_layers(Stack(silent), "attn.heads", kept), ids)
    record.exact("one query head of each group silent, then removed", "logits within 1e-5", apart, apart <= 1e-5)
    silent = copy.deepcopy(exact.model)
    silent.model.embed_tokens.weight[:, channels] = 0
    for layer in silent.model.layers:
        layer.self_attn.o_proj.weight[channels] = 0
        layer.mlp.down_proj.weight[channels] = 0
    for rescale in (True, False):
        width = {"hidden.channels": HiddenWidth(keep=left(whole_sizes.hidden, channels), rescale=rescale)}
        view = lamella.apply(Stack(silent), Plan(model=ModelReference.of(Stack(silent)), width=width))
        if not rescale:  # the paper's pruning, with the norms corrected by hand
            ratio = whole_sizes.hidden / (whole_sizes.stream - len(channels))
            for norm in [module for module in view.modules() if hasattr(module, "variance_epsilon")]:
                norm.weight.mul_(ratio**0.5)
                norm.variance_epsilon *= ratio
        apart = float((view(ids).logits - silent(ids).logits).abs().max())
        name = "norms rescaled" if rescale else "plain, gains and epsilon corrected by hand"
        record.exact(
            f"silent channels of the residual stream removed, {name}", "logits within 1e-5", apart, apart <= 1e-5
        )

    loud = copy.deepcopy(stack.model)
    quietest = int(activation_importance(stack, job.calibration).heads.values[1].reshape(-1, group).sum(-1).argmin())
    rows = slice(quietest * whole_sizes.head_dim, (quietest + 1) * whole_sizes.head_dim)
    loud.model.layers[1].self_attn.v_proj.weight[rows] *= 30
    first = int(
        rank(activation_importance(Stack(loud), job.calibration), np.ones(len(stack)), whole_sizes.kv_heads).groups[
            1, 0
        ]
    )
    record.exact("a group of heads made louder", f"first of its layer: {quietest}", first, first == quietest)

    batch = collate(job.test[:4])
    itself = copy.deepcopy(stack.model)
    with torch.enable_grad():
        loss = distillation_loss(itself, batch, teacher=stack.model)
        loss.backward()  # type: ignore[union-attr]
    slope = max(float(parameter.grad.abs().max()) for parameter in itself.parameters() if parameter.grad is not None)
    record.exact(
        "divergence of the teacher from itself",
        "0, gradient within 1e-6",
        f"{loss.item()}, {slope:.2g}",  # type: ignore[union-attr]
        loss.item() == 0 and slope <= 1e-6,
    )  # type: ignore[union-attr]


def sizes_of(stack: Stack) -> Sizes:
    found = ModelReference.of(stack).sizes
    assert found is not None
    return found


def left(count: int, gone: Sequence[int]) -> list[int]:
    return [each for each in range(count) if each not in set(gone)]


def of_layers(stack: Stack, site: str, kept: Any) -> Plan:
    width = {f"layers.{layer}.{site}": kept for layer in range(len(stack))}
    return Plan(model=ModelReference.of(stack), width=width)


def difference(stack: Stack, plan: Plan, ids: Tensor) -> float:
    return float((lamella.apply(stack, plan)(ids).logits - stack.model(ids).logits).abs().max())


def in_float64(model: Any) -> Any:
    """Return a copy whose norms compute in float64, unlike the original's float32, so that no rounding is left."""
    exact = copy.deepcopy(model).double()

    def norm(self: Any, h: Tensor) -> Tensor:
        return self.weight * h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.variance_epsilon)

    for module in exact.modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = MethodType(norm, module)
    return exact


# 2. Importance, on the real model without training.


def importance(record: Record, quick: bool, seed: int) -> None:
    stack, tokenizer = lamella.open("smollm2"), open_tokenizer("smollm2")
    calibration = lamella.windows(tokenizer, lamella.load_text("pydoc", "calibration"), 2 if quick else 12, 128, seed)
    text = lamella.windows(tokenizer, lamella.load_text("pydoc", "test"), 3, 64 if quick else 256, seed)
    whole_sizes, keep = sizes_of(stack), 1152
    shape = ModelShape(len(stack), whole_sizes.hidden, keep, whole_sizes.heads, whole_sizes.kv_heads)
    dense = perplexity(stack.model, text)
    rows: list[list[Any]] = [["none: the whole model", dense, 1.0]]
    found = {}
    for batch_agg, seq_agg in (
        [("l2", "mean")] if quick else [("l2", "mean"), ("mean", "mean"), ("l2", "l2"), ("mean", "l2")]
    ):
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
    worst, best_chance = max(found.values()), min(chance.values())
    record.further(
        "activations against random neurons",
        "at most 0.2 times the perplexity",
        worst / best_chance,
        worst <= 0.2 * best_chance,
    )
    record.further(
        "activations against the whole model", "at most 1.6 times the perplexity", worst / dense, worst <= 1.6 * dense
    )
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


# 3. A teacher, labels, or training from scratch, at equal compute.


def teaching(run: Run, job: Job) -> None:
    with warnings.catch_warnings():  # the method warns from a half on
        warnings.simplefilter("ignore")
        plan = minitron(job.teacher, job.calibration, params=0.5, tolerance=0.08)[-1]
    small = sum(p.numel() for p in lamella.apply(job.teacher, plan).parameters())
    large = sum(p.numel() for p in job.teacher.model.parameters())
    longer = round(job.steps * (3 * small + large) / (3 * small))  # the student forward and back, the teacher's forward

    def with_labels(rate: float, seed: int) -> Any:
        student = materialise(job.teacher, plan).model
        own(student)
        return by_labels(job, student, longer, rate, seed)

    def from_scratch(rate: float, seed: int) -> Any:
        torch.manual_seed(seed)
        return by_labels(job, LlamaForCausalLM(materialise(job.teacher, plan).model.config), longer, rate, seed)

    ways = {
        "distilled": lambda rate, seed: student_of(job, plan, seed, lr=rate).model,
        "labels": with_labels,
        "from scratch": from_scratch,
    }

    def judged(way: str, rate: float, seed: int) -> list[float]:
        model = ways[way](rate, seed)
        return [nats(model, job.validation), nats(model, job.test)]

    def arm(way: str, rate: float, seed: int) -> list[float]:
        return run.arm(f"{way} at {rate:g}, seed {seed}", judged, way, rate, seed)

    rates, losses = [], {}
    first, *others = job.seeds
    for way in ways:
        tried = {rate: arm(way, rate, first) for rate in (RATES[:1] if run.quick else RATES)}
        best = min(tried, key=lambda rate: tried[rate][0])
        losses[way] = [tried[best][1], *(arm(way, best, seed)[1] for seed in others)]
        rates.append([way, *(validation for validation, _ in tried.values())])
    run.table(
        "Nats per token on the validation split, by learning rate; each variant takes its best",
        ["", *(f"{rate:g}" for rate in tried)], rates,
    )  # fmt: skip
    rows: list[list[Any]] = [list(row) for row in zip(job.seeds, *losses.values(), strict=True)]
    rows.append(["mean", *map(fmean, losses.values())])
    untrained, base = nats(lamella.apply(job.teacher, plan), job.test), nats(job.teacher.model, job.test)
    run.table(
        f"Half of the parameters left ({small} of {large}), nats per token after equal compute: {job.steps} steps with "
        f"a teacher, {longer} without (teacher {base:.3f}, pruned and untrained {untrained:.3f})",
        ["seed", *losses], rows,
    )  # fmt: skip
    for worse, better, least in (
        ("labels", "distilled", 0.03), ("from scratch", "distilled", 0.15), ("from scratch", "labels", 0.15)
    ):  # fmt: skip
        gain = Measured.over_seeds([a - b for a, b in zip(losses[worse], losses[better], strict=True)])
        run.main(f"{worse} - {better}", f"at least {least} nats", gain, gain.at_least(least))


def distilled(job: Job, plan: Plan, seed: int = 0, teacher: Stack | None = None, **options: Any) -> float:
    """Return the nats per token on test text after distillation."""
    return nats(student_of(job, plan, seed, teacher, **options).model, job.test)


def student_of(job: Job, plan: Plan, seed: int = 0, source: Stack | None = None, **options: Any) -> Stack:
    training = {name: options.pop(name) for name in ("intermediate", "temperature", "teacher") if name in options}
    config = replace(TRAINING, seed=seed, **{"steps": job.steps, "lr": RATE, "batch": job.batch} | options)
    config = replace(config, save_every=config.steps)
    with tempfile.TemporaryDirectory() as out, torch.enable_grad():
        healed = distil(source or job.teacher, plan, job.train, config=config, out=Path(out), **training)
    healed.stack.model.eval()
    return healed.stack


def by_labels(job: Job, model: Any, steps: int, lr: float, seed: int) -> Any:
    config = TrainConfig(steps=steps, lr=lr, warmup=0.1, batch=job.batch, seed=seed)
    return taught(model, job.train, config, trainable=lambda name: True)


# 4 to 7. Width and depth, hidden states, choice of shape, and one cut or two.


def width_and_depth(record: Record, job: Job) -> None:
    """Report practice 4, with the step at which the curves cross."""
    stack, space = job.teacher, ShapeSpace.of(job.teacher, 64)
    layers = len(stack) // 2
    depth = minitron(stack, job.calibration, layers=layers, hidden=space.whole.hidden, mlp=space.whole.channels)[-1]
    target = lamella.cost(stack, depth).parameters / lamella.cost(stack).parameters
    width = minitron(stack, job.calibration, params=target, tolerance=0.05)[-1]
    curves = raced(job, [width, depth])
    steps = sorted(curves[0])
    ahead = [step for step in steps if curves[0][step] < curves[1][step]]
    rows = [[step, *(curve[step] for curve in curves)] for step in steps]
    parameters = [lamella.cost(stack, plan).parameters for plan in (width, depth)]
    crossing = f"width ahead from step {ahead[0]}" if ahead else "width is never better"
    record.table(f"Width against depth, held-out divergence in nats: {crossing}",
                 ["steps", f"width ({parameters[0]})", f"depth ({parameters[1]})"], rows)  # fmt: skip


def raced(job: Job, plans: list[Plan]) -> list[dict[int, float]]:
    """Return the held-out divergence of each plan during training, on the grid of :attr:`Job.ranks`."""
    config = replace(TRAINING, steps=job.ranks[-1], lr=RATE, batch=job.batch, save_every=job.ranks[1])
    held_out = job.test[: 2 * job.batch]
    with tempfile.TemporaryDirectory() as out, torch.enable_grad():
        return contest(job.teacher, plans, job.train, held_out, config=config, intermediate=False, out=Path(out))


def states_inside(record: Record, job: Job) -> None:
    """Check practice 6."""
    stack, layers = job.teacher, len(job.teacher) // 2
    sizes = sizes_of(stack)
    plan = minitron(stack, job.calibration, layers=layers, hidden=sizes.hidden, mlp=sizes.channels)[-1]
    rows, apart = [], []
    for steps in (job.steps // 4, job.steps):
        losses = [distilled(job, plan, steps=steps, intermediate=inside) for inside in (False, True)]
        apart.append(losses[1] - losses[0])
        rows.append([steps, *losses])
    record.table(
        f"{layers} of {len(stack)} layers left, nats per token", ["steps", "logits", "logits and hidden states"], rows
    )
    record.further(f"hidden states too, {rows[0][0]} steps", "at most 0.01 nats worse", apart[0], apart[0] <= 0.01)


def which_shape(record: Record, job: Job, count: int) -> None:
    """Check practice 9: rank candidates near one budget after a short training."""
    stack = job.teacher
    space = ShapeSpace.of(stack, 64)
    depths = range(len(stack), len(stack) - len(stack) // 4 - 1, -1)
    near = [shape for layers in depths for shape in space.near(0.55, {"layers": layers}, 0.05)]
    shapes = [near[index] for index in np.linspace(0, len(near) - 1, min(count, len(near))).round().astype(int)]
    ranking = rank(activation_importance(stack, job.calibration), block_influence(stack, job.calibration).values,
                   space.whole.kv_heads)  # fmt: skip
    points = [trim(ranking, shape, space.whole) for shape in shapes]
    plans = list(PlanSeries(model=ModelReference.of(stack), points=points))
    curves = raced(job, plans)
    final = [curve[job.ranks[-1]] for curve in curves]
    taus = {step: float(kendalltau([curve[step] for curve in curves], final).statistic) for step in job.ranks[:-1]}
    rows = [
        [f"{shape.layers} layers, {shape.hidden} wide, MLP {shape.mlp}, {shape.heads} heads", space.parameters(shape),
         *(curve[step] for step in job.ranks)]
        for shape, curve in zip(shapes, curves, strict=True)
    ]  # fmt: skip
    rows.append([f"Kendall's tau with step {job.ranks[-1]}", "", *taus.values(), 1.0])
    columns = ["shape", "parameters", *(f"step {step}" for step in job.ranks)]
    record.table("Candidates within 5 % of 55 % of the parameters, held-out divergence in nats", columns, rows)
    short, none = taus[job.ranks[-2]], taus[0]
    record.further(
        f"rank after {job.ranks[-2]} steps against rank before training",
        "agrees better with the final rank",
        f"{short:.2f} against {none:.2f}",
        short > none,
    )


def twice(record: Record, job: Job) -> None:
    """Compare one cut to 28 % with one to 55 % and a further one, at equal tokens.

    The original model is the teacher both times.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        at_once = minitron(job.teacher, job.calibration, params=0.28, tolerance=0.1)[-1]
    half = minitron(job.teacher, job.calibration, params=0.55)[-1]
    one = distilled(job, at_once, steps=2 * job.steps)
    middle = student_of(job, half)
    share = lamella.cost(job.teacher, at_once).parameters / lamella.cost(middle).parameters
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = minitron(middle, job.calibration, params=share, tolerance=0.1)[-1]
    second = student_of(job, again, source=middle)
    rows = [
        ["100 % to 28 %", lamella.cost(job.teacher, at_once).parameters, one],
        ["100 % to 55 % to 28 %", lamella.cost(second).parameters, nats(second.model, job.test)],
    ]
    record.table("One pruning step or two, at equal tokens", ["cut", "parameters", "nats per token"], rows)


@torch.no_grad()
def experiment(run: Run) -> None:
    run.data = "characters of Python's documentation and library; SmolLM2 tokens of the former"
    quick, seed = run.quick, run.seed
    length = 64 if quick else 128
    train = whole(prose("calibration", 1500 if quick else 32000, length, seed, TEXTS))
    validation = whole(prose("calibration", 32 if quick else 128, length, seed + 2, TEXTS))
    test = whole(prose("test", 32 if quick else 128, length, seed + 1, TEXTS))
    sizes = {"layers": 4, "hidden": 64, "steps": 600} if quick else {"layers": 6, "hidden": 192, "steps": 2000}
    teacher = trained(train, seed=seed, name="minitron-pydoc-stdlib", heads=8, kv_heads=4, **sizes)
    calibration = torch.stack([sample["input_ids"] for sample in train[: 16 if quick else 64]])
    job = Job(
        teacher=teacher,
        calibration=calibration,
        train=train,
        validation=validation,
        test=test,
        steps=60 if quick else 300,
        ranks=(0, 20, 60) if quick else (0, 50, 100, 300),
        seeds=range(seed, seed + (1 if quick else 3)),
        batch=8,
    )
    run.part("exactness", exactness, job)
    run.part("importance", importance, quick, seed)
    teaching(run, job)
    run.part("states inside", states_inside, job)
    run.part("which shape", which_shape, job, 6 if quick else 10)
    if not quick:  # these are reported without claims
        run.part("width and depth", width_and_depth, job)
        run.part("twice", twice, job)


if __name__ == "__main__":
    raise SystemExit(main(experiment, quick="a smaller model, fewer steps and one rate, under a minute"))
