"""TraceNAS at small scale: a character-level Llama that is pruned and retrained, SmolLM2-135M-Instruct for ranks.

The main claim has two parts: over shapes of equal size, Phi predicts the loss after training, and shapes that evolution
finds by Phi are trained to a lower loss than uniform ones of no fewer parameters, over eight searches on two models.
Learning rates are tuned for each kind of shape. The premise is that shapes of one size differ after training by more
than the claim asks. Further checks are that Phi predicts better than the number of parameters, that random search finds
no better shapes than evolution, and that the order of Phi is plausible and stable on a real model.

    python reproductions/tracenas.py            # about an hour on one core; an interrupted run resumes
    python reproductions/tracenas.py --quick    # the same claims on a smaller model, one search, under a minute
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from harness import Run, main
from harness.design import tuned
from harness.measured import LEVEL, Measured
from harness.nano import TEXTS, nats_by_sample, prose, scratch, trained, whole
from scipy.stats import kendalltau, rankdata
from torch import Tensor

import lamella
from lamella.files import Work
from lamella.methods.tracenas import (
    TRAINING,
    Breeding,
    Genome,
    GradientTraces,
    PrunedShape,
    SearchSpace,
    evolve,
    phi,
    recover,
)
from lamella.plan import ModelReference, Plan
from lamella.progress import track
from lamella.report.figures import Bars
from lamella.results import Record
from lamella.search import Memo
from lamella.stack import Stack
from lamella.train import Sample
from lamella.zoo import open_tokenizer

PHI, PARAMETERS = "weighted Pearson (Phi)", "parameters"
KINDS = ("evolved", "random", "uniform")
RATES = [3e-4, 1e-3, 3e-3]  # the model was trained at 3e-3
RATE = 1e-3  # of a quick run, which tunes none
PILOT = 100  # seed of the search whose shapes choose the rates
RESAMPLES = 2000  # of shapes, for intervals of rank correlations
LEAST = 0.02  # nats by which evolved shapes are to be ahead of uniform ones


@dataclass(frozen=True)
class Scale:
    """The size of the experiment.

    Attributes:
        layers: number of layers of a model.
        hidden: its hidden size.
        pretraining: its training steps.
        steps: steps of each recovery.
        length: characters of a sample.
        items: number of test samples.
        rank: rank of the adapters.
        candidates: number of random shapes of each model.
        evaluations: approximate number of evaluations of each search.
    """

    layers: int
    hidden: int
    pretraining: int
    steps: int
    length: int
    items: int
    rank: int
    candidates: int
    evaluations: int
    batch: int = 8

    def text(self, seed: int, count: int = 16000) -> list[Sample]:
        """Return samples to train on."""
        return whole(prose("calibration", count, self.length, seed, TEXTS))

    def held_out(self, use: str) -> list[Sample]:
        """Return samples to choose rates by, or to test on, from two halves of the test texts."""
        part = (0.0, 0.5) if use == "validation" else (0.5, 1.0)
        return whole(prose("test", self.items, self.length, 2, TEXTS, part))

    def base(self, model: int) -> Base:
        """Return a model, from the cache if it was trained before."""
        sizes = {"layers": self.layers, "hidden": self.hidden, "steps": self.pretraining}
        stack = trained(self.text(model), **sizes, seed=model, name=f"tracenas-{self.length}", heads=8, kv_heads=2)
        fewest = self.layers - self.layers // 4
        space = SearchSpace.of(
            stack, params=0.6, tolerance=0.03, min_layers=fewest, attn=(0.25, 1.0), mlp=(0.2, 1.0), multiple=8
        )
        tokens = torch.stack([sample["input_ids"] for sample in self.text(0, 8)])
        return Base(stack, space, tokens, GradientTraces(stack, tokens, rank=self.rank, batch=4))

    def recovered(self, base: Base, cut: PrunedShape, seed: int, use: str, rate: float) -> list[float]:
        """Return the nats per character of each held-out sample after a short recovery of a shape."""
        every = {"save_every": self.steps, "log_every": self.steps}
        config = replace(TRAINING, steps=self.steps, lr=rate, batch=self.batch, seed=seed, **every)
        rows = self.text(1000 + seed, self.steps * self.batch)
        with torch.enable_grad():
            healed = recover(base.stack, base.plan(cut), rows, config=config, work=Work(scratch("tracenas")))
        return nats_by_sample(healed.stack.model.eval(), self.held_out(use))


@dataclass(frozen=True)
class Base:
    """A model with its search space, its calibration tokens, and the traces of the whole model."""

    stack: Stack
    space: SearchSpace
    tokens: Tensor
    traces: GradientTraces

    def plan(self, cut: PrunedShape) -> Plan:
        return plan_of(self.stack, self.space, cut, self.traces)

    def phi(self, cut: PrunedShape) -> float:
        return phi(self.traces.base, self.traces.of(self.plan(cut)), self.space.shares(cut))


def plan_of(stack: Stack, space: SearchSpace, cut: PrunedShape, traces: GradientTraces) -> Plan:
    point = space.point(cut, traces.saliency)
    return Plan(model=ModelReference.of(stack), drop=point.drop, width=point.width)


def samples_of(space: SearchSpace, count: int, seed: int) -> list[PrunedShape]:
    """Return different shapes within the window, without a preference of layers."""
    rng, found = np.random.default_rng(seed), dict[PrunedShape, None]()
    while len(found) < count:
        found[space.cut(space.sample(rng, np.zeros((space.layers, 2))))] = None
    return list(found)


# 1. Searches.


def uniform(space: SearchSpace, least: int) -> PrunedShape:
    """Return the smallest shape with equal widths in all layers that has at least a number of parameters."""
    widths = [
        Genome(np.ones(space.layers, bool), np.full((space.layers, 2), share)) for share in np.linspace(0.2, 1, 801)
    ]
    cuts = list(dict.fromkeys(space.cut(genome) for genome in widths))
    return min((cut for cut in cuts if space.parameters(cut) >= least), key=space.parameters)


def searched(scale: Scale, model: int, seed: int, cache: str) -> dict[str, Any]:
    """Return the best shapes of evolution and of random search, a uniform one, and how they were found.

    Random search scores as many shapes as evolution. The scores of a model are kept in a file for all its searches.
    """
    base, space = scale.base(model), scale.base(model).space
    known = Memo(Path(cache) / f"phi-{model}.jsonl", {"scale": asdict(scale), "model": model})

    def score(cut: PrunedShape) -> float:
        name = str([list(each) for each in cut])
        if name not in known:
            known[name] = base.phi(cut)
        return known[name]

    prior, iterations = base.traces.saliency.sublayers, 1 + (scale.evaluations - 30) // 20
    found = list(evolve(lambda rng: space.sample(rng, prior), space.allows, lambda genome: score(space.cut(genome)),
                        Breeding(space.low, space.high), key=space.cut, iterations=iterations, seed=seed))  # fmt: skip
    evolved = space.cut(max(found, key=lambda each: each.score).genome)
    drawn = samples_of(space, len(found), 1000 + seed)
    shapes = {"evolved": evolved, "random": max(track(drawn, "random search"), key=score),
              "uniform": uniform(space, space.parameters(evolved))}  # fmt: skip
    return {kind: {"shape": list(map(list, cut)), "phi": score(cut), "parameters": space.parameters(cut),
                   "evaluations": len(found)} for kind, cut in shapes.items()}  # fmt: skip


def trained_loss(
    scale: Scale, model: int, shape: Sequence[Sequence[int]], seed: int, use: str, rate: float
) -> list[float]:
    """Return the loss of each held-out sample after the recovery of a shape of a search."""
    keep, heads, channels = shape
    cut = PrunedShape(tuple(map(bool, keep)), tuple(heads), tuple(channels))
    return scale.recovered(scale.base(model), cut, seed, use, rate)


def rates_of(run: Run, scale: Scale) -> dict[str, float]:
    """Return the rate of each kind of shape, chosen by validation on the shapes of a search of its own."""
    if run.quick:
        return dict.fromkeys(KINDS, RATE)
    found = run.arm("pilot search", searched, scale, 0, PILOT, str(run.work))
    scores: dict[str, Callable[[float], float]] = {
        kind: partial(validated, scale, found[kind]["shape"]) for kind in KINDS
    }
    return {kind: each.value for kind, each in tuned(run, scores, RATES).items()}


def validated(scale: Scale, shape: Sequence[Sequence[int]], rate: float) -> float:
    return fmean(trained_loss(scale, 0, shape, PILOT, "validation", rate))


def search(run: Run, scale: Scale, searches: Sequence[tuple[int, int]], rates: dict[str, float]) -> None:
    rows, losses = [], {kind: [] for kind in KINDS}
    for model, seed in searches:
        found = run.arm(f"model {model}, search {seed}", searched, scale, model, seed, str(run.work))
        for kind in KINDS:
            name = f"model {model}, search {seed}, {kind}"
            losses[kind].append(
                run.arm(name, trained_loss, scale, model, found[kind]["shape"], seed, "test", rates[kind])
            )
        rows.append([model, seed, found["evolved"]["evaluations"],
                     *(found[kind][key] for key in ("parameters", "phi") for kind in KINDS),
                     *(fmean(losses[kind][-1]) for kind in KINDS)])  # fmt: skip
    columns = [f"{key}, {kind}" for key in ("parameters", "Phi", "nats") for kind in KINDS]
    title = f"Searches, and nats per character after {scale.steps} steps"
    run.table(title, ["model", "search", "evaluations", *columns], rows)
    evolved, random, even = (np.array(losses[kind]) for kind in KINDS)
    gain = Measured.over_seeds_and_items(even - evolved)
    name = "evolved against uniform of no fewer parameters"
    run.main(name, f"at least {LEAST} nats less", gain, gain.at_least(LEAST))
    gain = Measured.over_seeds_and_items(evolved - random)
    run.further("random search against evolved", "at most 0.01 nats less", gain, gain.at_most(0.01))


# 2. Predictors of the loss after training.


def foretold(scale: Scale, model: int, place: int, rate: float) -> dict[str, Any]:
    """Return the predictors of a random shape before training, and its loss afterwards; larger is better."""
    base = scale.base(model)
    cut = samples_of(base.space, scale.candidates, 2)[place]
    plan, shares, test = base.plan(cut), base.space.shares(cut), scale.held_out("test")
    whole_traces, trace = base.traces.base, base.traces.of(plan)
    known = {
        PHI: phi(whole_traces, trace, shares),
        "Pearson": phi(whole_traces, trace, shares, weighted=False),
        "weighted cosine": phi(whole_traces, trace, shares, "cosine"),
        "weighted dot": phi(whole_traces, trace, shares, "dot"),
        "gradient norm": sum(float(each.norm()) for each in trace.sublayers.values()),
        "loss before training": -fmean(nats_by_sample(lamella.apply(base.stack, plan), test)),
        PARAMETERS: base.space.parameters(cut),
    }
    for count in (1, 2, 4):
        fewer = GradientTraces(base.stack, base.tokens[:count], rank=scale.rank)
        known[f"Phi, {count} of {len(base.tokens)} sequences"] = phi(fewer.base, fewer.of(plan), shares)
    return known | {"healed": -fmean(scale.recovered(base, cut, 0, "test", rate))}


def premise(run: Run, scale: Scale, model: int) -> None:
    """Check that shapes of one size differ after training."""
    places = range(min(scale.candidates, 10))
    losses = [run.arm(f"premise, shape {place}", healed_at, scale, model, place, RATE) for place in places]
    spread = max(losses) - min(losses)
    name = f"validation loss after training of {len(places)} shapes of one size"
    run.premise(name, f"differs by at least {2 * LEAST} nats", spread, spread >= 2 * LEAST)


def healed_at(scale: Scale, model: int, place: int, rate: float) -> float:
    base = scale.base(model)
    cut = samples_of(base.space, scale.candidates, 2)[place]
    return fmean(scale.recovered(base, cut, PILOT, "validation", rate))


def validity(run: Run, scale: Scale, models: Sequence[int], rate: float) -> None:
    """Check the rank correlations of predictors with the result, over random shapes of one size."""
    found = [
        [run.arm(f"model {model}, shape {place}", foretold, scale, model, place, rate)
         for place in range(scale.candidates)]
        for model in models
    ]  # fmt: skip
    values = {name: np.array([[each[name] for each in row] for row in found]) for name in found[0][0]}
    healed = values.pop("healed")
    of = {name: correlations(each, healed) for name, each in values.items()}
    spread = float((healed.max(1) - healed.min(1)).mean())
    correlated = {name: measured(each) for name, each in of.items()}
    rows = [[name, str(each)] for name, each in correlated.items()]
    run.table(
        f"Predictors of the loss after {scale.steps} steps, {scale.candidates} shapes of each of {len(models)} models, "
        f"which differ by {spread:.3f} nats", ["before training", "Spearman with less loss after"], rows,
    )  # fmt: skip
    bars = Bars(
        "before training", "rank correlation with less loss after", {"": [each.figure for each in correlated.values()]},
        tuple(correlated), {"": [(each.low, each.high) for each in correlated.values()]}, horizontal=True,
    )  # fmt: skip
    run.figure("tracenas-predictors", bars)
    rho = correlated[PHI]
    run.main("rank correlation of Phi with less loss after training", "at least 0.5", rho, rho.at_least(0.5))
    gain = measured(of[PHI] - of[PARAMETERS])
    run.further("Phi against the number of parameters", "at least 0.2 more", gain, gain.at_least(0.2))


def correlations(known: np.ndarray, healed: np.ndarray) -> np.ndarray:
    """Return the mean of Spearman's rho over models: of all shapes, then of resamples of the shapes of each model.

    All predictors share the resamples, so that their differences are paired.

    Args:
        known: a predictor `[models, shapes]`.
        healed: what is predicted `[models, shapes]`.
    """
    models, shapes = known.shape
    drawn = np.random.default_rng(0).integers(shapes, size=(RESAMPLES, models, shapes))
    places = np.concatenate([np.tile(np.arange(shapes), (1, models, 1)), drawn])
    ranks = [rankdata(np.take_along_axis(each[None], places, 2), axis=2) for each in (known, healed)]
    a, b = (each - each.mean(2, keepdims=True) for each in ranks)
    norms = np.sqrt((a * a).sum(2) * (b * b).sum(2))
    return np.divide((a * b).sum(2), norms, out=np.zeros_like(norms), where=norms > 0).mean(1)


def measured(found: np.ndarray) -> Measured:
    """Return the first value, with the interval of the others, which are resamples."""
    low, high = np.quantile(found[1:], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Measured(float(found[0]), float(low), float(high))


# 3. A real model.


def real(record: Record, candidates: int, length: int) -> None:
    stack = lamella.open("smollm2")
    tokens = lamella.windows(open_tokenizer("smollm2"), lamella.load_text("pydoc", "calibration"), 4, length, 0)
    space = SearchSpace.of(stack, params=0.75, tolerance=0.03, min_layers=24)
    by_rank = {rank: GradientTraces(stack, tokens, rank=rank) for rank in (4, 8, 64)}
    whole_shape = ((space.whole.heads,) * 30, (space.whole.channels,) * 30)

    def without(*gone: int) -> float:
        cut = PrunedShape(tuple(layer not in gone for layer in range(30)), *whole_shape)
        traces = by_rank[8]
        return phi(traces.base, traces.of(plan_of(stack, space, cut, traces)), space.shares(cut))

    late, early = without(20, 22, 24), without(0, 1, 2)
    measured = f"{late:.2f} / {early:.2f}"
    record.further("SmolLM2: Phi without layers 20, 22, 24 against without 0, 1, 2", "larger", measured, late > early)
    scores: dict[int, list[float]] = {rank: [] for rank in by_rank}
    for cut in track(samples_of(space, candidates, 3), "SmolLM2"):
        for rank, traces in by_rank.items():
            scores[rank].append(phi(traces.base, traces.of(plan_of(stack, space, cut, traces)), space.shares(cut)))
    taus = {pair: float(kendalltau(scores[pair[0]], scores[pair[1]]).statistic) for pair in ((4, 8), (8, 64), (4, 64))}
    record.table(f"SmolLM2: {candidates} shapes at 75 % of the parameters", ["ranks of the adapters", "Kendall"],
                 [[f"{a} and {b}", tau] for (a, b), tau in taus.items()])  # fmt: skip
    record.further(
        "SmolLM2: order of Phi at rank 4 and at rank 64", "Kendall at least 0.6", taus[4, 64], taus[4, 64] >= 0.6
    )


@torch.no_grad()
def experiment(run: Run) -> None:
    quick = run.quick
    scale = Scale(4, 64, 300, 20, 64, 64, 8, 8, 50) if quick else Scale(8, 96, 1200, 150, 128, 256, 64, 36, 300)
    run.data = f"Llamas of {scale.layers} layers, {scale.hidden} wide, on Python's documentation and library"
    models = range(run.seed, run.seed + (1 if quick else 2))
    premise(run, scale, models[0])
    rates = rates_of(run, scale)
    searches = [(model, 10 * model + k) for model in models for k in range(1 if quick else 4)]
    statistic = "mean over searches and test samples of uniform - evolved; mean over models of Spearman's rho of Phi"
    run.freeze(statistic, [seed for _, seed in searches], scale=asdict(scale), searches=searches, rates=rates)
    validity(run, scale, models, rates["uniform"])
    search(run, scale, searches, rates)
    run.part("SmolLM2", real, *((3, 16) if quick else (16, 128)))


if __name__ == "__main__":
    raise SystemExit(main(experiment, quick="a smaller model, one search and fewer steps, under a minute"))
