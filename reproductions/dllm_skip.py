"""dLLM-Skip at small scale: a decoder, a diffusion model from scratch, one converted from a decoder, and SmolLM2.

The three small models have one shape, eight layers on characters (harness/diffusion.py). The main claim is about eleven
models that were trained to denoise from scratch: the layers that the criterion selects raise the loss less than other
sets of the same size without adjacent layers, on average, for two and for three layers (no four of the six inner ones
are without neighbours). Its premise is that other sets cost something. Choices at equal k are compared by their ranking
alone (no theta), since the layers that pass 0.95 depend on the model size. Loss is in nats per token: the negative
log-likelihood of the decoder and its bound for the two others, on held-out prose, with the same noise for every choice.

Further checks are the same for three decoders and three converted models, the fraction of puzzles that a model still
solves without some layers, as the paper measures GSM8K, and with fewer denoising steps at equal FLOPs, similarity
curves, layers chosen on program text, the time of a step, and SmolLM2. Nothing is said of the puzzles of models that
have not learned them.

    python reproductions/dllm_skip.py            # about an hour and a half on one core; an interrupted run resumes
    python reproductions/dllm_skip.py --quick    # models that do not meet the premise
"""

from __future__ import annotations

import argparse as code_to_read
import json as more_code_to_read
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

import numpy as np
import torch
from harness import Run, main
from harness.diffusion import KINDS, LENGTH, MASK, SIZE, asked, text, trained
from harness.measured import Measured
from harness.nano import encode
from torch import Tensor

import lamella
from lamella.evaluate import bench
from lamella.measure import RATIOS, Draw, draws
from lamella.methods.dllm_skip import losses_without, rises, select, similarity
from lamella.methods.dllm_skip.baselines import cheapest, every, neighbours, spaced
from lamella.methods.dllm_skip.method import curve_distance, spearman
from lamella.plan import ModelReference, Plan
from lamella.report.figures import Lines
from lamella.runtime import Sampler, apply, denoise
from lamella.stack import Stack
from lamella.zoo import open_tokenizer
from lamella.zoo.nano import nano

SEEDS = {"AR": range(3), "MDM": range(11), "AR2MDM": range(3)}
COUNTS = (1, 2, 3)
RANDOM = 20  # distinct random sets at every k
TEXTS = 16  # passages of prose to choose layers on, and the same number to evaluate them on
EQUAL = (2, 3)  # layers skipped of eight, and steps taken of four: both leave three quarters of the FLOPs
COSTS = 0.05  # required rise of the loss without two layers, mean of other sets, in nats
LEARNED, ALONE = 0.9, 0.5  # fraction of puzzles that a model must solve, and that one layer alone must not
RETAINED = 0.9  # of the solved puzzles: the paper's fraction of GSM8K without 18.75 % of the layers' FLOPs
SMOL = (1, 2, 3, 4, 5, 6)
PROBED = {1: 0.07, 4: 0.48}  # loss increase of SmolLM2 without k layers on other text, in nats per token


def model_of(kind: str, seed: int, quick: bool) -> Stack:
    size: dict[str, int] = {"layers": 6, "hidden": 32, "steps": 20} if quick else {}
    return trained(kind, seed, **size)


# The three models


def measured(kind: str, seed: int, quick: bool) -> dict[str, Any]:
    """Measure one model: its curves, the loss without sets of layers, and the puzzles that it solves.

    All models are tested on the same texts with the same noise.
    """
    stack, count = model_of(kind, seed, quick), 2 if quick else TEXTS
    inner = range(1, len(stack) - 1)
    calibration = draws(stack, text("calibration", count, seed), RATIOS, seed=seed)
    found = similarity(stack, calibration)
    test = draws(stack, text("test", count, 500), RATIOS, seed=500)
    sim = found.by_layer
    alone = rises(stack, calibration, [(layer,) for layer in range(len(stack))])  # for the oracle
    counts = [k for k in COUNTS if len(every(inner, k)) > 1]
    sets: dict[str, list[tuple[int, ...]]] = {
        "selected": [tuple(sorted(select(sim, -1.0, k, inner))) for k in counts],
        "plain top-k": [tuple(sorted(select(sim, -1.0, k, inner, non_adjacent=False))) for k in counts],
        "consecutive": [neighbours(list(sim), inner, k) for k in counts],
        "evenly spaced": [spaced(inner, k) for k in counts],
        "oracle": [cheapest(alone, inner, k) for k in counts],
    }
    random = [others(inner, chosen, 3 if quick else RANDOM, seed) for chosen in sets["selected"]]
    choices = list(dict.fromkeys(each for known in (*sets.values(), *random) for each in known))
    losses = losses_without(stack, test, [(), *choices])
    costs = dict(zip(choices, losses[1:] - losses[0], strict=True))  # [sequences]
    singles = rises(stack, test, [(layer,) for layer in range(len(stack))])
    return {
        "layers": len(stack),
        "sim": sim.tolist(),
        "points": found.points.values.tolist(),
        "recency": found.recency_index.tolist(),
        "passing": len(select(sim, 0.95, len(stack), inner)),
        "singles": singles,
        "spearman": spearman(1 - sim, singles),
        "base": float(losses[0].mean()),
        "sets": sets,
        "rise": {name: [costs[each].tolist() for each in known] for name, known in sets.items()},
        "random": [torch.stack([costs[each] for each in many]).mean(0).tolist() for many in random],
        "solved": solved(stack, sets["selected"], quick),
        "transfer": transfer(stack, seed, count),
    }


