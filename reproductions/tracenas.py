"""TraceNAS at small scale: a character-level Llama that is pruned and retrained, SmolLM2-135M-Instruct for ranks.

Checks that a trace of the whole model agrees with itself, that the simulation of a pruning is exact and changes no
weight, that Phi predicts the loss after training better than the number of parameters does, that evolution finds shapes
that are trained to a lower loss than uniform ones and than those of random search, and that the order of Phi is
plausible and stable on a real model.

    python reproductions/tracenas.py            # about an hour on one core; an interrupted run resumes
    python reproductions/tracenas.py --quick    # the same claims on a smaller model
"""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Run, main
from harness.measured import Measured
from harness.nano import TEXTS, nats, prose, trained, whole
from scipy.stats import kendalltau, spearmanr
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
from lamella.results import Record
from lamella.stack import Stack
from lamella.train import Sample
from lamella.zoo import open_tokenizer

RATE = 1e-3  # learning rate of the recovery; the model was trained at 3e-3
PROXIES = ("weighted Pearson (Phi)", "Pearson", "weighted cosine", "weighted dot")


@dataclass(frozen=True)
class Job:
    """Common inputs of all parts.

    Attributes:
        steps: number of steps of each recovery.
        evaluations: approximate number of evaluations of each search.
    """

    stack: Stack
    space: SearchSpace
    calibration: Tensor
    train: list[Sample]
    test: list[Sample]
    rank: int
    steps: int
    candidates: int
    evaluations: int
    seeds: range

    def traces(self, **options: Any) -> GradientTraces:
        return GradientTraces(self.stack, self.calibration, **{"rank": self.rank, "batch": 4} | options)

    def plan(self, cut: PrunedShape, traces: GradientTraces) -> Plan:
        return plan_of(self.stack, self.space, cut, traces)

    def recovered(self, plan: Plan, seed: int = 0) -> float:
        """Return the held-out loss after a short recovery, in nats per token."""
        every = {"save_every": self.steps, "log_every": self.steps}
        config = replace(TRAINING, steps=self.steps, lr=RATE, batch=16, seed=seed, **every)
        with tempfile.TemporaryDirectory() as out, torch.enable_grad():
            healed = recover(self.stack, plan, self.train, config=config, work=Work(Path(out)))
        return nats(healed.stack.model.eval(), self.test)


def plan_of(stack: Stack, space: SearchSpace, cut: PrunedShape, traces: GradientTraces) -> Plan:
    point = space.point(cut, traces.saliency)
    return Plan(model=ModelReference.of(stack), drop=point.drop, width=point.width)


def samples_of(space: SearchSpace, count: int, seed: int) -> list[PrunedShape]:
    """Return different shapes within the window, without a preference of layers."""
    rng, found = np.random.default_rng(seed), dict[PrunedShape, None]()
    while len(found) < count:
        found[space.cut(space.sample(rng, np.zeros((space.layers, 2))))] = None
    return list(found)


# 1. Exactness.


def exactness(record: Record, job: Job) -> None:
    stack, traces = job.stack, job.traces()
    before = {name: value.clone() for name, value in stack.model.state_dict().items()}
    ones = np.ones((len(stack), 2))
    itself = phi(traces.base, traces.of(Plan(model=ModelReference.of(stack))), ones)
    record.exact(
        "Phi of the whole model", f"{2 * len(stack)} within 1e-4", itself, abs(itself - 2 * len(stack)) <= 1e-4
    )
    apart = []
    for cut in samples_of(job.space, 5, 1):
        plan = job.plan(cut, traces)
        view = lamella.apply(stack, plan)
        losses = []
        for rows in job.calibration.split(4):
            logits = view(rows).logits[:, :-1].flatten(0, 1)
            losses.append(float(torch.nn.functional.cross_entropy(logits, rows[:, 1:].flatten())))
        apart.append(abs(traces.of(plan).loss - statistics.mean(losses)))
    record.exact(
        "loss of a simulated pruning against the actual pruning", "within 1e-4", max(apart), max(apart) <= 1e-4
    )
    same = all(torch.equal(value, before[name]) for name, value in stack.model.state_dict().items())
    record.exact("weights after all traces", "bitwise equal", same, same)


# 2 and 5. Predictors of the loss after training.


