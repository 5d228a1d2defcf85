"""FiRST at small scale: Llamas trained on prose and copying for quality, SmolLM2-135M-Instruct for speed.

The premise: the best set of layers for each task has a lower loss than the best set for all tasks, of as many layers on
average. The main claim: at equal depth, after LoRA, layers that routers choose for each prompt have at most the loss of
one fixed set, chosen by the same routers' mean scores, and of evenly spaced layers, over eight models with rates tuned
for each way. Five other models gave the number of models. Further checks are the best of all fixed sets, the order
before LoRA, that LoRA recovers half of the loss, that the skip weight controls the number of skipped layers, that tasks
keep different layers, and that decoding is as fast as the kept layers allow.

    python reproductions/first.py            # about two hours on one core; an interrupted run resumes
    python reproductions/first.py --quick    # smaller models, which do not meet the premise
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations, pairwise, product
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from harness import Run, main
from harness.design import tuned
from harness.measured import Measured
from harness.nano import (
    COPY,
    LETTERS,
    TEXTS,
    encode,
    from_scratch,
    llama,
    nats_by_sample,
    prose,
    puzzles,
    scratch,
    taught_once,
)
from torch import Tensor

import lamella
from lamella.evaluate import bench, measure_step
from lamella.files import Work
from lamella.methods.first import ROUTING, PromptRouters, buckets, signatures, thresholds, train_routers, tune
from lamella.methods.first.policy import scores
from lamella.methods.unified_skip import balanced
from lamella.plan import ModelReference, PhasedPath, Plan, PolicyReference
from lamella.report.figures import Bars
from lamella.results import Record
from lamella.results.record import together
from lamella.runtime import keep_policy, with_policy
from lamella.stack import Stack
from lamella.train import Sample, Task, TrainConfig, add_lora, fit, response_loss
from lamella.zoo import open_tokenizer

PILOT = 100  # seed of the model by which gates and rates are chosen
SEEDS = 8
AFTER = 5  # seeds of the models that gave the number of seeds
WAYS = ("first", "one set", "evenly spaced", "best set")
WHOLE = "whole model"
GATES = {"soft": 1.0, "straight": 0.2}  # in training, with the last temperature


@dataclass(frozen=True)
class Scale:
    """The models, their samples, and the steps of each training."""

    layers: int
    hidden: int
    steps: int  # of training from scratch
    length: int
    samples: int
    tests: int  # of each task
    routing: int  # steps of the routers' training
    tuning: int  # steps of LoRA
    keep: tuple[int, ...]

    def train(self, seed: int) -> list[Sample]:
        """Return samples to train on, of which half are copies."""
        half = self.samples // 2
        rows = prose("calibration", half, self.length, seed, TEXTS) + self.copies(half, seed)
        return [rows[k] for k in torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()]

    def tasks(self, use: str) -> dict[str, list[Sample]]:
        """Return samples of each task to choose by or to test on, from halves of the test texts and other strings."""
        part, seed = ((0.0, 0.5), 1001) if use == "validation" else ((0.5, 1.0), 1002)
        return {
            "prose": prose("test", self.tests, self.length, seed, TEXTS, part),
            "copy": self.copies(self.tests, seed),
        }

    def copies(self, count: int, seed: int) -> list[Sample]:
        """Return random strings to copy. A model of this size does not learn to reverse them."""
        found = puzzles(3 * count, self.length, seed)
        return [each for each in found if int(each["input_ids"][0]) == int(encode(COPY))][:count]

    def base(self, seed: int) -> Stack:
        """Return the model that is trained on answers with a seed, from the cache if it was trained before."""
        name = f"prose-and-copies-{self.layers}x{self.hidden}-{self.length}-{self.steps}-{seed}"
        config = from_scratch(self.steps, lr=3e-3, batch=16, seed=seed)
        return taught_once(name, llama(len(LETTERS), self.hidden, self.layers), lambda: self.train(seed), config)


FULL = Scale(8, 96, 1500, 48, 24000, 96, 300, 200, (5, 4))
QUICK = Scale(6, 64, 300, 48, 2000, 24, 40, 20, (4,))


def joined(tasks: dict[str, list[Sample]]) -> list[Sample]:
    return [sample for samples in tasks.values() for sample in samples]


def prompts_of(samples: Sequence[Sample]) -> list[Tensor]:
    return [each["input_ids"][: int(each["prompt_lengths"])] for each in samples]


def phased(stack: Stack, kept: Sequence[int]) -> Plan:
    """Return a plan that runs prompts at full depth and answers through the given layers."""
    path = PhasedPath(prefill=list(range(len(stack))), decode=list(kept))
    return Plan(model=ModelReference.of(stack), path={"text": path})


# Premise


def all_sets(scale: Scale, seed: int) -> list[dict[str, Any]]:
    """Find by validation, of all sets with both ends, the best one for all tasks and the best one for each.

    Sets for each task have ``keep`` layers on average, as layers have that are chosen for each prompt.

    Returns:
        For every ``keep``, the sets, and the test losses of the whole model and with these sets, mean over samples.
    """
    stack, tasks = scale.base(seed), scale.tasks("validation")
    middle = range(1, scale.layers - 1)
    sets = [[0, *each, scale.layers - 1] for size in range(len(middle) + 1) for each in combinations(middle, size)]
    views = [lamella.apply(stack, phased(stack, kept)) for kept in sets]
    # [sets, tasks]
    table = np.array([[fmean(nats_by_sample(view, samples)) for samples in tasks.values()] for view in views])
    sizes = np.array([len(kept) for kept in sets])
    of_size = {size: np.flatnonzero(sizes == size) for size in range(2, scale.layers + 1)}
    best_of = {size: each[table[each].argmin(axis=0)] for size, each in of_size.items()}  # one set for each task
    tests = scale.tasks("test")

    def tested(chosen: Sequence[int]) -> float:
        pairs = zip(chosen, tests.values(), strict=True)
        return fmean(loss for each, samples in pairs for loss in nats_by_sample(views[each], samples))

    found = []
    for keep in scale.keep:
        one = int(of_size[keep][table[of_size[keep]].mean(axis=1).argmin()])
        splits = [each for each in product(of_size, repeat=len(tasks)) if sum(each) == keep * len(tasks)]
        ways = [[int(best_of[size][task]) for task, size in enumerate(split)] for split in splits]
        own = min(ways, key=lambda way: sum(table[each, task] for task, each in enumerate(way)))
        losses_ = [tested([index] * len(tasks)) for index in (len(sets) - 1, one)]
        found.append({"best": sets[one], "own": [sets[each] for each in own], "losses": [*losses_, tested(own)]})
    return found


def premise(run: Run, scale: Scale, seeds: Sequence[int]) -> dict[tuple[int, int], list[int]]:
    """Check that inputs of different tasks need different layers; return the best set for all by seed and size."""
    found = {seed: run.arm(f"all sets, seed {seed}", all_sets, scale, seed) for seed in seeds}
    rows, best = [], {}
    for number, keep in enumerate(scale.keep):
        for seed in seeds:
            each = found[seed][number]
            best[seed, keep] = each["best"]
            rows.append([keep, seed, *each["losses"], str(each["best"]), *map(str, each["own"])])
    columns = ["kept", "seed", "whole model", "one set for all", "one for each task", "set for all", "prose", "copy"]
    run.table("Best of all sets, chosen by validation; test loss in nats per answer token, untrained", columns, rows)
    for keep in scale.keep:  # ratios, since in some models one set for all loses ten times as much as in others
        logs = [math.log(row[4] / row[3]) for row in rows if row[0] == keep and row[1] != PILOT]
        ratio = Measured.over_seeds(logs).exp()
        name = f"loss with a set for each task relative to one for all tasks, {keep} layers"
        run.premise(name, "below 1", ratio, ratio.at_most(1))
    return best


# Main claim


@dataclass(frozen=True)
class Routers:
    """How routers are trained."""

    gates: str
    rate: float


def routed(scale: Scale, seed: int, keep: int, how: Routers, work: Path) -> tuple[Plan, list[int]]:
    """Train routers; return their plan, which keeps ``keep`` layers on average, and the layers of highest mean score.

    Both are chosen on validation prompts.
    """
    stack = scale.base(seed)
    config = replace(ROUTING, steps=scale.routing, lr=how.rate, batch=16, seed=seed)
    free = scale.layers - 2
    options: dict[str, Any] = {"gates": how.gates, "temperature": GATES[how.gates]}
    with torch.enable_grad():
        routers = train_routers(
            stack, scale.train(seed), config=config, target_skip=(scale.layers - keep) / free, skip_weight=3.0,
            out=work / f"routers-{seed}-{keep}-{how.gates}-{how.rate:g}", **options,
        )  # fmt: skip
    mean = scores(stack, routers, prompts_of(joined(scale.tasks("validation")))).mean(0)
    mean[[0, -1]] = torch.inf  # always kept
    static = sorted(mean.argsort(descending=True, stable=True)[:keep].tolist())
    return at_depth(scale, stack, routers, keep), static


def at_depth(scale: Scale, stack: Stack, routers: PromptRouters, keep: int) -> Plan:
    """Return the plan of routers with the threshold at which validation prompts keep ``keep`` layers on average."""
    series = thresholds(stack, routers, prompts_of(joined(scale.tasks("validation"))))
    plan = min(series, key=lambda each: abs(sum(attn for attn, _ in each.work) - keep))
    assert plan.policy is not None
    params = plan.policy.params | {"temperature": routers.temperature}
    policies = {stack.stack: plan.policy.model_copy(update={"params": params})}
    return keep_policy(plan.model_copy(update={"policies": policies}), routers, scratch("first"))


def before_lora(scale: Scale, keeps: Sequence[int], gates: str, work: Path, rate: float) -> float:
    """Return the validation loss of the pilot's routers, mean over sizes."""
    stack, samples = scale.base(PILOT), joined(scale.tasks("validation"))
    plans = [routed(scale, PILOT, keep, Routers(gates, rate), work)[0] for keep in keeps]
    return fmean(fmean(nats_by_sample(lamella.apply(stack, plan), samples)) for plan in plans)


