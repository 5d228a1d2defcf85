"""MoDES at small scale: nano Qwen3-VL-MoEs that answer questions about rendered shapes, and skip experts.

Eight models of twelve layers of eight experts, four per token, are trained on rendered shapes of up to two objects, of
which those of one kind look alike; an image is 16 tokens, each four patches. The main claim: the walk along the edge
finds the optimum of the whole grid of thresholds, in three of the models; with half of all (token, expert) pairs
skipped, the answers change less than with one threshold on router weights alone and far less than by random skips, and
the accuracy is at least 0.97 times the model's. Changes of the answers are KL divergences, which differ between models
by orders of magnitude: rules are compared by the ratio of their means over the same questions, whose logarithm is
averaged over models; every model has its own test questions. Further checks are the same at three quarters, the parts
of the method (thresholds without importance, importance of other layers), NAEE and fewer experts for all, how many of
the correct answers stay correct, how stable the importance is, calibration on questions of another kind, and the time
of a layer of experts of SmolLM2's width.

    python reproductions/modes.py            # about two hours on one core; an interrupted run resumes
    python reproductions/modes.py --quick    # a smaller model, which does not meet the premise, and the time of a layer
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from harness import Run, main
from harness.measured import Measured
from harness.vlm import RECIPE, asked, fit_into, loss, reading, shown_row
from torch import Tensor

import lamella
from lamella.data import ImageText, Processing
from lamella.data.samples import NO_LOSS
from lamella.evaluate import Ratio
from lamella.evaluate.scored import labelled_batches, scored_states
from lamella.measure import spearman
from lamella.methods.modes import AnswerDistance, ExpertSkipping, frontier, layer_importance
from lamella.methods.modes.baselines import Rule, fewer, find_strictness, naee, random_rule
from lamella.methods.modes.method import BATCH, search, skipped, skipping, thresholds
from lamella.methods.modes.policy import MODALITIES
from lamella.plan import ModelReference, Plan, PolicyReference
from lamella.runtime import with_policy
from lamella.runtime.gathering import sparsely
from lamella.stack import Stack, last_stack
from lamella.train import Task
from lamella.zoo.cache import build_once
from lamella.zoo.nano import nano
from lamella.zoo.opening import open_processor
from lamella.zoo.vlm import shapes_vlm
from lamella.zoo.worlds import SIZE, examples

TASKS = ("colour", "caption")
SEEDS = tuple(range(3, 11))
WALKED = 3  # models with which the walk is compared with the whole grid
SHARES = (0.5, 0.75)
LEARNED = 0.5  # required accuracy above that of the most frequent answer
HARM = 0.05  # required loss of accuracy by random skips of three quarters of the pairs
KEPT = 0.97  # required accuracy, relative to the model's
WIDE = 2  # random skips must change the answers by more than this factor: the wide margin
OURS, CHANCE, SHUFFLED = "MoDES", "random skips", "importance of other layers"
UNIFORM, APART = "weights alone, one threshold", "weights alone, two thresholds"


@dataclass(frozen=True)
class Size:
    """The scale of the experiment: the models, and the numbers of questions and thresholds."""

    layers: int
    steps: int
    calibration: int
    searched: int  # of these, used to choose thresholds
    test: int
    grid: int

    def folder(self, seed: int) -> Path:
        """Return the folder of the model that is trained with a seed, from the cache if it was trained before."""

        def build(folder: Path) -> dict[str, Any]:
            changes = {"spatial_merge_size": 2, "num_hidden_layers": self.layers, "moe_intermediate_size": 64}
            model, processor = shapes_vlm("qwen3_vl_moe", seed, **changes)
            config = replace(RECIPE, lr=RATE, steps=self.steps, save_every=self.steps, seed=seed, bf16=False)
            rows = asked(self.steps * config.batch, seed, SIZE, TASKS, OBJECTS, varied=False)
            task = Task(loss, collate=reading(Processing(processor), np.zeros((SIZE, SIZE, 3), np.uint8)))
            fit_into(folder, model, processor, rows, task, config)
            return {"steps": self.steps, "seed": seed}

        return build_once(f"reproduction-modes-{self.layers}-{self.steps}-{seed}", build, megabytes=20)

    def rows(self, tasks: Sequence[str], count: int, part: Any, draw: int) -> ImageText:
        """Return questions of one part of the data; they are the same for all models."""
        found = [shown_row(each, varied=False) for each in examples(tasks, count, part, draw, SIZE, OBJECTS)]
        return ImageText(found, Processing(open_processor(self.folder(SEEDS[0]))))

    def stack(self, seed: int) -> Stack:
        return lamella.open(self.folder(seed)).stacks["text"]

    def answers(self, seed: int, tasks: Sequence[str], rows: slice = slice(None)) -> AnswerDistance:
        """Return the measurement on some of the calibration questions."""
        samples = self.rows(tasks, self.calibration, "calibration", 100)
        return AnswerDistance(self.stack(seed), batched(ImageText(list(samples)[rows], samples.processing)))


RATE, OBJECTS = 1e-3, 2


def batched(samples: ImageText, size: int = BATCH) -> list[dict[str, Tensor]]:
    return list(labelled_batches(samples, size))


def viewed(stack: Stack, policy: ExpertSkipping) -> Any:
    reference = PolicyReference(name="modes")
    return with_policy(stack, Plan(model=ModelReference.of(stack), policies={"text": reference}), policy)


# The premise


def learned(size: Size, seed: int) -> dict[str, dict[str, float]]:
    """Return by task the accuracy, that of the most frequent answer, and that with three quarters of pairs skipped."""
    stack, found = size.stack(seed), {}
    for task in TASKS:
        test = size.rows([task], size.test // len(TASKS), "test", 200)
        [(_, commonest)] = Counter(each.answer for each in test).most_common(1)
        result = tested(stack, Rule(stack, random_rule(seed), SHARES[-1]), test)
        right, rest = (fmean(result[name]) for name in ("whole", "right"))
        found[task] = {"whole": right, "most frequent answer": commonest / len(test), CHANCE: rest}
    return found


def premises(run: Run, size: Size) -> None:
    found = [run.arm(f"accuracy, seed {seed}", learned, size, seed) for seed in seeds_of(run)]
    rows = [[seed, task, *(100 * value for value in each[task].values())]
            for seed, each in zip(seeds_of(run), found, strict=True) for task in TASKS]  # fmt: skip
    columns = ["seed", "task", *found[0][TASKS[0]]]
    run.table("Nano Qwen3-VL-MoEs: % of correct answers to other test questions", columns, rows)
    above = min(each[task]["whole"] - each[task]["most frequent answer"] for each in found for task in TASKS)
    name = "accuracy above that of the most frequent answer, lowest of all tasks and models"
    run.premise(name, f"at least {LEARNED:.0%}", f"{above:.1%}", above >= LEARNED)
    lost = fmean(each[task]["whole"] - each[task][CHANCE] for each in found for task in TASKS)
    run.premise("accuracy lost by random skips of three quarters", f"at least {HARM:.0%}", f"{lost:.1%}", lost >= HARM)


def seeds_of(run: Run) -> Sequence[int]:
    return SEEDS[:1] if run.quick else SEEDS


# Importance and thresholds


def importance(
    size: Size, seed: int, rows: slice = slice(None), tasks: Sequence[str] = TASKS
) -> dict[str, list[float]]:
    return layer_importance(size.answers(seed, tasks, rows))


def walk_against_grid(size: Size, seed: int, alpha: dict[str, list[float]]) -> list[list[float]]:
    """Return for each fraction the cost of the walk and of the whole grid, the evaluations and the violations."""
    answers = size.answers(seed, TASKS, slice(size.searched))
    grids = thresholds(answers, alpha, size.grid, "quantile")
    g, f = np.zeros((2, size.grid, size.grid))
    for i, text in enumerate(grids["text"]):
        for j, image in enumerate(grids["image"]):
            cost, counts = skipping(answers, alpha, {"text": text, "image": image})
            g[i, j], f[i, j] = skipped(counts), cost
    found = []
    for share in (0.25, 0.5, 0.65, 0.75):
        best = frontier(size.grid, size.grid, lambda i, j: (float(g[i, j]), float(f[i, j])), share)
        found.append([share, best.cost, float(f[g >= share].min()), best.evaluations, best.violations])
    return found


# The rules


def rules(stack: Stack, answers: AnswerDistance, alpha: dict[str, list[float]], share: float, points: int) -> Rules:
    """Return every rule, with the strictness at which it skips the fraction of calibration pairs."""
    even = dict.fromkeys(MODALITIES, [1.0] * len(stack))

    def apart(weighs: dict[str, list[float]]) -> ExpertSkipping:
        [best] = search(answers, weighs, thresholds(answers, weighs, points, "quantile"), [share])
        return ExpertSkipping(stack, alpha=weighs, tau=best.tau)

    def together(weighs: dict[str, list[float]]) -> ExpertSkipping:
        def skips(tau: float) -> float:
            return skipped(skipping(answers, weighs, dict.fromkeys(MODALITIES, tau))[1])

        most = float(torch.cat(list(answers.scores(weighs).values())).max())
        tau = find_strictness(skips, share, 0.0, 2 * most)
        return ExpertSkipping(stack, alpha=weighs, tau=dict.fromkeys(MODALITIES, tau))

    def ruled(keeps: Callable[[Tensor, float], Tensor], high: float) -> ExpertSkipping:
        rule = Rule(stack, keeps)
        measured = AnswerDistance(stack, answers.batches, rule)

        def skips(strict: float) -> float:
            rule.strict = strict
            return skipped(measured.distance()[1])

        rule.strict = find_strictness(skips, share, 0.0, high)
        return rule

    drawn = torch.Generator().manual_seed(0)
    other = {
        name: [each[layer] for layer in torch.randperm(len(each), generator=drawn)] for name, each in alpha.items()
    }
    return {
        OURS: partial(apart, alpha),
        SHUFFLED: partial(apart, other),
        UNIFORM: partial(together, even),
        APART: partial(apart, even),
        "importance, one threshold": partial(together, alpha),
        "NAEE": partial(ruled, naee, 64.0),
        "fewer for all": lambda: Rule(stack, fewer, share),
        CHANCE: lambda: Rule(stack, random_rule(0), share),
    }


Rules = dict[str, Callable[[], ExpertSkipping]]


def tested(stack: Stack, policy: ExpertSkipping, test: ImageText) -> dict[str, Any]:
    """Return for every test row the change of its answer and whether it is correct, and the fractions skipped."""
    view = viewed(stack, policy)
    found: dict[str, list[Any]] = {"kl": [], "right": [], "whole": []}
    counts = torch.zeros(len(stack), 2, 2, dtype=torch.long)
    with torch.no_grad():
        for batch in batched(test, 32):
            row = (batch["labels"][:, 1:] != NO_LOSS).nonzero()[:, 0]

            def by_row(values: Tensor, row: Tensor = row, size: int = len(batch["labels"])) -> Tensor:
                return torch.zeros(size).index_add(0, row, values.float())

            before, labels = scored_states(stack.model, batch)
            after, _ = scored_states(view, batch)
            counts += policy.counts
            p, q = (last_stack(stack.model).logits(each).float().log_softmax(-1) for each in (before, after))
            found["kl"] += (by_row((p.exp() * (p - q)).sum(-1)) / by_row(torch.ones(len(row)))).tolist()
            for name, each in (("whole", p), ("right", q)):
                found[name] += (by_row(each.argmax(-1) != labels) == 0).tolist()
    chosen, ran = counts.sum(0).unbind(-1)
    shares = {name: 1 - int(ran[index]) / int(chosen[index]) for index, name in enumerate(MODALITIES)}
    return found | shares | {"skipped": skipped(counts)}


def compared(size: Size, seed: int, alpha: dict[str, list[float]], share: float) -> dict[str, dict[str, Any]]:
    stack, answers = size.stack(seed), size.answers(seed, TASKS, slice(size.searched))
    test = size.rows(TASKS, size.test, "test", 1000 + seed)
    chosen = rules(stack, answers, alpha, share, size.grid)
    return {name: tested(stack, find(), test) for name, find in chosen.items()}


def shifted(size: Size, seed: int, share: float) -> dict[str, list[bool]]:
    """Return which answers to one task are correct, with calibration on that task and on another one."""
    other, judged = TASKS
    stack, test = size.stack(seed), size.rows([judged], size.test // 2, "test", 2)
    found = {}
    for task in TASKS:
        answers = size.answers(seed, [task], slice(size.searched))
        alpha = layer_importance(answers)
        [best] = search(answers, alpha, thresholds(answers, alpha, size.grid, "quantile"), [share])
        found[task] = tested(stack, ExpertSkipping(stack, alpha=alpha, tau=best.tau), test)
    return {"whole": found[other]["whole"], "other": found[other]["right"], "same": found[judged]["right"]}


def claims(run: Run, size: Size) -> None:
    seeds = seeds_of(run)
    premises(run, size)
    statistic = (
        "over models, logarithms of ratios of mean KL divergences; over models and questions, differences of accuracy"
    )
    run.freeze(statistic, seeds, size=vars(size), shares=SHARES, wide=WIDE, kept=KEPT)
    alphas = [run.arm(f"importance, seed {seed}", importance, size, seed) for seed in seeds]
    rows = [[seed, name, *alpha[name]] for seed, alpha in zip(seeds, alphas, strict=True) for name in MODALITIES]
    run.table("Importance of each layer", ["seed", "modality", *map(str, range(size.layers))], rows)
    halves = [[run.arm(f"importance, seed {seed}, half {half}", importance, size, seed, slice(half, None, 2))
               for half in (0, 1)] for seed in seeds]  # fmt: skip
    for name in MODALITIES:
        rho = Measured.over_seeds([spearman(*(half[name] for half in both)) or 0.0 for both in halves])
        run.further(f"importance to {name}, rank correlation of two halves", "at least 0.8", rho, rho.at_least(0.8))
    grids = []
    for seed, alpha in zip(seeds[:WALKED], alphas, strict=False):
        walks = run.arm(f"the walk against the grid, seed {seed}", walk_against_grid, size, seed, alpha)
        grids += [[seed, *each] for each in walks]
    run.table(
        f"{size.grid} x {size.grid} thresholds, {size.searched} samples",
        ["seed", "fraction to skip", "KL of the walk", "KL of the grid", "evaluations", "monotonicity violations"],
        grids,
    )
    gap = max(1.0 if found == least else found / least if least > 0 else np.inf for _, _, found, least, *_ in grids)
    run.main("KL of the walk in the best of the whole grid, largest ratio", "at most 1.02", gap, gap <= 1.02)
    for share in SHARES:
        found = [run.arm(f"rules at {share}, seed {seed}", compared, size, seed, alpha, share)
                 for seed, alpha in zip(seeds, alphas, strict=True)]  # fmt: skip
        at_share(run, share, found)
    kept = [run.arm(f"another kind of question, seed {seed}", shifted, size, seed, SHARES[0]) for seed in seeds]
    lost = Measured.over_seeds_and_items([100 * (values(each["same"]) - values(each["other"])) for each in kept])
    said = f"accuracy on {TASKS[1]} lost by calibration on {TASKS[0]}, points"
    run.further(said, "at most 2", lost, lost.at_most(2))


def values(of_rows: Sequence[Any]) -> np.ndarray:
    return np.array(of_rows, float)


def at_share(run: Run, share: float, found: Sequence[dict[str, dict[str, Any]]]) -> None:
    def mean(name: str, key: str) -> float:
        return fmean(fmean(each[name][key]) if isinstance(each[name][key], list) else each[name][key] for each in found)

    def stays(each: dict[str, Any]) -> float:
        """Return the fraction of the model's correct answers that stay correct; newly correct ones do not count."""
        return float(values(each["right"])[np.array(each["whole"])].mean())

    run.table(
        f"{share:.0%} of the pairs of calibration skipped, mean of {len(found)} models, "
        f"{len(found[0][OURS]['kl'])} test questions",
        ["rule", "KL (nats)", "% correct", "accuracy relative to the model's", "% of the correct answers that stay",
         "% skipped", "of text", "of images", "experts per token"],
        [
            [name, mean(name, "kl"), 100 * mean(name, "right"), mean(name, "right") / mean(name, "whole"),
             100 * fmean(stays(each[name]) for each in found), 100 * mean(name, "skipped"), 100 * mean(name, "text"),
             100 * mean(name, "image"), 4 * (1 - mean(name, "skipped"))]
            for name in found[0]
        ],
    )  # fmt: skip

    def relative(other: str) -> Measured:
        """Return the KL divergence by another rule relative to MoDES's, geometric mean over models."""
        return Measured.over_seeds(
            [float(np.log(fmean(each[other]["kl"]) / fmean(each[OURS]["kl"]))) for each in found]
        ).exp()

    claim = run.main if share == SHARES[0] else run.further
    for other, factor, check in (
        (UNIFORM, 1, claim),
        (CHANCE, WIDE, claim),
        *((other, 1, run.further) for other in (APART, SHUFFLED, "NAEE", "fewer for all")),
    ):
        ratio = relative(other)
        check(f"{share:.0%}: KL by {other}, relative to MoDES's", f"at least {factor}", ratio, ratio.at_least(factor))
    right, whole = ([fmean(each[OURS][model]) for each in found] for model in ("right", "whole"))
    margin = Measured.over_seeds([100 * (ours - KEPT * theirs) for ours, theirs in zip(right, whole, strict=True)])
    claim(f"{share:.0%}: accuracy less {KEPT:.0%} of the model's, points", "at least 0", margin, margin.at_least(0))
    left = Measured.over_seeds([stays(each[OURS]) for each in found])
    name = f"{share:.0%}: fraction of the model's correct answers that stay correct"
    run.further(name, f"at least {KEPT:g}", left, left.at_least(KEPT))