def others(allowed: Sequence[int], chosen: tuple[int, ...], count: int, seed: int) -> list[tuple[int, ...]]:
    """Return random sets of the same size without adjacent layers, or all of them if there are few."""
    known = [each for each in every(allowed, len(chosen)) if each != chosen]
    return known if len(known) <= count else Random(seed).sample(known, count)


def views(stack: Stack, layers: Sequence[int]) -> Any:
    plan = Plan(model=ModelReference.of(stack), drop=[f"layers.{layer}" for layer in layers])
    return apply(stack, plan) if layers else stack.model


def solved(stack: Stack, chosen: Sequence[tuple[int, ...]], quick: bool) -> dict[str, list[bool]]:
    """Return which puzzles are solved without layers, with one layer alone, and with fewer denoising steps."""
    prompts, answers = asked(32 if quick else 256, 900)
    found = {f"k={len(each)}": answered(views(stack, each), prompts, answers) for each in [(), *chosen]}
    found["one layer"] = answered(views(stack, range(1, len(stack))), prompts, answers)
    if stack.architecture.objective == "masked tokens":
        for steps in range(1, SIZE):
            found[f"{steps} of {SIZE} steps"] = answered(stack.model, prompts, answers, steps)
    return found


def answered(model: Any, prompts: Tensor, answers: Tensor, steps: int = SIZE) -> list[bool]:
    if hasattr(model, "generate"):
        written = model.generate(prompts, max_new_tokens=SIZE, do_sample=False, pad_token_id=MASK, use_cache=True)
    else:
        written = denoise(model, prompts, sampler=Sampler(length=SIZE, steps=steps))
    found: list[bool] = (written[:, prompts.shape[1] :] == answers).all(dim=1).tolist()
    return found