def healed(
    scale: Scale, way: str, seed: int, keep: int, how: Routers, best: Sequence[int], use: str, work: Path, rate: float
) -> dict[str, Any]:
    """Return the loss of each sample before and after LoRA, and for routers what they keep of each prompt."""
    stack, samples, train = scale.base(seed), joined(scale.tasks(use)), scale.train(seed)
    if way in ("first", "one set"):
        plan, static = routed(scale, seed, keep, how, work)
    sets = {"evenly spaced": balanced(scale.layers, keep), "best set": best, WHOLE: range(scale.layers)}
    if way != "first":
        plan = phased(stack, static if way == "one set" else sets[way])
    config = TrainConfig(steps=scale.tuning, lr=rate, batch=16, save_every=scale.tuning, seed=seed)
    found: dict[str, Any] = {"before": nats_by_sample(lamella.apply(stack, plan), samples)}
    with torch.enable_grad():
        if way == "first":
            after = tune(stack, plan, train, config=config, work=Work(scratch("first")))
            routers = lamella.apply(after.stack, after.plan).lamella_policy
            healed_plan = at_depth(scale, after.stack, routers, keep)
            view = lamella.apply(after.stack, healed_plan)
        else:
            view = lamella.apply(stack, plan)
            lora = add_lora(view, 8, 16, 0.05, seed=seed)
            fit(view, train, Task(response_loss), config, out=scratch("first"), trainable=lora.trains)
    found["after"] = nats_by_sample(view, samples)
    if way == "first":
        found["kept"] = kept_by(stack, plan, samples).tolist()
        found["kept after"] = kept_by(after.stack, healed_plan, samples).tolist()
    else:
        found["layers"] = plan.path["text"].decode
    return found