# The time of a layer


def layer_times(run: Run) -> list[list[float]]:
    """Time a layer of experts, dense and with skipped pairs, interleaved."""
    config = {"hidden_size": 576, "moe_intermediate_size": 768, "num_experts": 8, "num_experts_per_tok": 4}
    stack = Stack(nano("qwen3_moe", num_hidden_layers=1, **config))
    experts = stack.layers[0].mlp.experts
    drawn, found = torch.Generator().manual_seed(run.seed), []
    for tokens in (64, 128, 256, 512):
        h = torch.randn(tokens, 576, generator=drawn)
        chosen = torch.rand(tokens, 8, generator=drawn).argsort(1)[:, :4]
        weights = torch.rand(tokens, 4, generator=drawn)
        for share in SHARES:
            keep = torch.rand(tokens, 4, generator=drawn) >= share
            ratios = []
            for _ in range(3 if run.quick else 15):
                begin = time.perf_counter()
                experts(h, chosen, weights)
                middle = time.perf_counter()
                with sparsely(experts, lambda ids, each, keep=keep: keep):
                    experts(h, chosen, weights)
                ratios.append((middle - begin) / (time.perf_counter() - middle))
            ratio = Ratio.of(ratios[1:])
            found.append([tokens, share, ratio.median, ratio.low, ratio.high])
    return found


def experiment(run: Run) -> None:
    run.data = "rendered shapes: questions about a colour, and captions; images of held-out test scenes"
    with torch.no_grad():
        found = run.arm("time of a layer", layer_times, run)
        run.table(
            "A layer of 8 experts of 576 x 768, 4 per token: time of the dense layer over that of the sparse one",
            ["tokens", "fraction skipped", "ratio", "lower quartile", "upper quartile"],
            found,
        )
        for share in SHARES:
            last = [Measured(*each[2:]) for each in found if each[1] == share][-1]
            name = f"{share:.0%} of the pairs of 512 tokens skipped: speed-up"
            run.further(name, "at least 1.3", last, last.at_least(1.3))
        claims(run, QUICK if run.quick else FULL)


FULL = Size(layers=12, steps=2000, calibration=256, searched=64, test=1000, grid=20)
QUICK = Size(layers=3, steps=60, calibration=16, searched=8, test=40, grid=4)

if __name__ == "__main__":
    raise SystemExit(main(experiment, quick="a smaller model, which does not meet the premise, and few timed rounds"))