def validity(run: Run, job: Job) -> None:
    traces, counts = job.traces(), (1, 2, 4, len(job.calibration))
    fewer = [GradientTraces(job.stack, job.calibration[:count], rank=job.rank) for count in counts]

    def foretold(cut: PrunedShape) -> dict[str, Any]:
        """Return the predictors of a shape before training, and its loss afterwards; larger is better."""
        plan, shares = job.plan(cut, traces), job.space.shares(cut)
        trace = traces.of(plan)
        known = {
            PROXIES[0]: phi(traces.base, trace, shares),
            PROXIES[1]: phi(traces.base, trace, shares, weighted=False),
            PROXIES[2]: phi(traces.base, trace, shares, "cosine"),
            PROXIES[3]: phi(traces.base, trace, shares, "dot"),
            "gradient norm": sum(float(each.norm()) for each in trace.sublayers.values()),
            "loss before training": -nats(lamella.apply(job.stack, plan), job.test),
            "parameters": job.space.parameters(cut),
        }
        by_samples = [phi(some.base, some.of(plan), shares) for some in fewer]
        return {"known": known, "by samples": by_samples, "healed": -job.recovered(plan)}

    cuts = samples_of(job.space, job.candidates, 2)
    found = [run.arm(f"candidate {place}", foretold, cut) for place, cut in enumerate(cuts)]
    known = {name: [each["known"][name] for each in found] for name in found[0]["known"]}
    by_samples = dict(zip(counts, zip(*(each["by samples"] for each in found), strict=True), strict=True))
    healed = [each["healed"] for each in found]
    rank = {name: float(spearmanr(values, healed).statistic) for name, values in known.items()}
    spread = max(healed) - min(healed)
    run.table(
        f"Predictors of the loss after {job.steps} steps of {len(cuts)} shapes, which differ by {spread:.3f} nats",
        ["before training", "Spearman with less loss after"], [[name, value] for name, value in rank.items()],
    )  # fmt: skip
    run.main("rank correlation of Phi", "at least 0.5", rank[PROXIES[0]], rank[PROXIES[0]] >= 0.5)
    gain = rank[PROXIES[0]] - rank["parameters"]
    run.further("Phi against the number of parameters", "at least 0.2 more", gain, gain >= 0.2)
    every = by_samples[len(job.calibration)]
    rows = [[count, float(kendalltau(values, every).statistic)] for count, values in by_samples.items()]
    run.table("Stability of Phi", ["calibration sequences", "Kendall with all of them"], rows)


# 3. Search.


def uniform(space: SearchSpace) -> PrunedShape:
    """Return the shape in which all layers have equal widths, as close to the middle of the window as possible."""
    middle = sum(space.window) / 2
    widths = [
        Genome(np.ones(space.layers, bool), np.full((space.layers, 2), share)) for share in np.linspace(0.2, 1, 801)
    ]
    cuts = list(dict.fromkeys(space.cut(genome) for genome in widths))
    return min(cuts, key=lambda cut: abs(space.parameters(cut) - middle))


def search(run: Run, job: Job) -> None:
    rows = [run.arm(f"searches, seed {seed}", searched, job, seed) for seed in job.seeds]
    columns = ["seed", "evaluations", "Phi, evolved", "Phi, random", "nats, evolved", "nats, random", "nats, uniform"]
    run.table(f"Searches, and the loss after {job.steps} steps", columns, rows)
    evolved, random, even = ([row[column] for row in rows] for column in (4, 5, 6))
    gain = Measured.over_seeds([a - b for a, b in zip(even, evolved, strict=True)])
    run.main("evolved against uniform", "at least 0.02 nats less", gain, gain.at_least(0.02))
    gain = Measured.over_seeds([a - b for a, b in zip(evolved, random, strict=True)])
    run.further("random search against evolved", "at most 0.01 nats less", gain, gain.at_most(0.01))


def searched(job: Job, seed: int) -> list[float]:
    """Return a table row: scores and losses of evolution and random search, and the loss of the uniform shape."""
    traces, space = job.traces(), job.space
    known: dict[PrunedShape, float] = {}

    def score(genome: Genome) -> float:
        cut = space.cut(genome)
        if cut not in known:
            known[cut] = phi(traces.base, traces.of(job.plan(cut, traces)), space.shares(cut))
        return known[cut]

    prior, iterations = traces.saliency.sublayers, 1 + (job.evaluations - 30) // 20
    found = list(evolve(lambda rng: space.sample(rng, prior), space.allows, score, Breeding(space.low, space.high),
                        key=space.cut, iterations=iterations, seed=seed))  # fmt: skip
    evolved = space.cut(max(found, key=lambda each: each.score).genome)
    rng = np.random.default_rng(1000 + seed)
    drawn = [space.sample(rng, np.zeros_like(prior)) for _ in track(range(len(found)), "random search")]
    random = space.cut(max(drawn, key=score))
    losses = [job.recovered(job.plan(cut, traces), seed) for cut in (evolved, random, uniform(space))]
    return [seed, len(found), max(each.score for each in found), max(map(score, drawn)), *losses]


# 4. A real model.


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
    quick, seed = run.quick, run.seed
    length = 64 if quick else 128
    train = whole(prose("calibration", 1500 if quick else 32000, length, seed, TEXTS))
    test = whole(prose("test", 32 if quick else 128, length, seed + 1, TEXTS))
    sizes = {"layers": 4, "hidden": 64, "steps": 600} if quick else {"layers": 8, "hidden": 128, "steps": 2000}
    stack = trained(train, seed=seed, name="tracenas-pydoc-stdlib", heads=8, kv_heads=2, **sizes)
    space = SearchSpace.of(
        stack, params=0.6, tolerance=0.03, min_layers=3 if quick else 6, attn=(0.25, 1.0), mlp=(0.2, 1.0), multiple=8
    )
    job = Job(
        stack=stack,
        space=space,
        calibration=torch.stack([sample["input_ids"] for sample in train[:8]]),
        train=train,
        test=test,
        rank=8 if quick else 64,
        steps=20 if quick else 150,
        candidates=8 if quick else 40,
        evaluations=50 if quick else 300,
        seeds=range(1 if quick else 3),
    )
    width = stack.config.hidden_size
    run.data = f"a Llama of {len(stack)} layers, {width} wide, on Python's documentation and library"
    run.part("exactness", exactness, job)
    validity(run, job)
    search(run, job)
    run.part("SmolLM2", real, *((3, 16) if quick else (16, 128)))


if __name__ == "__main__":
    raise SystemExit(main(experiment, quick="a smaller model and fewer steps, under a minute"))