def kept_by(stack: Stack, plan: Plan, samples: Sequence[Sample]) -> Tensor:
    """Return the layers that a plan keeps for each prompt [prompts, layers]."""
    return signatures(stack, lamella.apply(stack, plan).lamella_policy, prompts_of(samples)).int()


def random_sets(scale: Scale, seed: int, keep: int) -> float:
    """Return the mean loss before LoRA with eight random sets, both ends included."""
    stack, samples = scale.base(seed), joined(scale.tasks("test"))
    generator = torch.Generator().manual_seed(seed)
    draws = [(1 + torch.randperm(scale.layers - 2, generator=generator)[: keep - 2]).tolist() for _ in range(8)]
    sets = [sorted({0, scale.layers - 1, *draw}) for draw in draws]
    return fmean(fmean(nats_by_sample(lamella.apply(stack, phased(stack, each)), samples)) for each in sets)


def chosen_routers(run: Run, scale: Scale) -> Routers:
    """Choose gates and rate of the routers on the pilot; a quick run chooses neither."""
    if run.quick:
        return Routers("straight", 3e-2)
    scores = {f"routers, {gates} gates": partial(before_lora, scale, scale.keep, gates, run.work) for gates in GATES}
    found = dict(zip(GATES, tuned(run, scores, [1e-2, 3e-2, 9e-2]).values(), strict=True))
    gates = min(found, key=lambda each: min(found[each].scores.values()))
    return Routers(gates, found[gates].value)