def transfer(stack: Stack, seed: int, count: int) -> dict[str, float]:
    """Choose layers on prose and on program text, and evaluate them on both."""
    inner, k = range(1, len(stack) - 1), 2
    program = encode("".join(Path(str(each.__file__)).read_text() for each in (code_to_read, more_code_to_read)))
    rows = program[: len(program) // LENGTH * LENGTH].view(-1, LENGTH)
    texts = {"prose": text("calibration", count, seed), "code": rows[:count]}
    tests = {"prose": text("test", count, 500), "code": rows[-count:]}
    sets = {
        name: tuple(sorted(select(similarity(stack, draws(stack, each, seed=seed)).by_layer, -1.0, k, inner)))
        for name, each in texts.items()
    }
    ours, theirs = (set(each) for each in sets.values())
    found = {"jaccard": len(ours & theirs) / len(ours | theirs)}
    for name, each in tests.items():
        judged: list[Draw] = draws(stack, each, seed=500)
        for chosen, cost in zip(sets, rises(stack, judged, list(sets.values())), strict=True):
            found[f"{chosen} on {name}"] = cost
    return found


def three_models(run: Run) -> None:
    seeds = {kind: each[:1] if run.quick else each for kind, each in SEEDS.items()}
    first = run.arm(f"MDM, seed {seeds['MDM'][0]}", measured, "MDM", seeds["MDM"][0], run.quick)
    cost = fmean(first["random"][1])
    run.premise(
        "rise of MDM's loss without two layers, mean of other sets", f"at least {COSTS:g} nats", cost, cost >= COSTS
    )
    statistic = "mean over models and texts of the rise of the loss of the selected layers less that of other sets"
    run.freeze(statistic, list(seeds["MDM"]), counts=COUNTS, sets=RANDOM, texts=TEXTS, layers=first["layers"])
    found = {
        kind: [run.arm(f"{kind}, seed {seed}", measured, kind, seed, run.quick) for seed in seeds[kind]]
        for kind in KINDS
    }
    curves(run, found)
    skips(run, found)
    the_method(run, found)
    puzzles(run, found)


def rises_of(arms: Sequence[dict[str, Any]], name: str, k: int) -> np.ndarray:
    """Return the rise of the loss without the k layers of a choice, or the mean of other sets [seeds, texts]."""
    return np.array([(each["random"] if name == "others" else each["rise"][name])[k - 1] for each in arms])


def reaching(arms: Sequence[dict[str, Any]], k: int) -> list[dict[str, Any]]:
    """Return the models for which k layers can be selected, since the first choices may leave only neighbours."""
    return [each for each in arms if len(each["sets"]["selected"][k - 1]) == k]


def mean(arms: Sequence[dict[str, Any]], *path: Any) -> Any:
    def at(each: Any) -> Any:
        for name in path:
            each = each[name]
        return each

    return np.mean([at(each) for each in arms], axis=0).tolist()


def curves(run: Run, found: dict[str, list[dict[str, Any]]]) -> None:
    layers = found["AR"][0]["layers"]
    columns = ["layer", *(f"{kind}: similarity" for kind in KINDS), *(f"{kind}: rise without it" for kind in KINDS)]
    rows = [
        [layer, *(mean(found[kind], "sim", layer) for kind in KINDS),
         *(mean(found[kind], "singles", layer) for kind in KINDS)]
        for layer in range(layers)
    ]  # fmt: skip
    run.table(
        "Similarity of a layer's input and output, and the loss increase without it (nats per token)", columns, rows
    )
    lines = {kind: mean(arms, "sim") for kind, arms in found.items()}
    run.figure("dllm-skip-similarity", Lines("layer", "similarity of input and output", lines))
    rows = [
        [kind, mean(arms, "base"), mean(arms, "passing"), mean(arms, "spearman"), fmean(mean(arms, "recency"))]
        for kind, arms in found.items()
    ]
    columns = ["", "loss", "layers above 0.95, no adjacent ones", "rank correlation of 1 - similarity with the rise"]
    run.table("Properties of the models", [*columns, "recency index, mean over points"], rows)
    pairs = list(zip(*(found[kind] for kind in KINDS), strict=False))  # of the seeds that all have
    near = [
        curve_distance(adapted["sim"], ar["sim"]) - curve_distance(native["sim"], ar["sim"])
        for ar, native, adapted in pairs
    ]
    rows = []
    for a, b in (("AR", "AR2MDM"), ("AR", "MDM"), ("AR2MDM", "MDM")):
        both = [(x["sim"], y["sim"]) for x, y in zip(found[a], found[b], strict=False)]
        rows.append([f"{a} and {b}", *(fmean(apart(*each) for each in both) for apart in (curve_distance, spearman))])
    run.table("Distance of the similarity curves", ["", "mean absolute difference", "rank correlation"], rows)
    nearer = Measured.over_seeds(near)
    run.further("distance of AR2MDM's curve from AR's minus that of MDM's", "at most 0", nearer, nearer.at_most(0))
    for kind, arms in found.items():
        points = mean(arms, "points")
        title = f"{kind}: S, the cosine of the residual stream at two points, from the embeddings to the last layer"
        run.table(title, ["", *map(str, range(layers + 1))], [[point, *row] for point, row in enumerate(points)])


def skips(run: Run, found: dict[str, list[dict[str, Any]]]) -> None:
    names = ["selected", "plain top-k", "consecutive", "evenly spaced", "oracle", "others"]
    rows = []
    for kind, arms in found.items():
        for k in range(1, len(arms[0]["random"]) + 1):
            if some := reaching(arms, k):
                costs = [str(Measured.over_seeds_and_items(rises_of(some, name, k))) for name in names]
                rows.append([kind, k, len(some), *costs])
    title = "Rise of the loss without k layers, nats per token, by selection method"
    run.table(title, ["", "k", "seeds", *names[:-1], "other sets without adjacent layers, mean"], rows)
    decoders, native = found["AR"], found["MDM"][: len(found["AR"])]
    gap = Measured.over_seeds_and_items(rises_of(native, "selected", 2) - rises_of(decoders, "selected", 2))
    run.further("rise of MDM minus rise of AR without 2 layers, nats", "at most 0", gap, gap.at_most(0))


def the_method(run: Run, found: dict[str, list[dict[str, Any]]]) -> None:
    for kind, arms in found.items():
        for k in range(2, len(arms[0]["random"]) + 1):
            if some := reaching(arms, k):
                check = run.main if kind == "MDM" else run.further
                gain = Measured.over_seeds_and_items(rises_of(some, "selected", k) - rises_of(some, "others", k))
                name = (
                    f"{kind}, k={k}, {len(some)} seeds: rise of the selected layers minus the mean of other sets, nats"
                )
                check(name, "at most 0", gain, gain.at_most(0))
                plain = Measured.over_seeds_and_items(rises_of(some, "selected", k) - rises_of(some, "plain top-k", k))
                name = f"{kind}, k={k}, {len(some)} seeds: rise of the selected layers minus that of plain top-k, nats"
                run.further(name, "at most 0", plain, plain.at_most(0))


def puzzles(run: Run, found: dict[str, list[dict[str, Any]]]) -> None:
    layers = found["AR"][0]["layers"]
    work = {f"k={k}": 1 - k / layers for k in range(layers)} | {"one layer": 1 / layers}
    work |= {f"{steps} of {SIZE} steps": steps / SIZE for steps in range(1, SIZE)}
    rows, learned = [], {}
    for kind, arms in found.items():
        for name in dict.fromkeys(name for each in arms for name in each["solved"]):
            some = [each["solved"] for each in arms if name in each["solved"]]
            share, whole = (np.mean([each[of] for each in some]) for of in (name, "k=0"))
            rows.append([kind, name, len(some), work[name], share, share / whole if whole else ""])
        least = min(np.mean(each["solved"]["k=0"]) for each in arms)
        most = max(np.mean(each["solved"]["one layer"]) for each in arms)
        learned[kind] = bool(least >= LEARNED and most <= ALONE)
    title = f"Puzzles of {SIZE} letters: without k of {layers} layers, and with fewer denoising steps"
    run.table(title, ["", "", "seeds", "FLOPs of the layers", "solved", "retention"], rows)
    run.table("Models that solve their puzzles, and not with one layer alone", ["", "all seeds"],
              [[kind, "yes" if each else "no"] for kind, each in learned.items()])  # fmt: skip

    def solved_by(arms: Sequence[dict[str, Any]], name: str) -> np.ndarray:
        return 100 * np.array([each["solved"][name] for each in arms], float)  # [seeds, puzzles]

    def told(verdict: bool | None, *kinds: str) -> bool | None:
        return verdict if all(learned[kind] for kind in kinds) else None

    for k in (1, 2):
        arms = reaching(found["MDM"], k)
        kept = Measured.over_seeds_and_items(solved_by(arms, f"k={k}") - RETAINED * solved_by(arms, "k=0"))
        name = f"MDM: solved without {k} of {layers} layers less {RETAINED:.0%} of those solved by all, points"
        run.further(name, "at least 0", kept, told(kept.at_least(0), "MDM"))
    ours, theirs = (solved_by(found[kind][: len(found["AR"])], "k=1") for kind in ("MDM", "AR"))
    ahead = Measured.over_seeds_and_items(ours - theirs)
    name = f"solved without 1 of {layers} layers, MDM minus AR, points"
    run.further(name, "at least 0", ahead, told(ahead.at_least(0), "MDM", "AR"))
    k, steps = EQUAL
    for kind in ("MDM", "AR2MDM"):
        arms = reaching(found[kind], k)
        rival = Measured.over_seeds_and_items(solved_by(arms, f"{steps} of {SIZE} steps") - solved_by(arms, f"k={k}"))
        name = f"{kind}: solved in {steps} of {SIZE} steps minus solved without {k} of {layers} layers, points"
        run.further(name, "at most 0", rival, told(rival.at_most(0), kind))
    rows = [[kind, *(mean(arms, "transfer", name) for name in arms[0]["transfer"])] for kind, arms in found.items()]
    run.table("Loss increase without two layers chosen on prose and on code", ["", *found["AR"][0]["transfer"]], rows)
    away = Measured.over_seeds(
        [each["transfer"]["code on prose"] - each["transfer"]["prose on prose"] for each in found["MDM"]]
    )
    name = "MDM: rise on prose of layers chosen on code minus chosen on prose, nats"
    run.further(name, "at most 0.05", away, away.at_most(0.05))


# Time per step


def latency(run: Run) -> None:
    stack = Stack(nano("llada", n_layers=8, d_model=256, n_heads=4, n_kv_heads=4, mlp_hidden_size=768))
    ks = (2, 4)
    models = {"whole": stack.model} | {f"k={k}": views(stack, range(1, k + 1)) for k in ks}
    timings = bench(models, prompt=248, tokens=8, rounds=2 if run.quick else 15)
    rows = []
    for k in ks:
        expected = 1 / (1 - k / 8)
        took = Measured.over_rounds(timings[f"k={k}"][0].decode_speedup, expected)
        rows.append([k, expected, str(timings[f"k={k}"][0].decode_speedup), str(took)])
        name = f"speed-up of a step without {k} of 8 layers, by 1 / (1 - k / 8)"
        run.further(name, "0.9 to 1.1", took, took.within(0.9, 1.1))
    run.table("Time of a denoising step over 256 tokens", ["k", "ideal", "measured", "measured / ideal"], rows)


# SmolLM2


def smollm2(seed: int) -> dict[str, Any]:
    stack = lamella.open("smollm2")
    tokenizer = open_tokenizer("smollm2")
    inner = range(1, len(stack) - 1)
    tokens = {split: lamella.windows(tokenizer, lamella.load_text("pydoc", split), count, 128, seed)
              for split, count in (("calibration", 4), ("test", 8))}  # fmt: skip
    sim = similarity(stack, draws(stack, tokens["calibration"])).by_layer
    judged = draws(stack, tokens["test"])
    singles = rises(stack, judged, [(layer,) for layer in range(len(stack))])
    sets = {
        "selected": [tuple(sorted(select(sim, 0.95, k, inner))) for k in SMOL],
        "plain top-k": [tuple(sorted(select(sim, 0.95, k, inner, non_adjacent=False))) for k in SMOL],
        "consecutive": [neighbours(list(sim), inner, k) for k in SMOL],
    }
    random = others(inner, sets["selected"][1], RANDOM, seed)
    costs = {name: rises(stack, judged, known) for name, known in sets.items()}
    whole, *without = losses_without(stack, judged, [(), *(sets["selected"][k - 1] for k in PROBED)])
    return {
        "sim": sim.tolist(),
        "singles": singles,
        "sets": sets,
        "costs": costs,
        "probed": [(each - whole).tolist() for each in without],
        "random": rises(stack, judged, random),
        "spearman": spearman(1 - sim, singles),
        "passing": int((sim > 0.95).sum()),
    }


def a_decoder(run: Run) -> None:
    found = run.arm("SmolLM2", smollm2, run.seed)
    rows = [
        [k, " ".join(map(str, found["sets"]["selected"][place])),
         *(found["costs"][name][place] for name in ("selected", "plain top-k", "consecutive"))]
        for place, k in enumerate(SMOL)
    ]  # fmt: skip
    columns = ["k", "layers", "selected", "plain top-k", "consecutive"]
    run.table("SmolLM2 (30 layers, theta 0.95): rise of the loss without k layers, nats per token", columns, rows)
    rows = [[layer, *both] for layer, both in enumerate(zip(found["sim"], found["singles"], strict=True))]
    run.table(f"SmolLM2: {found['passing']} of 30 layers are above 0.95; rank correlation {found['spearman']:.2f}",
              ["layer", "similarity", "rise without it"], rows)  # fmt: skip
    costs = found["costs"]["selected"]
    rising = all(b > a for a, b in pairwise(costs))
    run.further("SmolLM2: the rise grows with k", "at every k from 1 to 6", " ".join(f"{c:.2f}" for c in costs), rising)
    for (k, known), values in zip(PROBED.items(), found["probed"], strict=True):
        rise = Measured.over_seeds(values)  # over sequences
        inside = rise.low <= known <= rise.high
        run.further(f"SmolLM2, k={k}: rise", f"{known}, as on other text", str(rise), inside)
    gain = costs[1] - fmean(found["random"])
    run.further("SmolLM2, k=2: rise of the selected layers minus the mean of other pairs", "at most 0", gain, gain <= 0)


def experiment(run: Run) -> None:
    run.data = "characters of Python's documentation and puzzles" + ("" if run.quick else "; pydoc for SmolLM2")
    with torch.no_grad():
        run.part("latency", latency)
        if not run.quick:
            a_decoder(run)
        three_models(run)


if __name__ == "__main__":
    raise SystemExit(main(experiment, quick="models that do not meet the premise, and no SmolLM2"))