def chosen_rates(run: Run, scale: Scale, how: Routers, best: dict[int, list[int]]) -> dict[str, dict[int, float]]:
    """Choose the rate of LoRA of every way on the pilot; a quick run tunes none."""
    if run.quick:
        return {way: dict.fromkeys(scale.keep, 1e-3) for way in (*WAYS, WHOLE)}

    def validated(way: str, keep: int, rate: float) -> float:
        return fmean(healed(scale, way, PILOT, keep, how, best[keep], "validation", run.work, rate)["after"])

    arms = {(way, keep): partial(validated, way, keep) for way in WAYS for keep in scale.keep}
    arms[WHOLE, scale.layers] = partial(validated, WHOLE, scale.keep[0])
    named = {f"{way}, {keep} layers": score for (way, keep), score in arms.items()}
    found = {key: each.value for key, each in zip(arms, tuned(run, named, [2e-4, 1e-3]).values(), strict=True)}
    whole = dict.fromkeys(scale.keep, found[WHOLE, scale.layers])
    return {way: {keep: found[way, keep] for keep in scale.keep} for way in WAYS} | {WHOLE: whole}


def quality(run: Run, scale: Scale) -> None:
    """Check points 3, 4 and 5: the loss at equal depth, before and after training LoRA of the same size."""
    seeds = range(run.seed + AFTER, run.seed + AFTER + (1 if run.quick else SEEDS))
    best = premise(run, scale, [PILOT, *seeds])
    how = chosen_routers(run, scale)
    rates = chosen_rates(run, scale, how, {keep: best[PILOT, keep] for keep in scale.keep})
    run.freeze(
        "mean over models and test samples of the difference of losses after LoRA, at equal depth",
        seeds,
        scale=vars(scale),
        routers=vars(how) | {"temperature": GATES[how.gates]},
        rates=rates,
    )
    tests = {task: len(samples) for task, samples in scale.tasks("test").items()}
    ends = np.cumsum(list(tests.values()))[:-1]
    rows, kept = [], {}
    for keep in scale.keep:
        found: dict[str, list[dict[str, Any]]] = {}
        for way in (*WAYS, WHOLE):
            size = scale.keep[0] if way == WHOLE else keep  # the whole model is the same at every size
            arm = f"{way}, {scale.layers if way == WHOLE else keep} layers"
            found[way] = [
                run.arm(f"{arm}, seed {seed}", healed, scale, way, seed, size, how, best[seed, size], "test", run.work,
                        rates[way][keep])
                for seed in seeds
            ]  # fmt: skip
        before, after = (
            {way: np.array([each[when] for each in arms]) for way, arms in found.items()}
            for when in ("before", "after")
        )  # [seeds, samples]
        drawn = fmean(run.arm(f"random sets of {keep}, seed {seed}", random_sets, scale, seed, keep) for seed in seeds)
        ours = found["first"]
        kept[keep] = np.array([each["kept after"] for each in ours])  # [seeds, prompts, layers]
        for way, arms in found.items():
            by_task = [float(each.mean()) for each in np.split(after[way], ends, axis=1)]
            depth = float(kept[keep].sum(-1).mean()) if way == "first" else len(arms[0]["layers"])
            sets = "by prompt" if way == "first" else "; ".join(dict.fromkeys(str(each["layers"]) for each in arms))
            rows.append([keep, way, depth, rates[way][keep], float(before[way].mean()), float(after[way].mean()),
                         *by_task, sets])  # fmt: skip
        rows.append([keep, "random sets", keep, "", drawn, "", *[""] * len(tests), ""])
        compared(run, scale, keep, before, after, drawn)
        depth = Measured.over_seeds([float(each.sum(-1).mean()) for each in kept[keep]])
        name = f"layers that first keeps on average after LoRA, of {keep}"
        run.further(name, "within 0.2", depth, depth.within(keep - 0.2, keep + 0.2))
    columns = ["kept", "way", "mean depth", "rate", "before LoRA", "after LoRA", *(f"{task}, after" for task in tests)]
    title = f"Loss in nats per answer token, mean of {len(seeds)} models, {scale.tuning} steps of LoRA"
    run.table(title, [*columns, "layers"], rows)
    adaptivity(run, kept, tests)


def compared(
    run: Run, scale: Scale, keep: int, before: dict[str, np.ndarray], after: dict[str, np.ndarray], drawn: float
) -> None:
    """Add the checks of one size."""
    where = f"{keep} of {scale.layers} layers"
    for other in WAYS[1:]:
        apart = Measured.over_seeds_and_items(after["first"] - after[other])
        check = run.further if other == "best set" else run.main
        check(f"first minus '{other}', {where}, after LoRA", "at most 0 nats", apart, apart.at_most(0))
    pairs = [*pairwise(("first", "one set", "evenly spaced"))]
    order = together([Measured.over_seeds_and_items(before[a] - before[b]).at_most(0) for a, b in pairs])
    below = bool(before["evenly spaced"].mean() < drawn)
    measured = " ".join(f"{value:.3f}" for value in (*(before[way].mean() for way in WAYS[:3]), drawn))
    run.further(
        f"before LoRA, {where}", "first <= one set <= evenly spaced < random", measured, together([order, below])
    )
    lost = before["first"].mean(1) - before[WHOLE].mean(1)
    gap = Measured.over_seeds(((before["first"] - after["first"]).mean(1) / lost).tolist())
    run.further(f"loss that LoRA recovers, {where}", "at least half", gap, gap.at_least(0.5))


def adaptivity(run: Run, kept: dict[int, np.ndarray], size: dict[str, int]) -> None:
    """Check point 3: signatures [seeds, prompts, layers] by size."""
    task = np.repeat(np.arange(len(size)), list(size.values()))
    rows = []
    for keep, signs in kept.items():
        apart = np.abs(signs[:, :, None] - signs[:, None]).sum(-1)  # [seeds, prompts, prompts]
        same = task[:, None] == task[None]
        other = ~np.eye(len(task), dtype=bool)
        within, between = apart[:, same & other].mean(1), apart[:, ~same].mean(1)
        further = Measured.over_seeds((between - within).tolist())
        name = f"Hamming distance of signatures between tasks minus within, {keep} layers"
        run.further(name, "above 0", further, further.at_least(0))
        shares = [probe(torch.tensor(each), torch.tensor(task)) for each in signs]
        accuracy = Measured.over_seeds(shares)
        run.further(f"linear probe from signature to task, {keep} layers", "at least 0.75", accuracy,
                    accuracy.at_least(0.75))  # fmt: skip
        for number, name in enumerate(size):
            rows.append([keep, name, *signs[:, task == number].mean((0, 1)).tolist()])
    layers = next(iter(kept.values())).shape[-1]
    run.table("Fraction of prompts that keep each layer, after LoRA", ["kept", "task", *map(str, range(layers))], rows)
    fractions = {f"{name}, {keep} of {layers} layers": each for keep, name, *each in rows}
    run.figure("first-layers", Bars("layer", "fraction of prompts that keep it", fractions))


def probe(kept: Tensor, task: Tensor) -> float:
    """Return the accuracy of a linear probe from signatures to whether the task is prose, on every other prompt."""
    half = torch.arange(len(task)) % 2 == 0
    x = torch.cat([kept.double(), torch.ones(len(task), 1, dtype=torch.double)], dim=1)
    y = (task == 0).double() * 2 - 1
    solution = torch.linalg.lstsq(x[half].T @ x[half] + 1e-3 * torch.eye(x.shape[1]), x[half].T @ y[half]).solution
    return float(((x[~half] @ solution > 0) == (y[~half] > 0)).double().mean())


def pressure(run: Run, scale: Scale) -> None:
    """Check point 2: the effect of the skip penalty, on the pilot's model."""
    stack, prompts = scale.base(PILOT), prompts_of(joined(scale.tasks("test")))
    config = replace(ROUTING, steps=scale.routing, batch=16, seed=PILOT)

    def kept(weight: float) -> float:
        with torch.enable_grad():
            routers = train_routers(stack, scale.train(PILOT), config=config, skip_weight=weight, out=scratch("first"))
        return float(signatures(stack, routers, prompts).float().sum(1).mean())

    rows = [[weight, run.arm(f"pressure {weight}", kept, weight)] for weight in (0.03, 0.1, 0.3, 1.0)]
    run.table("Mean number of kept layers by skip weight alpha", ["alpha", "kept"], rows)
    falls = all(a[1] >= b[1] for a, b in pairwise(rows)) and rows[0][1] > rows[-1][1]
    run.further(
        "number of kept layers over alpha", "decreases over at least four values", str([row[1] for row in rows]), falls
    )


def speed(record: Record, stack: Stack, tokens: Tensor, quick: bool) -> None:
    """Check point 6: decoding with fixed sets of layers, and the cost of batches with mixed prompts."""
    times = measure_step(stack)
    views = {}
    for keep in (24, 22):
        routers = PromptRouters(stack)
        kept = torch.zeros(30, dtype=torch.bool)
        kept[balanced(30, keep)] = True
        routers.bias.copy_(torch.where(kept, 50.0, -50.0))
        work = [(float(k), float(k)) for k in kept]
        plan = Plan(model=ModelReference.of(stack), policies={stack.stack: PolicyReference(name="first", work=work)})
        views[f"keep {keep}"] = with_policy(stack, plan, routers)
    timings = bench(
        {"whole": stack.model} | views, [1], prompt=64, tokens=12 if quick else 64, rounds=3 if quick else 5
    )
    rows = []
    for name, view in views.items():
        timing, predicted = timings[name][0], times.speedup(view.lamella_plan)
        share = Measured.over_rounds(timing.decode_speedup, predicted)
        rows.append([name, predicted, str(timing.decode_speedup), share.figure])
        record.further(f"decode speed-up / cost model, {name}", "within 15 %", share, share.within(0.85, 1.15))
    record.table("Decoding SmolLM2, batch 1", ["kept of 30", "speed-up of the cost model", "measured", "ratio"], rows)

    routers = PromptRouters(stack)
    routers.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    routers.bias.fill_(0.5)
    kept = signatures(stack, routers, [row[:32] for row in tokens])
    alone = float(kept.float().sum(1).mean())
    size = len(kept) // 4
    mixed = [list(range(k, len(kept), 4)) for k in range(4)]
    alike = buckets(kept, size)
    unions = [sum(float(kept[batch].any(0).sum()) for batch in batches) / 4 for batches in (mixed, alike)]
    record.table(
        f"Number of layers that a batch of {size} mixed prompts must run (mean of 4 batches)",
        ["single row", "batches in arrival order", "batches of similar signatures"],
        [[alone, *unions]],
    )
    record.further("bucketing", "a smaller union", f"{unions[1]:.1f} / {unions[0]:.1f}", unions[1] < unions[0])


@torch.no_grad()
def experiment(run: Run) -> None:
    quick = run.quick
    real = lamella.open("smollm2")
    text = lamella.load_text("pydoc", "test")
    tokens = lamella.windows(open_tokenizer("smollm2"), text, 8 if quick else 32, 64, run.seed)
    run.data = (
        "characters of Python's documentation and library, and random strings to copy; "
        f"for speed {text.provenance(tokens)}"
    )
    run.part("speed", speed, real, tokens, quick)
    scale = QUICK if quick else FULL
    if not quick:
        pressure(run, scale)
    quality(run, scale)


if __name__ == "__main__":
    raise SystemExit(main(experiment, quick="smaller models, which do not meet the premise; under a minute"))
